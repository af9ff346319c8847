"""Names that differ between the transformers versions we support; knows nothing about our own models.

5.24 renamed the argument, and the field of outputs, that keys and values travel in from
``past_key_values`` to ``cache``. It still takes the old name, with a warning at every call, and no longer
writes it itself: what derives from its classes has to use the name of the version at hand.
"""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_CACHE = "past_key_values"
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else OLD_CACHE
