"""The layers on this side while tuning: before the cloud's and after them, forward and back again.

One `Ends` goes with one micro-batch. Without resident layers everything passes through as it is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_client.resident import Resident


class Ends:
    """Runs resident layers around the cloud's.

    Parameters
    ----------
    resident
        The layers, without LoRAs; None if there are none.
    factors
        Their LoRA factors, left as they are.
    lengths
        Tokens of each sequence; they are laid end to end in every tensor.
    want_gradient
        Whether `back_from_end` and `back_to_start` will follow.
    """

    def __init__(
        self,
        resident: Resident | None,
        factors: Mapping[str, Tensor],
        lengths: Sequence[int],
        *,
        want_gradient: bool,
    ) -> None:
        self._lengths, self._wanted = lengths, want_gradient
        self._leaves = {name: t.detach().requires_grad_(want_gradient) for name, t in factors.items()}
        self._layers = None if resident is None else resident.with_factors(self._leaves)
        head = 0 if resident is None else resident.plan.head_layers
        self._head = range(head)
        self._tail = range(head, 0 if resident is None else len(resident.layers))
        self._entered: Tensor | None = None
        self._ends: tuple[Tensor, Tensor] | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        """Return what goes to the cloud of h0, both ``(tokens, hidden_size)``."""
        if not self._head:
            return hidden
        assert self._layers is not None
        with torch.set_grad_enabled(self._wanted):
            self._entered = self._layers.run_whole(self._head, hidden, self._lengths)
        return self._entered.detach()

    def leave(self, hidden: Tensor) -> Tensor:
        """Return hL of what came from the cloud, both ``(tokens, hidden_size)``."""
        if not self._tail:
            return hidden
        assert self._layers is not None
        begin = hidden.detach().to(self._layers.dtype).requires_grad_(self._wanted)
        with torch.set_grad_enabled(self._wanted):
            end = self._layers.run_whole(self._tail, begin, self._lengths)
        self._ends = begin, end
        return end.detach()

    def back_from_end(self, gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient at the cloud's last layer for dL/dhL, and those of the tail's factors."""
        if self._ends is None:
            return gradient, {}
        begin, end = self._ends
        return self._back(self._tail, end, gradient, begin)

    def back_to_start(self, gradient: Tensor | None) -> dict[str, Tensor]:
        """Return the gradients of the head's factors for that at the cloud's first layer."""
        if self._entered is None or gradient is None:
            return {}
        return self._back(self._head, self._entered, gradient, None)[1]

    def _back(
        self, places: range, end: Tensor, gradient: Tensor, begin: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._layers is not None
        layers = {f"layers.{self._layers.plan.resident_layers[place]}" for place in places}
        names = [name for name in self._leaves if ".".join(name.split(".")[:2]) in layers]
        wanted = [self._leaves[name] for name in names] + ([] if begin is None else [begin])
        if not wanted:
            return gradient, {}
        found = torch.autograd.grad(end, wanted, gradient.to(end))
        return found[-1], dict(zip(names, found[: len(names)], strict=True))
