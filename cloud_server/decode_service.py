"""The gRPC face of decoding: the stream of one session, from its first message to its end.

What comes is read, one message at a time, and handed to the session; what the session has to say is written
beside that. An edge that does not read, or that is cut off from elsewhere, is told why if it still listens.
However the stream ends, the session leaves the roster or is held there, unless another stream has picked it
up. Checks of what a message says are `cloud_server.session`'s matter.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import cast

import grpc

from cloud_server.allowance import Allowances
from cloud_server.drain import Drain
from cloud_server.logs import shown
from cloud_server.memory import is_out_of_memory
from cloud_server.reception import Reception
from cloud_server.refusal import Refusal, invalid, no_memory
from cloud_server.roster import Roster
from cloud_server.session import Session
from cloud_server.streams import BROKEN_NOTICE_S, Context, Traffic, abort, begin, first, log_refusal, read
from shared.pb.privatelora.v1 import private_lora_pb2 as pb


class DecodeService:
    """Everything behind ``Decode``.

    Parameters
    ----------
    reception
        Where streams get their sessions.
    roster
        Where they leave them.
    allowances
        What each identity may use.
    drain
        Whether the server is at its end.
    patience_s
        How long an edge may take to say its first word, and to read a message (seconds).
    """

    def __init__(
        self, reception: Reception, roster: Roster, allowances: Allowances, drain: Drain, patience_s: float
    ) -> None:
        self.reception, self.roster, self.allowances, self.drain = reception, roster, allowances, drain
        self.patience_s, self.traffic = patience_s, Traffic()

    async def decode(self, _: AsyncIterator[bytes], context: Context) -> None:
        """Serve one session until its stream ends."""
        handler = cast("asyncio.Task[None]", asyncio.current_task())
        session: Session | None = None
        writer: asyncio.Task[None] | None = None
        finished = False
        farewell: Refusal | None = None

        def cut_off(reason: str | Refusal) -> None:
            nonlocal farewell
            if isinstance(reason, str):
                words = f"{reason} and was cut off; open a new session and replay"
                reason = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, words, reason="cut_off")
            farewell = reason
            handler.cancel()

        try:
            session = await self.reception.let_in(
                await first(pb.DecodeRequest, context, self.traffic, self.patience_s)
            )
            session.cut_off = cut_off
            allowance = self.allowances.of(session.caller.name)
            await begin(context)
            writer = asyncio.create_task(self._write(session, context))
            writer.add_done_callback(lambda done: done.cancelled() or handler.cancel())
            while not finished:
                if session.outbox.is_full:
                    await session.outbox.has_room()  # or an edge that does not read fills our memory
                message = await read(pb.DecodeRequest, context, self.traffic)
                session.heard_at = time.monotonic()
                if message is None:
                    await asyncio.sleep(BROKEN_NOTICE_S)
                    finished = True
                elif message.HasField("residual_codes"):
                    session.answer(message.residual_codes)
                    if len(session.engine.steps) == 1:
                        # The engine first, then its codes on their way: to start the next read takes a while.
                        await asyncio.sleep(0)
                        await asyncio.sleep(0)
                elif message.HasField("step"):
                    self.drain.check()
                    if message.step.HasField("claim"):
                        await self.roster.admission.claim(session, self.reception.blocks(message.step.claim))
                    await allowance.pause()
                    self.drain.check()  # it may have begun meanwhile
                    session.step(message.step)
                elif message.HasField("open"):
                    raise invalid(
                        "open is the first message, and only the first; this session is open already"
                    )
                else:
                    raise invalid("an empty message: expected a step or residual codes")
        except Refusal as refusal:
            if refusal.reason == "kv":
                refusal.retry_after_s = self.roster.admission.hint_s()
            log_refusal("session", refusal, session=None if session is None else shown(session.id))
            await abort(context, refusal)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            lacking = no_memory("this message")
            log_refusal("session", lacking, session=None if session is None else shown(session.id))
            await abort(context, lacking)
        except asyncio.CancelledError:
            if farewell is None or session is None:
                raise
            if session.cut_off is cut_off:  # else another stream has picked it up
                self.roster.leave(session, finished)  # before the farewell, which may wait for the edge too
            log_refusal("session", farewell, session=shown(session.id))
            session = None
            await self._say_goodbye(context, farewell)
            raise
        finally:
            if writer is not None:
                writer.cancel()
            if session is not None and session.cut_off is cut_off:
                self.roster.leave(session, finished)

    async def _say_goodbye(self, context: Context, farewell: Refusal) -> None:
        """Tell an edge why it is cut off, in case that it reads after all."""
        with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
            await asyncio.wait_for(abort(context, farewell), self.patience_s)

    async def _write(self, session: Session, context: Context) -> None:
        """Send what the session has to say; an edge that does not read is cut off."""
        loop, patience = asyncio.get_running_loop(), self.patience_s
        outbox = session.outbox  # of this stream: another may pick the session up
        while True:
            raw = (await outbox.get()).SerializeToString()
            timer = loop.call_later(
                patience, session.cut_off, f"the edge read nothing for {patience:g} seconds"
            )
            await context.write(raw)
            timer.cancel()
            self.traffic.sent(raw)
