"""Keys and values of one row in the resident layers, as transformers' attention asks for them."""

from typing import Any

from torch import Tensor

FIRST_CAPACITY = 64  # positions


class RowCache:
    """Grows as positions come; can be cut back and copied.

    ``length`` counts whole positions: it is set by whoever has run all layers on them. Layers write behind
    it, so what an interrupted run has left there is overwritten.
    """

    def __init__(self) -> None:
        self.length = 0
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append ``(1, heads, new, head_dim)`` and return all, ``(1, heads, length + new, head_dim)``."""
        end = self.length + keys.shape[2]
        held = self._held.get(layer)
        if held is None or held[0].shape[2] < end:
            room = max(FIRST_CAPACITY, 2 * end)
            grown = tuple(t.new_empty(*t.shape[:2], room, t.shape[3]) for t in (keys, values))
            if held is not None:
                for new, old in zip(grown, held, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            held = self._held[layer] = (grown[0], grown[1])
        for store, new in zip(held, (keys, values), strict=True):
            store[:, :, self.length : end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def crop(self, length: int) -> None:
        """Forget what lies behind the first ``length`` positions."""
        self.length = min(self.length, length)

    def fork(self) -> "RowCache":
        """Return a copy that grows on its own."""
        twin = RowCache()
        twin.length = self.length
        twin._held = {layer: (k.clone(), v.clone()) for layer, (k, v) in self._held.items()}
        return twin

    @property
    def bytes(self) -> int:
        """Memory that it takes (bytes)."""
        return sum(t.numel() * t.element_size() for held in self._held.values() for t in held)
