"""Typed settings of the cloud, one file a section.

`cloud` puts the sections together and `reading` reads them: flags over environment over a TOML file. Unknown
keys are errors. `compute`, `limits`, `patience`, `security` and `observation` hold settings of the top level
(``max_rows``), `engine`, `waiting`, `tuning` and `identity` are tables of their own (``engine.slice_s``), and
`plans` describes the plans on offer.
"""
