"""What a generation cost: the figures line that ends every answer, and how they are defined."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from edge_client.drafting import DraftCounts, Drafter
from edge_client.streams import Traffic
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


def full_activation_bytes(plan: Plan, dtypes: WireDtypes) -> int:
    """Return the bytes a token would cost if every layer's whole activation went both ways.

    The yardstick of the paper (arXiv 2311.14030): one vector of ``hidden_size`` up and one down at
    each layer that the cloud runs, in the dtype that hidden states travel in.
    """
    return 2 * dtypes.hidden_bytes(plan) * len(plan.cloud_layers)


@dataclass(frozen=True)
class Figures:
    """Figures of one answer. Rates are in tokens a second; per-token figures are those of decoding.

    ``prefill_tok_s`` counts the prompt tokens that were computed (not those reused) over the time to
    the first token; ``decode_tok_s`` the tokens after the first over the time after it.
    ``tokens_per_step`` is above 1 where drafted tokens were accepted. Who stopped before the first token
    knows none of them, nor what was reused: all are 0 then.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    prefill_tok_s: float
    decode_tok_s: float
    tokens_per_step: float
    drafted_tokens: int
    accepted_tokens: int
    round_trips_per_token: float
    bytes_up_per_token: float
    bytes_down_per_token: float
    full_bytes_per_token: int
    reduction: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self)

    def line(self) -> str:
        """Return the figures in one line for people."""
        if not self.new_tokens:
            return f"prompt {self.prompt_tokens} tokens | stopped before the first token"
        reused = f" ({self.reused_tokens} reused)" if self.reused_tokens else ""
        parts = [
            f"prompt {self.prompt_tokens} tokens{reused}",
            f"prefill {self.prefill_tok_s:.1f} tok/s",
            f"first token after {self.time_to_first_token_s:.2f} s",
        ]
        if self.new_tokens > 1:
            parts += [
                f"decode {self.decode_tok_s:.1f} tok/s ({self.new_tokens} tokens)",
                *self._drafting(),
                f"{self.round_trips_per_token:.1f} round trips/token",
                f"{_kib(self.bytes_up_per_token)} up + {_kib(self.bytes_down_per_token)} down per token",
                f"{self.reduction:.1%} less than full activations both ways at every layer "
                f"({_kib(self.full_bytes_per_token)}/token)",
            ]
        return " | ".join(parts)

    def _drafting(self) -> list[str]:
        if not self.drafted_tokens:
            return []
        shares = f"{self.accepted_tokens} of {self.drafted_tokens} guesses right"
        return [f"{self.tokens_per_step:.2f} tokens/step ({shares})"]


def _kib(count: float) -> str:
    return f"{count / 1024:.1f} KiB"


@dataclass(frozen=True)
class Mark:
    """The state of the counters at one moment: seconds, traffic, positions run, drafts."""

    at_s: float
    traffic: Traffic
    positions: int
    drafts: DraftCounts


class Meter:
    """Takes the marks of one generation: `start`, `token` for the tokens of each step, `figures` last."""

    def __init__(self, model: Any, drafter: Drafter | None = None) -> None:
        self._model, self._drafter = model, drafter
        self._start = self._first = self._last = self._mark()
        self.new_tokens = self._steps = 0

    def _mark(self) -> Mark:
        drafts = self._drafter.counts if self._drafter else DraftCounts()
        return Mark(time.perf_counter(), self._model.traffic(), self._model.positions(), drafts)

    def start(self) -> None:
        """Begin; what came before does not count."""
        self._start = self._first = self._last = self._mark()
        self.new_tokens = self._steps = 0

    def token(self, count: int) -> None:
        """Note that a step has yielded ``count`` tokens."""
        self._last = self._mark()
        self._steps += 1
        if self.new_tokens == 0:
            self._first, self._first_tokens = self._last, count
        self.new_tokens += count

    def figures(self, prompt_tokens: int, dtypes: WireDtypes) -> Figures:
        """Return the figures of what was generated since `start`."""
        waited = max(self._first.at_s - self._start.at_s, 1e-9)
        computed = min(prompt_tokens, self._first.positions - self._start.positions)
        reused = prompt_tokens - computed if self.new_tokens else 0
        decoded = self.new_tokens - self._first_tokens if self.new_tokens else 0
        spent = self._last.traffic - self._first.traffic
        drafts = self._mark().drafts - self._start.drafts
        full = full_activation_bytes(self._model.adapter.plan, dtypes)
        each = 1 / decoded if decoded else 0.0
        return Figures(
            prompt_tokens=prompt_tokens,
            reused_tokens=reused,
            new_tokens=self.new_tokens,
            time_to_first_token_s=round(waited, 4),
            prefill_tok_s=round(computed / waited, 2),
            decode_tok_s=round(decoded / max(self._last.at_s - self._first.at_s, 1e-9), 2)
            if decoded
            else 0.0,
            tokens_per_step=round(decoded / (self._steps - 1), 3) if decoded else 0.0,
            drafted_tokens=drafts.drafted,
            accepted_tokens=drafts.accepted,
            round_trips_per_token=round(spent.round_trips * each, 2),
            bytes_up_per_token=round(spent.bytes_up * each, 1),
            bytes_down_per_token=round(spent.bytes_down * each, 1),
            full_bytes_per_token=full,
            reduction=round(1 - (spent.bytes_up + spent.bytes_down) * each / full, 4) if decoded else 0.0,
        )
