"""Tuning: personal matrices M learned on this machine from a user's own data, through a cloud.

``rows.py`` reads a data file, ``encode.py`` and ``examples.py`` make token ids and labels of it.
``trainer.py`` is the loop; ``learner.py`` gets it losses and gradients, with ``stream.py`` (the wire) below
and ``loss.py`` (norm, head, cross-entropy) on top. ``checkpoint.py`` is a run on disk, ``run.py`` ties all
of it together, ``config.py`` says how to tune, ``curve.py`` draws how the loss fell.
Text, ids, labels, M and its gradient never leave this process.
"""
