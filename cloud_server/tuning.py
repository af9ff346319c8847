"""The maths of one tuning batch: every frozen layer forward, then backward, in small pieces.

A batch is cut into *pieces*, whole sequences each. Sequences do not see each other, so every piece goes its
own way through the layers and back, and waits only for rows that the edge has yet to send; several may be run
side by side, on a thread each (`cloud_server.tune_slice`). What the edge
wants of it all is dL/dM; it gets dL/dz from here and gives dL/dc back. Knows nothing about streams,
scheduling, tokens or personal weights.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from cloud_server.arena import Arena
from cloud_server.backbone import Backbone
from cloud_server.packed import PackedAttention
from cloud_server.tune_piece import Gathered, Kept, Piece, Stage, cut
from shared.plan import Plan

# (name of the tensor as the protocol has it, layer, index of the first row, rows)
Send = Callable[[str, int, int, Tensor], None]


class TuneBatch:
    """One batch on its way through the layers.

    `put`, `next` and `run` may be called from several threads, the last for a different piece each; whoever
    waits on ``changed`` hears of rows that came.

    Parameters
    ----------
    backbone, plan
        What runs.
    lengths
        Tokens of each sequence.
    send
        Takes what goes to the edge.
    forward_only
        Whether no way back will follow; nothing is kept for it then.
    checkpointing
        Whether layers are run again on the way back instead of keeping what they computed.
    piece_tokens
        Most tokens in a piece, unless a sequence alone has more. Results depend on it in their last bits,
        so it is a setting and not learned: a batch that is sent again gives the same gradients.
    arena
        Where to keep what the way back needs; None leaves that to torch's allocator.
    """

    def __init__(
        self,
        backbone: Backbone,
        plan: Plan,
        lengths: Sequence[int],
        send: Send,
        *,
        forward_only: bool = False,
        checkpointing: bool = False,
        piece_tokens: int = 128,
        arena: Arena | None = None,
    ) -> None:
        self.backbone, self.plan, self.send = backbone, plan, send
        self.forward_only, self.checkpointing, self._arena = forward_only, checkpointing, arena
        self.tokens = sum(lengths)
        self.changed = threading.Condition()
        self.start, self.stop = plan.cloud_layers.start, plan.cloud_layers.stop
        # Nothing below is needed: no personal weight is there.
        self.bottom = plan.lowest_gradient
        self.returns_gradient = plan.returns_gradient and not forward_only
        self._gathered: dict[tuple[str, int], Gathered] = {}
        self._left = {tensor: self.tokens for tensor in self._outgoing()}  # rows yet to be sent, in order
        self.pieces = []
        at = 0
        for index, group in enumerate(cut(lengths, piece_tokens)):
            positions = torch.cat([torch.arange(length) for length in group])
            rotary = backbone.rotary(positions)
            piece = Piece(
                index,
                at,
                at + len(positions),
                PackedAttention(group),
                rotary,
                self.start,
                self._first(self.start),
            )
            self.pieces.append(piece)
            at = piece.hi

    def put(self, name: str, layer: int, first: int, rows: Tensor) -> None:
        """Take the next rows of a tensor from the edge: ``rows (rows, width)``, whose checks are done."""
        with self.changed:
            gathered = self._gathered.setdefault((name, layer), Gathered())
            assert first == gathered.filled
            gathered.put(rows)
            self.changed.notify_all()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        return all(piece.stage is Stage.DONE for piece in self.pieces)

    @property
    def may_share(self) -> bool:
        """Whether pieces may run side by side: Hugging Face's own code keeps products in its modules."""
        layers = (self.backbone.layers[layer] for layer in range(self.start, self.stop))
        return self.backbone.device.type == "cpu" and all(layer.lean is not None for layer in layers)

    def next(self, running: Collection[Piece] = ()) -> Piece | None:
        """Return the piece that goes on next, None if all wait for the edge or for others, or are done.

        Parameters
        ----------
        running
            Pieces that are being run on other threads. Those behind follow and do not overtake them, so that
            rows of every tensor are sent and taken in order.
        """
        with self.changed:
            ready = (
                piece
                for piece in self.pieces
                if all(piece is not other and not _would_overtake(piece, other) for other in running)
                and self._is_ready(piece)
            )
            return min(ready, key=lambda piece: piece.order, default=None)

    @torch.no_grad()
    def run(self, piece: Piece) -> None:
        """Take a ready piece one stage on: one unit of work."""
        match piece.stage:
            case Stage.EMIT:
                self._emit(piece)
            case Stage.STASH:
                piece.qkv, piece.normed = self.backbone.layers[piece.layer].base(_of(piece.normed)), None
                piece.stage = Stage.RUN
            case Stage.RUN:
                self._run(piece)
            case Stage.GRADIENT:
                self._gradient(piece)
            case Stage.PULL:
                layer = self.backbone.layers[piece.layer]
                piece.normed_gradient, piece.qkv = layer.base_gradient(_of(piece.qkv)), None
                piece.stage = Stage.CLOSE
            case Stage.CLOSE:
                self._close(piece)

    def free(self) -> None:
        """Forget everything."""
        for piece in self.pieces:
            piece.kept.clear()  # leads back to the piece through a graph, where no collector sees it
        self.pieces.clear()
        self._gathered.clear()
        self._arena = None

    # --- what goes to the edge ------------------------------------------------------------------------------

    def _outgoing(self) -> list[tuple[str, int]]:
        """Return what is sent of the batch, in order: an edge reads one tensor after the other."""
        back = () if self.forward_only else reversed(self.plan.owners)
        last = (("hidden_gradient", 0),) if self.returns_gradient else ()
        return [
            *(("codes", layer) for layer in self.plan.exchange_layers),
            ("hidden", 0),
            *(("residual_codes_gradient", layer) for layer in back),
            *last,
        ]

    def _is_turn(self, name: str, layer: int) -> bool:
        """Whether all that is sent before this tensor has been sent."""
        return next(iter(self._left), None) == (name, layer)

    def _send(self, name: str, layer: int, piece: Piece, rows: Tensor) -> None:
        with self.changed:  # what is sent after it, on whatever thread, leaves after it
            self._left[name, layer] -= piece.tokens
            if self._left[name, layer] == 0:
                del self._left[name, layer]
            self.send(name, layer, piece.lo, rows)

    # --- forward --------------------------------------------------------------------------------------------

    def _first(self, layer: int) -> Stage:
        return Stage.EMIT if layer in self.plan.exchange_layers else Stage.RUN

    def _input(self, piece: Piece) -> Tensor:
        if piece.hidden is None:
            piece.hidden = self._take("hidden", 0, piece)
        return piece.hidden

    def _emit(self, piece: Piece) -> None:
        piece.normed = self.backbone.layers[piece.layer].norm(self._input(piece))
        codes = piece.normed @ self.backbone.residuals.a(self.plan, piece.layer)  # (tokens, codes_width)
        self._send("codes", piece.layer, piece, codes)
        piece.stage = Stage.STASH

    def _run(self, piece: Piece) -> None:
        number, hidden = piece.layer, self._input(piece)
        keep = not self.forward_only and number >= self.bottom
        z = self._residual_codes(number, piece, stays=keep and self.checkpointing)
        qkv = self._products(number, hidden, z, piece.qkv)
        if keep and not self.checkpointing:
            piece.kept[number], out = self._with_graph(piece, hidden, qkv, self._arena)
        else:
            layer = self.backbone.layers[number]
            out = layer(hidden, qkv, piece.rotary[layer.rotary_key], piece.attention)
            if keep:
                piece.kept[number] = Kept(self._copied(hidden), z)
        piece.qkv = None
        if number + 1 < self.stop:
            piece.hidden, piece.layer, piece.stage = out, number + 1, self._first(number + 1)
            return
        self._send("hidden", 0, piece, out)  # before it moves on: who is behind follows at once
        piece.hidden = None
        piece.stage = Stage.DONE if self.forward_only else Stage.GRADIENT

    def _residual_codes(self, number: int, piece: Piece, *, stays: bool) -> Tensor | None:
        """Return what a layer adds of the edge's: taken at the owner, held for the layers that share it."""
        owner = self.plan.owner_of(number)
        if owner is None:
            return None
        if number == owner:
            taken = self._take("residual_codes", owner, piece)
            piece.residual_codes = self._copied(taken) if stays else taken
        z = _of(piece.residual_codes)
        if number == self.plan.served_by(owner)[-1]:
            piece.residual_codes = None
        return z

    def _copied(self, tensor: Tensor) -> Tensor:
        """Return a tensor where what is kept belongs."""
        return tensor if self._arena is None else self._arena.copy(tensor)

    def _products(self, number: int, hidden: Tensor, z: Tensor | None, base: Tensor | None) -> Tensor:
        """Return q|k|v with the residual: ``(tokens, q_dim + 2 kv_dim)``; ``base`` is used up."""
        layer = self.backbone.layers[number]
        qkv = layer.base(layer.norm(hidden)) if base is None else base
        if z is not None:
            self.backbone.residuals.add(qkv, z, self.plan, number)
        return qkv

    def _with_graph(
        self, piece: Piece, hidden: Tensor, qkv: Tensor, arena: Arena | None
    ) -> tuple[Kept, Tensor]:
        """Run the piece's layer so that a gradient can be taken through it; return its output too."""
        layer = self.backbone.layers[piece.layer]
        keeping: AbstractContextManager[None] = nullcontext()
        if arena is not None:
            hidden, qkv = arena.copy(hidden), arena.copy(qkv)
            attention = piece.attention  # alone: the graph holds on to what is asked here
            shared = {t.untyped_storage().data_ptr() for rotary in piece.rotary.values() for t in rotary}
            keeping = arena.keeping(
                lambda t: (
                    (address := t.untyped_storage().data_ptr()) in shared
                    or layer.owns(address)
                    or attention.owns(address)
                )
            )
        hidden = hidden.detach().requires_grad_(not self._is_last(piece.layer))
        qkv = qkv.detach().requires_grad_()
        with torch.enable_grad(), keeping:
            out = layer(hidden, qkv, piece.rotary[layer.rotary_key], piece.attention)
        return Kept(hidden, None, qkv, get_gradient_edge(out)), out.detach()

    # --- backward -------------------------------------------------------------------------------------------

    def _gradient(self, piece: Piece) -> None:
        number = piece.layer
        gradient = piece.gradient
        if gradient is None:
            gradient = self._take("hidden_gradient", 0, piece)
        piece.gradient = None
        if number < self.bottom:  # a plan without any residual
            piece.stage = Stage.DONE
            return
        kept = piece.kept.pop(number)
        if kept.end is None:
            qkv = self._products(number, kept.hidden, kept.residual_codes, None)
            kept, _ = self._with_graph(piece, kept.hidden, qkv, None)
        hidden, products = kept.hidden, _of(kept.qkv)
        assert kept.end is not None
        wanted = (products,) if self._is_last(number) else (products, hidden)
        of_qkv, *of_hidden = torch.autograd.grad((kept.end,), wanted, (gradient,))
        owner = self.plan.owner_of(number)
        if owner is not None:
            onto, piece.residual_codes_gradient = piece.residual_codes_gradient, None
            dz = self.backbone.residuals.residual_codes_gradient(of_qkv, self.plan, number, onto)
            if number == owner:  # the last of those that share them, on this way
                self._send("residual_codes_gradient", owner, piece, dz)
            else:
                piece.residual_codes_gradient = dz
        if self._is_last(number):
            piece.stage = Stage.DONE
            return
        piece.hidden, piece.qkv, piece.gradient = hidden.detach(), of_qkv, of_hidden[0]
        piece.stage = Stage.PULL

    def _close(self, piece: Piece) -> None:
        number, of_normed = piece.layer, _of(piece.normed_gradient)
        if number in self.plan.exchange_layers:
            dc = self._take("codes_gradient", number, piece)
            of_normed.addmm_(dc, self.backbone.residuals.a(self.plan, number).t())
        hidden = _of(piece.hidden).requires_grad_()
        with torch.enable_grad():
            normed = self.backbone.layers[number].norm(hidden)
        (of_hidden,) = torch.autograd.grad(normed, hidden, of_normed)
        piece.gradient = _of(piece.gradient) + of_hidden
        piece.hidden = piece.normed_gradient = None
        if number == self.bottom:
            self._send("hidden_gradient", 0, piece, piece.gradient)
            piece.gradient, piece.stage = None, Stage.DONE
            return
        piece.layer, piece.stage = number - 1, Stage.GRADIENT

    def _is_last(self, layer: int) -> bool:
        """Whether the way back ends at a layer's products: nothing wants the gradient of its input."""
        return layer == self.bottom and not self.returns_gradient

    # --- what comes from the edge ---------------------------------------------------------------------------

    def _is_ready(self, piece: Piece) -> bool:
        layer, plan = piece.layer, self.plan
        match piece.stage:
            case Stage.EMIT:
                return self._has_input(piece) and self._is_turn("codes", layer)
            case Stage.RUN:
                return (
                    self._has_input(piece)
                    and (plan.owner_of(layer) != layer or self._has("residual_codes", layer, piece))
                    and (layer < self.stop - 1 or self._is_turn("hidden", 0))
                )
            case Stage.GRADIENT:
                return (piece.gradient is not None or self._has("hidden_gradient", 0, piece)) and (
                    plan.owner_of(layer) != layer or self._is_turn("residual_codes_gradient", layer)
                )
            case Stage.CLOSE:
                return (layer not in plan.exchange_layers or self._has("codes_gradient", layer, piece)) and (
                    layer > self.bottom or self._is_turn("hidden_gradient", 0)
                )
        return piece.stage is not Stage.DONE

    def _has_input(self, piece: Piece) -> bool:
        return piece.hidden is not None or self._has("hidden", 0, piece)

    def _has(self, name: str, layer: int, piece: Piece) -> bool:
        gathered = self._gathered.get((name, layer))
        return gathered is not None and gathered.filled >= piece.hi

    def _take(self, name: str, layer: int, piece: Piece) -> Tensor:
        """Return the piece's own rows; the last piece to ask leaves nothing behind."""
        gathered = self._gathered[name, layer]
        assert gathered.taken == piece.lo, "pieces never overtake each other"
        rows = gathered.take(piece.tokens).to(self.backbone.device, self.backbone.dtype)
        if gathered.taken == self.tokens:
            del self._gathered[name, layer]
        return rows


def _would_overtake(piece: Piece, running: Piece) -> bool:
    return running.index < piece.index and piece.unit >= running.unit


def _of(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
