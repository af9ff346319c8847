"""One session with the cloud: the stream on which steps go up and hidden states come back.

Answers every exchange with residual codes z = cM as it arrives, on the connection's own thread: the
caller of `step` is woken once a step, not once a layer. Knows hidden states and codes, no tokens.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError  # not the built-in one before 3.11
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from torch import Tensor

from edge_client import claims
from edge_client.affinity import replica_in
from edge_client.chunking import CHUNK_TOKENS
from edge_client.claims import Claim
from edge_client.in_flight import Chunk, InFlight, Job
from edge_client.personal import PersonalWeights
from edge_client.spans import Span, cut
from edge_client.streams import SessionError, Traffic, end, failure
from edge_client.wire_cost import widest_row
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.wire_dtypes import WireDtypes

MAX_TENSOR_BYTES = 4 * 2**20 - 2**16  # gRPC's cap on a message, less room for everything else


@dataclass(frozen=True)
class Resumed:
    """What a session that was picked up again still holds.

    ``row_lengths`` are the positions in each of its rows; ``began`` says whether the cloud had begun the
    step that was lost, and so moved the rows as that step asked.
    """

    row_lengths: tuple[int, ...]
    began: bool


class Session:
    """A stream to the cloud. Made by `Connection.open_session`; used by one thread at a time."""

    def __init__(
        self,
        call: "grpc.aio.StreamStreamCall[bytes, bytes]",
        loop: asyncio.AbstractEventLoop,
        personal: PersonalWeights,
        wire_dtypes: WireDtypes,
        limits: pb.Limits,
        step_timeout_s: float,
        on_close: Callable[["Session"], object],
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.personal, self.plan, self.wire_dtypes = personal, personal.plan, wire_dtypes
        self._groups = self.plan.groups
        self.traffic = Traffic()
        self.id = b""
        self.address = ""  # where the cloud is
        self.route: object | None = None  # the channel there
        self.replica: str | None = None  # which one there, see `edge_client.affinity`
        self.error: SessionError | None = None
        self._call, self._loop, self._on_close = call, loop, on_close
        self._step_timeout_s = step_timeout_s
        # Whatever a chunk's positions travel in has to fit a message, hL of all of them too.
        upfront = personal.first is not None
        fits = MAX_TENSOR_BYTES // widest_row(self.plan, wire_dtypes, upfront=upfront)
        self.chunk_tokens = max(1, min(chunk_tokens, limits.max_step_tokens, fits))  # most in one message
        first = -1 if personal.first is None else personal.first.layer
        self._in_flight = InFlight(max(1, limits.max_steps_in_flight), first)
        self._number = 0
        self._step_number = 0  # of the last step's first chunk
        self._claimed: Claim | None = None  # what the cloud was last told that rows may come to need
        self._outbox: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._writing = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, request: pb.Open) -> Resumed:
        """Shake hands; then read and write until the session ends."""
        try:
            await self._send(pb.DecodeRequest(open=request).SerializeToString())
            raw = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await failure(self._call) from None
        if raw is grpc.aio.EOF:
            raise await failure(self._call)
        message = self._parse(raw)
        if not message.HasField("opened") or not 1 <= len(message.opened.session_id) <= 64:
            raise SessionError(
                "the cloud did not answer the handshake with a session; is it a PrivateLoRA cloud?"
            )
        self.replica = replica_in(await self._call.initial_metadata()) or self.replica
        self.id, self.error = message.opened.session_id, None
        self._tasks = [self._loop.create_task(self._read_all()), self._loop.create_task(self._write_all())]
        opened = message.opened
        return Resumed(tuple(opened.row_lengths), 0 < self._step_number <= opened.last_step)

    async def rebind(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        """Let go of a stream that was lost, and whatever is under way; `open` goes on with another."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._fail(SessionError("the stream was lost", grpc.StatusCode.UNAVAILABLE))
        self._outbox.clear()
        self._tasks, self._call = [], call
        self._claimed = None  # the step that said so may never have arrived

    def step(self, hidden: Tensor, spans: Sequence[Span], parents: Sequence[int] | None = None) -> Tensor:
        """Run new positions through the cloud's layers; blocks until hL is back.

        Parameters
        ----------
        hidden
            h0 of the spans laid end to end: ``(tokens, hidden_size)`` floating point.
        spans
            Which rows and positions. A start below a row's length crops the row.
        parents
            Old row that each new row continues; None leaves the rows as they are.

        Returns
        -------
        Tensor
            hL of the kept positions, span after span: ``(sum of keep, hidden_size)`` in the wire dtype of
            hidden states (float32 if that is int8).

        Raises
        ------
        SessionError
            If the cloud refuses, the connection breaks, or no answer comes in time.
        """
        return self.wait(self.submit(hidden, spans, parents))

    def wait(self, job: Job) -> Tensor:
        """Return hL of what was submitted; raises as `step` does."""
        try:
            return job.future.result(self._step_timeout_s)
        except FutureTimeoutError:
            self.cancel()
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise SessionError(f"no answer within {self._step_timeout_s:g} s", code) from None

    async def step_async(
        self, hidden: Tensor, spans: Sequence[Span], parents: Sequence[int] | None = None
    ) -> Tensor:
        """Do as `step` does, from a coroutine of any event loop."""
        return await asyncio.wrap_future(self.submit(hidden, spans, parents).future)

    def submit(
        self,
        hidden: Tensor,
        spans: Sequence[Span],
        parents: Sequence[int] | None,
        *,
        goes_on: bool = False,
    ) -> Job:
        """Cut a step into chunks and start it.

        Chunks follow each other through the layers, so that the edge answers one while the cloud runs
        the next. ``goes_on``: these are further positions of the step that was submitted before.
        """
        chunks: deque[Chunk] = deque()
        claim, at = claims.present(), 0
        if not goes_on:
            self._step_number = self._number + 1
        for piece in cut(spans, self.chunk_tokens):
            tokens, keep = sum(s.count for s in piece), sum(s.keep for s in piece)
            self._number += 1
            request = pb.DecodeRequest()
            message = request.step
            message.step = self._number
            if claim is not None and claim is not self._claimed:  # once an answer: it lapses in between
                message.claim.CopyFrom(claim.message())
                self._claimed = claim
            message.parents.extend(parents or ())
            message.spans.extend(pb.Span(row=s.row, start=s.start, count=s.count, keep=s.keep) for s in piece)
            wire.fill(message.hidden, hidden[at : at + tokens], self.wire_dtypes.hidden)
            for layer, codes in self.personal.upfront(hidden[at : at + tokens]).items():
                answer = message.residual_codes.add()
                answer.layer = layer
                wire.fill_array(answer.codes, codes, self.wire_dtypes.residual_codes, self._groups)
            chunks.append(Chunk(request.SerializeToString(), self._number, tokens, keep))
            parents, at = None, at + tokens
        job = Job(chunks)
        if self.error is not None:  # closed for good, it may be that nobody runs the loop any more
            job.future.set_exception(self.error)
            return job
        self._loop.call_soon_threadsafe(self._start, job)
        return job

    def cancel(self) -> None:
        """Give up what is in flight. The next step must start where the given-up one did, or before."""
        self._loop.call_soon_threadsafe(self._in_flight.give_up)

    def abandon(self) -> None:
        """Break the stream off without waiting for anybody; the cloud may still hold the session."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._call.cancel)

    def close(self) -> None:
        """End the session in order: its KV cache is freed at once."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(self._step_timeout_s)

    # --- on the connection's thread from here on --------------------------------------------------------

    def _start(self, job: Job) -> None:
        if self.error is not None:
            job.future.set_exception(self.error)
            return
        self._in_flight.add(job)
        self._launch()

    def _launch(self) -> None:
        """Send chunks as far as the cloud takes steps in flight."""
        if raws := self._in_flight.launch():
            self._outbox.extend(raws)
            self._filled.set()

    async def _write_all(self) -> None:
        try:
            while True:
                await self._write_waiting()
                self._filled.clear()
                await self._filled.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader hears of it too, with the reason

    async def _write_waiting(self) -> None:
        """Send what waits, unless somebody else is at it."""
        if self._writing:
            return
        self._writing = True
        try:
            while self._outbox:
                await self._send(self._outbox.popleft())
        finally:
            self._writing = False

    async def _send(self, raw: bytes) -> None:
        self.traffic.sent(raw)
        await self._call.write(raw)

    async def _read_all(self) -> None:
        try:
            while True:
                raw = await self._call.read()
                if raw is grpc.aio.EOF:
                    break
                self._handle(self._parse(raw))
                if len(self._in_flight) == 1:  # nothing comes before this is answered: no other task needed
                    await self._write_waiting()
                elif self._outbox:
                    self._filled.set()
            error = await failure(self._call)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            error = await failure(self._call)
        except (SessionError, wire.WireError) as broken:
            error = SessionError(f"the cloud broke the protocol: {broken}")
            self._call.cancel()
        except Exception as fault:  # whoever waits for a step must hear of it, whatever it is
            error = SessionError(
                f"an exchange failed on this side ({type(fault).__name__}); please report it"
            )
            error.__cause__ = fault
            self._call.cancel()
        self._fail(error)

    def _parse(self, raw: object) -> pb.DecodeResponse:
        assert isinstance(raw, bytes)
        self.traffic.received(raw)
        try:
            return pb.DecodeResponse.FromString(raw)
        except DecodeError:
            raise SessionError(f"{len(raw)} bytes that are no message") from None

    def _handle(self, message: pb.DecodeResponse) -> None:
        if message.HasField("codes"):
            self._exchange(message.codes)
        elif message.HasField("hidden"):
            self._finish(message.hidden)
        else:
            raise SessionError("expected codes or hidden states")

    def _exchange(self, message: pb.Codes) -> None:
        """Answer codes xA with residual codes xAM."""
        flight = self._in_flight.get(message.step)
        if flight is None:
            self._expect_given_up(message.step)
            return
        if message.layer not in self.plan.exchange_layers:
            raise SessionError(f"codes for layer {message.layer}, which does not exchange in this plan")
        if message.layer <= flight.layer:  # or a cloud could ask without end what M makes of anything
            raise SessionError(f"codes for layer {message.layer} after those of layer {flight.layer}")
        shape = (flight.tokens, self.plan.codes_width)
        dtypes, groups = self.wire_dtypes, self._groups
        codes = wire.decode_array(message.codes, dtype=dtypes.codes, shape=shape, what="codes", groups=groups)
        request = pb.DecodeRequest()
        request.residual_codes.step = message.step
        for layer in self.plan.fed_by(message.layer):
            answer = request.residual_codes.residual_codes.add()
            answer.layer = layer
            z = self.personal.residual_codes(layer, codes)
            wire.fill_array(answer.codes, z, dtypes.residual_codes, groups)
        flight.layer = message.layer
        self.traffic.round_trips += 1
        self._outbox.append(request.SerializeToString())

    def _finish(self, message: pb.Hidden) -> None:
        flight = self._in_flight.get(message.step)
        if flight is None:
            self._expect_given_up(message.step)
            return
        shape = (flight.keep, self.plan.hidden_size)
        hidden = wire.decode(message.hidden, dtype=self.wire_dtypes.hidden, shape=shape, what="hidden")
        self.traffic.round_trips += 1
        self._in_flight.land(message.step, hidden)  # only now: if that was refused, its job must hear of it
        self._launch()

    def _expect_given_up(self, number: int) -> None:
        if number > self._number:
            raise SessionError(f"an answer to step {number}, which was never sent")

    def _fail(self, error: SessionError) -> None:
        self.error = error
        self._in_flight.fail(error)

    async def _close(self) -> None:
        self._fail(SessionError("the session was closed"))
        await end(self._call)  # first: to cancel a read breaks the stream, and the cloud keeps its memory
        for task in self._tasks:
            task.cancel()
        self._on_close(self)
