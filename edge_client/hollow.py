"""A model's configuration with some of its layers alone: what this side builds modules from.

Hugging Face builds whole models; the edge needs embeddings, norms and a few layers of one.
"""

import copy
from collections.abc import Sequence

from transformers import PreTrainedConfig


def hollow(config: PreTrainedConfig, layers: Sequence[int] = (0,)) -> PreTrainedConfig:
    """Return a copy of ``config`` for a model that has these layers alone, in this order.

    One layer is the least that a model can be built with; on the meta device it costs nothing.
    """
    copied = copy.deepcopy(config)
    copied.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        copied.layer_types = [config.layer_types[layer] for layer in layers]
    return copied
