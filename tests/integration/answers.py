"""An answer that a test disturbs while it is being made."""

from collections.abc import Callable

import torch

from edge_client.model import PrivateLoraForCausalLM
from tests.families import prompts

PROMPT = torch.tensor([prompts(1)[0]])
NEW, AT = 24, 9  # tokens of the answer; the one that is chosen when the cloud is lost


def answer(model: PrivateLoraForCausalLM, disturb: Callable[[], object] | None = None) -> list[int]:
    """Return an answer's tokens; ``disturb`` is called when one of them has been chosen."""
    count = 0

    class AtToken:
        def put(self, value: torch.Tensor) -> None:
            nonlocal count
            count += 1
            if count == AT and disturb is not None:
                disturb()

        def end(self) -> None:
            pass

    torch.manual_seed(1)
    found = model.generate(
        PROMPT, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, streamer=AtToken()
    )
    tokens: list[int] = found[0].tolist()
    return tokens
