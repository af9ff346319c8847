"""A tuning stream: batches forward through the cloud's layers, and their gradients back.

Forward as in inference, over whole sequences laid end to end: codes c come, residual codes z = cM
go. On the way back dL/dz comes, dL/dM is summed here from the codes that are still held, and dL/dc
goes. Everything the cloud sends is checked before it is used. Knows hidden states, codes and their
gradients; no tokens, no labels, no loss. M and dL/dM never leave this process.

Products run on the connection's thread, which computes on one core: their bits do not depend on how
many cores there are. Rows are multiplied as soon as they are there, or the cloud would wait for the last of
them; always in the same blocks of whole sequences, so bits do not depend on how the cloud cuts its messages.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from edge_client.loop_thread import ClosedError
from edge_client.streams import SessionError, Traffic, end, failure
from edge_client.tuning.batch import Batch, Matrices, by_group
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

WIRE_DTYPES = (pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT64)  # see `no_gradients`

T = TypeVar("T")


@dataclass(frozen=True)
class TuneLimits:
    """What the cloud takes: tokens of one batch, and of one sequence (counts)."""

    max_batch_tokens: int
    max_sequence_tokens: int


class ProtocolError(ValueError):
    """Something that the cloud should not have sent."""


class TuneStream:
    """A stream to tune on. Made by `Connection.open_tuning`; used by one thread at a time.

    After any error the stream is of no more use; the batch is to be sent again on a new one.

    Attributes
    ----------
    limits
        What the cloud takes.
    input_gradient
        dL/dx ``(tokens, hidden_size)`` of the last `backward` at the cloud's first layer, for the layers
        below it on this side; None if the plan has none that learn.
    """

    def __init__(
        self,
        call: "grpc.aio.StreamStreamCall[bytes, bytes]",
        loop: asyncio.AbstractEventLoop,
        plan: Plan,
        wire_dtype: "pb.Dtype.ValueType",
        message_timeout_s: float,
        on_close: Callable[["TuneStream"], object],
    ) -> None:
        if wire_dtype not in WIRE_DTYPES:
            raise ValueError(
                f"{no_gradients(wire.dtype_name(wire_dtype))}; use bfloat16 or float32 on the wire"
            )
        self.plan, self.wire_dtype = plan, wire_dtype
        self.traffic = Traffic()
        self.address = ""  # where the cloud is
        self.route: object | None = None  # the channel there
        self.limits = TuneLimits(0, 0)
        self._call, self._loop, self._on_close = call, loop, on_close
        self._timeout_s = message_timeout_s
        self.input_gradient: Tensor | None = None
        self._number = 0
        self._batch: Batch | None = None

    async def open(self, request: pb.TuneOpen, timeout_s: float) -> None:
        """Shake hands on the connection's thread; wait at most ``timeout_s`` for the cloud to be there."""

        async def shake() -> None:
            await self._write(pb.TuneRequest(open=request))
            opened = (await self._read("opened")).opened
            if opened.max_batch_tokens < 1 or opened.max_sequence_tokens < 1:
                raise ProtocolError("it states a limit of 0 tokens")
            self.limits = TuneLimits(opened.max_batch_tokens, opened.max_sequence_tokens)

        patience, self._timeout_s = self._timeout_s, timeout_s
        await self._explained(shake())
        self._timeout_s = patience

    def forward(
        self, hidden: Tensor, lengths: Sequence[int], matrices: Matrices, *, forward_only: bool = False
    ) -> Tensor:
        """Run a batch through the cloud's layers; blocks until hL is back.

        Parameters
        ----------
        hidden
            h0 of the sequences laid end to end: ``(tokens, hidden_size)`` floating point.
        lengths
            Tokens of each sequence; at most `limits` says.
        matrices
            M by owner, not to be changed before `backward` has returned. Codes are
            multiplied in its dtype.
        forward_only
            Whether no `backward` follows.

        Returns
        -------
        Tensor
            hL ``(tokens, hidden_size)`` in the wire dtype, on the CPU.

        Raises
        ------
        SessionError
            If the cloud refuses or breaks the protocol, the connection breaks, or nothing is heard in time.
        """
        if self._batch is not None:
            raise RuntimeError("the batch before has not been run back")
        if hidden.shape != (sum(lengths), self.plan.hidden_size):
            raise ValueError(f"h0 has shape {tuple(hidden.shape)} for sequences of {sum(lengths)} tokens")
        self._number += 1
        batch = Batch(self._number, lengths, matrices)
        found = self._run(self._forward(batch, hidden, forward_only))
        self._batch = None if forward_only else batch
        return found

    def backward(self, gradient: Tensor) -> dict[int, Tensor]:
        """Run the batch of the last `forward` back; blocks until the cloud has let go of it.

        Parameters
        ----------
        gradient
            dL/dhL ``(tokens, hidden_size)``.

        Returns
        -------
        dict
            dL/dM ``(groups, r_c2d, r_d2c)`` by owner, in ascending order, in the dtype of M.

        Raises
        ------
        SessionError
            As `forward`.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("there is no batch to run back")
        return self._run(self._backward(batch, gradient))

    def close(self) -> None:
        """End the stream in order."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(self._timeout_s)

    # --- on the connection's thread from here on --------------------------------------------------------

    async def _close(self) -> None:
        await end(self._call)
        self._on_close(self)

    async def _forward(self, batch: Batch, hidden: Tensor, forward_only: bool) -> Tensor:
        plan = self.plan
        announced = pb.Batch(batch=batch.number, lengths=batch.lengths, forward_only=forward_only)
        await self._write(pb.TuneRequest(batch=announced))
        await self._send(batch, "hidden", 0, hidden)
        for exchange in plan.exchange_layers:
            codes = torch.empty(batch.tokens, plan.codes_width, dtype=batch.dtype)
            z = {layer: codes.new_empty(batch.tokens, plan.residual_width) for layer in plan.fed_by(exchange)}
            async for blocks in self._blocks(batch, "codes", exchange, codes):
                for layer, answer in z.items():
                    for lo, hi in blocks:
                        torch.bmm(
                            by_group(codes[lo:hi], plan), batch.matrices[layer],
                            out=by_group(answer[lo:hi], plan),
                        )  # fmt: skip
                    await self._send(batch, "residual_codes", layer, answer, blocks[0][0], blocks[-1][1])
            if not forward_only:
                batch.codes[exchange] = codes
            self.traffic.round_trips += 1
        found = torch.empty(batch.tokens, plan.hidden_size, dtype=wire.TORCH_DTYPES[self.wire_dtype])
        async for _ in self._rows(batch, "hidden", None, found):
            pass
        self.traffic.round_trips += 1
        if forward_only:
            await self._expect_done(batch)
        return found

    async def _backward(self, batch: Batch, gradient: Tensor) -> dict[int, Tensor]:
        plan = self.plan
        await self._send(batch, "hidden_gradient", 0, gradient)
        gradients = {layer: torch.zeros_like(batch.matrices[layer]) for layer in plan.owners}
        for exchange in reversed(plan.exchange_layers):
            codes = batch.codes.pop(exchange)  # (tokens, groups * r_c2d)
            upstream = torch.zeros_like(codes)  # dL/dc
            lowest, *_ = plan.fed_by(exchange)
            # Below the lowest exchange nothing has anything to learn, unless it is on this side.
            wanted = exchange != plan.exchange_layers[0] or plan.returns_gradient
            for layer in reversed(plan.fed_by(exchange)):
                dz = codes.new_empty(batch.tokens, plan.residual_width)
                async for blocks in self._blocks(batch, "residual_codes_gradient", layer, dz):
                    for lo, hi in blocks:
                        c, g = by_group(codes[lo:hi], plan), by_group(dz[lo:hi], plan)
                        gradients[layer].baddbmm_(c.transpose(1, 2), g)  # (groups, r_c2d, r_d2c)
                        if wanted:
                            by_group(upstream[lo:hi], plan).baddbmm_(g, batch.matrices[layer].transpose(1, 2))
                    if layer == lowest and wanted:
                        await self._send(
                            batch, "codes_gradient", exchange, upstream, blocks[0][0], blocks[-1][1]
                        )
            self.traffic.round_trips += 1
        self.input_gradient = None
        if plan.returns_gradient:
            self.input_gradient = gradient.new_empty(batch.tokens, plan.hidden_size)
            async for _ in self._rows(batch, "hidden_gradient", None, self.input_gradient):
                pass
        await self._expect_done(batch)
        return gradients

    async def _send(
        self, batch: Batch, kind: str, layer: int, tensor: Tensor, start: int = 0, stop: int | None = None
    ) -> None:
        """Send rows of a tensor ``(tokens, width)`` in as many messages as it takes; all by default."""
        row_bytes = tensor.shape[1] * wire.TORCH_DTYPES[self.wire_dtype].itemsize
        count = max(1, wire.ROWS_BYTES // row_bytes)
        stop = batch.tokens if stop is None else stop
        for first in range(start, stop, count):
            request = pb.TuneRequest()
            rows: pb.Rows = getattr(request, kind)
            rows.batch, rows.layer, rows.first = batch.number, layer, first
            wire.fill(rows.rows, tensor[first : min(first + count, stop)], self.wire_dtype)
            await self._write(request)

    async def _blocks(
        self, batch: Batch, kind: str, layer: int, into: Tensor
    ) -> AsyncIterator[list[tuple[int, int]]]:
        """Receive a tensor; yield the blocks ``(first row, end)`` that have become whole, in order."""
        begin, ends = 0, iter(batch.ends)
        end = next(ends)
        async for at in self._rows(batch, kind, layer, into):
            whole = []
            while end <= at:
                whole.append((begin, end))
                begin, end = end, next(ends, batch.tokens + 1)
            if whole:
                yield whole

    async def _rows(self, batch: Batch, kind: str, layer: int | None, into: Tensor) -> AsyncIterator[int]:
        """Receive the next tensor ``(tokens, width)``; yield how many rows are there, message by message.

        ``layer`` None is any.
        """
        what = kind.replace("_", " ") + ("" if layer is None else f" of layer {layer}")
        at = 0
        while at < batch.tokens:
            rows: pb.Rows = getattr(await self._read(kind), kind)
            if rows.batch != batch.number:
                raise ProtocolError(f"{what}: of batch {rows.batch}, expected batch {batch.number}")
            if layer is not None and rows.layer != layer:
                raise ProtocolError(f"{what} should have come, but those of layer {rows.layer} did")
            count = rows.rows.shape[0] if len(rows.rows.shape) == 2 else 0
            if rows.first != at or not 1 <= count <= batch.tokens - at:
                raise ProtocolError(
                    f"{what}: {count} rows from row {rows.first}, expected rows from {at} of {batch.tokens}"
                )
            shape = (count, into.shape[1])
            into[at : at + count] = wire.decode(rows.rows, dtype=self.wire_dtype, shape=shape, what=what)
            at += count
            yield at

    async def _expect_done(self, batch: Batch) -> None:
        done = (await self._read("done")).done
        if done.batch != batch.number:
            raise ProtocolError(f"batch {done.batch} is said to be done, expected batch {batch.number}")

    async def _write(self, request: pb.TuneRequest) -> None:
        raw = request.SerializeToString()
        self.traffic.sent(raw)
        await self._in_time(self._call.write(raw))

    async def _read(self, kind: str) -> pb.TuneResponse:
        """Return the next message, which has to be of ``kind``."""
        raw: Any = await self._in_time(self._call.read())
        if raw is grpc.aio.EOF:
            raise await failure(self._call)
        self.traffic.received(raw)
        try:
            message = pb.TuneResponse.FromString(raw)
        except DecodeError:
            raise ProtocolError(f"{len(raw)} bytes that are no message") from None
        found = message.WhichOneof("message")
        if found != kind:
            raise ProtocolError(f"expected {kind.replace('_', ' ')}, got {(found or 'nothing known')!r}")
        return message

    async def _in_time(self, awaitable: Awaitable[T]) -> T:
        return await asyncio.wait_for(awaitable, self._timeout_s)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work`` on the connection's thread; if it is broken off, so is the stream."""
        if not self._loop.is_running():
            work.close()
            raise ClosedError
        future = asyncio.run_coroutine_threadsafe(self._explained(work), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            self._loop.call_soon_threadsafe(self._call.cancel)
            raise

    async def _explained(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for ``work``; say in words what went wrong."""
        try:
            return await work
        except (ProtocolError, wire.WireError) as broken:
            error = SessionError(f"the cloud broke the protocol: {broken}")
        except asyncio.TimeoutError:  # not the built-in one before 3.11
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            error = SessionError(f"nothing was heard of the cloud for {self._timeout_s:.0f} s", code)
        except SessionError as ended:
            error = ended
        except Exception:
            if not self._call.done():
                raise
            error = await failure(self._call)  # gRPC has private errors too for a stream that broke
        self._call.cancel()
        raise error from None


def no_gradients(name: str) -> str:
    """Return, for messages, why the dtype called ``name`` is not used for tuning."""
    coarse = wire.DTYPE_NAMES.get(name) in wire.ROUNDINGS
    why = "for which it is too coarse" if coarse else "which underflow in it"
    return f"{name} cannot carry gradients, {why}"
