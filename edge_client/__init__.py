"""The edge: raw data, tokenizer, embeddings, head, personal weights M and the decoding loop.

Imports `shared`, never `cloud_server`. The main path is ``cli.py``, ``model.py``, ``session.py``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.cloud_cache import CloudCache, ContextLengthError
    from edge_client.model import PrivateLoraForCausalLM

__all__ = ["CloudCache", "ContextLengthError", "PrivateLoraForCausalLM"]


def __getattr__(name: str) -> Any:
    # torch is imported on first use, so that the command line can set its environment before.
    if name in __all__:
        from edge_client import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
