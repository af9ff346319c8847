"""``python -m tests.integration.double_cloud serve ...``: a cloud that computes in float64 throughout.

Hugging Face's norms, rotary embeddings and softmax round to float32 in between, whatever the dtype of the
model, and the last bits of what comes before decide how. A comparison to nine digits is only possible
without that. `tests.tuning.InDouble` does the same for one thread; a served model runs on several.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F

from cloud_server import cli
from tests.tuning import InDouble


def patched(owner: Any, name: str) -> None:
    """Let a function pass through `InDouble` where a model's own code calls it, in every thread."""
    original = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("transformers.models."):
            with InDouble():
                return original(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, run)


if __name__ == "__main__":
    for owner, name in ((torch.Tensor, "to"), (torch.Tensor, "float"), (F, "softmax")):
        patched(owner, name)
    cli.main()
