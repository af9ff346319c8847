"""What the single-process reference generates, in a process of its own unless the present one has torch.

Nothing of the split path runs here: Hugging Face's own model, with M in its weights where the plan allows
that, else from hooks. Importing this needs no torch.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.child import Child, answering, arguments


@contextmanager
def reference_for(
    model: str, cache_dir: str | None, folder: Path, here: bool = False
) -> Iterator[Callable[..., object]]:
    """Give `ReferenceAnswers.expect` of a model.

    Parameters
    ----------
    model, cache_dir
        As for `ReferenceAnswers`.
    folder
        For the log.
    here
        Whether it runs in this process.
    """
    if here:
        yield ReferenceAnswers(model, cache_dir).expect
        return
    given = {"model": model, "cache_dir": cache_dir}
    with Child("benchmarks.chaos_expected", given, folder / "expected.log") as reference:
        reference.answer()
        yield partial(reference.ask, "expect", 600.0)


class ReferenceAnswers:
    """The plain model, and what it generates.

    Parameters
    ----------
    model
        Packaged name, folder, GGUF file or hub id.
    cache_dir
        Where A and B are kept; None is the user's own folder.
    """

    def __init__(self, model: str, cache_dir: str | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from shared.models import resolve

        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._checkpoint = resolve(model, cache_dir=self._cache_dir, progress=False)
        self._base = AutoModelForCausalLM.from_pretrained(self._checkpoint.folder, dtype=torch.float32)

    def expect(self, adapter: str, prompts: list[list[int]], tokens: int, file: str) -> dict[str, Any]:
        """Generate so many tokens a prompt with an adapter's file; write `Greedy` of each to ``file``."""
        from shared import lowrank
        from shared.adapter import Adapter
        from shared.exactness import greedy
        from shared.reference import Reference, merged

        chosen = Adapter.load(adapter)
        plan = chosen.plan
        matrices, _ = lowrank.ensure(plan, self._checkpoint, self._cache_dir)
        own = all(plan.source_of(layer) == layer for layer in plan.adapted_layers)
        make = merged if own else Reference
        model: Any = make(self._base, plan, matrices, chosen.matrices, chosen.factors)
        found = [greedy(model, prompt, tokens, pad_token_id=0) for prompt in prompts]
        if isinstance(model, Reference):
            model.remove()
        Path(file).write_text(json.dumps([asdict(one) for one in found]))
        return {"least_gap": min(min(one.gaps) for one in found)}


def main() -> None:
    """Generate what is asked for."""
    import torch

    given = arguments()
    torch.set_num_threads(1)
    reference = ReferenceAnswers(given["model"], given["cache_dir"])
    answering({"expect": reference.expect})


if __name__ == "__main__":
    main()
