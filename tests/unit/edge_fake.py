"""A cloud in this process: a session that runs a plain Hugging Face model on the rows it is sent."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import Limits
from edge_client.personal import PersonalWeights
from edge_client.shell import build_shell
from edge_client.spans import Span
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from tests.families import plan_for

LIMITS = Limits(max_context_tokens=128, max_step_tokens=512, max_rows=8)
FINGERPRINT = Fingerprint(b"p" * 32, b"l" * 32, b"b" * 32, b"e" * 32)


class FakeSession:
    """Keeps h0 of every row and runs it anew each step, after checking what the real cloud checks."""

    def __init__(self, model: PreTrainedModel, personal: PersonalWeights) -> None:
        self.model, self.personal = model, personal
        self.rows: list[Tensor] = []
        self.steps: list[tuple[list[Span], list[int] | None]] = []
        self.cancelled = 0
        self.closed = False
        self.before_step: Callable[[], object] = lambda: None

    def step(self, hidden: Tensor, spans: list[Span], parents: list[int] | None = None) -> Tensor:
        assert not self.closed
        assert hidden.shape[0] == sum(span.count for span in spans) <= LIMITS.max_step_tokens
        self.steps.append((spans, parents))
        if parents is not None:
            self.rows = [self.rows[parent] for parent in parents]
        assert len({span.row for span in spans}) == len(spans)
        kept, at = [], 0
        for span in spans:
            if span.row == len(self.rows):
                self.rows.append(torch.empty(0, hidden.shape[1]))
            assert span.start <= self.rows[span.row].shape[0], "position gap"
            assert span.count >= 1 and span.keep <= span.count
            self.before_step()
            past = self.rows[span.row][: span.start]
            self.rows[span.row] = torch.cat([past, hidden[at : at + span.count]])
            at += span.count
            if span.keep:
                kept.append(self._layers(self.rows[span.row])[-span.keep :])
        assert len(self.rows) <= LIMITS.max_rows
        return torch.cat(kept) if kept else hidden[:0]

    def _layers(self, h0: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        with torch.no_grad():
            self.model.model(inputs_embeds=h0[None], use_cache=False)
        hook.remove()
        return found[0][0]

    def cancel(self) -> None:
        self.cancelled += 1

    def close(self) -> None:
        self.closed = True

    @property
    def positions(self) -> int:
        """Positions computed so far."""
        return sum(span.count for spans, _ in self.steps for span in spans)


def split(model: PreTrainedModel, **limits: Any) -> tuple[PrivateLoraForCausalLM, list[FakeSession]]:
    """Return ``model`` split in two, and the list that its sessions appear in."""
    sessions: list[FakeSession] = []

    def open_session(personal: PersonalWeights) -> FakeSession:
        sessions.append(FakeSession(model, personal))
        return sessions[-1]

    plan = plan_for(model)
    tensors = {
        "embed_tokens.weight": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    edge = PrivateLoraForCausalLM(
        model.config,
        build_shell(model.config, tensors, "cpu", torch.float32),
        Limits(**{**vars(LIMITS), **limits}),
        Adapter.zeros(plan, FINGERPRINT),
        open_session,
    )
    edge.generation_config = model.generation_config
    return edge, sessions
