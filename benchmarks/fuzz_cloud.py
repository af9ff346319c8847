"""Mutated messages against a whole cloud in this process: Decode, Tune, FetchEdgeParts and Describe.

The real service, guard, engine and backbone of a tiny random model run on this process's event loop; only
gRPC itself is left out (`benchmarks.fuzz_wire` has it), which makes a thousand messages a second out of a
hundred. Several streams are under way at a time and fight over a KV cache, sessions and memory that are too
small for them. Now and then all of them end, and then nothing of theirs may be left; an honest stream must be
served.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from benchmarks.fuzz_bytes import damaged
from benchmarks.fuzz_cases import MOST_FINDINGS, Failure, Tally, finding, generator, sorts, words
from benchmarks.fuzz_context import DEADLINE_S, PATIENCE_S, StreamContext, ended, quiet, stack, taken
from benchmarks.fuzz_edges import DecodeEdge, TuneEdge
from benchmarks.fuzz_model import cloud_config, save_model
from benchmarks.fuzz_mutation import Mutator, corpus_of
from cloud_server import tokens
from cloud_server.guard import Guard
from cloud_server.housekeeping import housekeeping
from cloud_server.server import build_service
from cloud_server.service import SERVICE_NAME, Service
from cloud_server.tokens import TokenBook
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

LANES = 40  # streams at a time
EPOCH = 4000  # cases between two looks at what is left
MOST_TURNS = 14
KINDS: dict[str, type[Message]] = {
    "Describe": pb.DescribeRequest,
    "FetchEdgeParts": pb.FetchEdgePartsRequest,
    "Decode": pb.DecodeRequest,
    "Tune": pb.TuneRequest,
}
WEIGHTS = {"Decode": 35, "Tune": 25, "FetchEdgeParts": 34, "Describe": 6}
Handler: TypeAlias = Callable[[Any, Any], Any]
Edge: TypeAlias = DecodeEdge | TuneEdge


class Cloud:
    """A service on this event loop; make one with `running`."""

    def __init__(self, service: Service, names: dict[str, str], handlers: dict[str, Handler]) -> None:
        self.service, self.names, self.handlers = service, names, handlers
        self.dropped: deque[tuple[bytes, bytes]] = deque(maxlen=8)  # session id and plan digest
        self.corpus: dict[str, list[Message]] = {}
        self.complaints: list[str] = []  # of the event loop
        self.tasks: list[asyncio.Task[None]] = []
        self.offers = list(service.offers.values())
        self.fingerprints = [
            pb.Fingerprint(root=f.root, **f.branches()) for f in (o.fingerprint for o in self.offers)
        ]

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator["Cloud"]:
        """Serve a tiny model that is made in ``folder``, until the block ends."""
        book = folder / "tokens.json"
        names = {name: tokens.add(book, name) for name in ("alice", "bob")} if not book.exists() else {}
        config = cloud_config(save_model(folder / "model"), folder)
        service = build_service(config, Guard(TokenBook(book)), progress=False)
        handlers = {}
        for method in KINDS:
            details: Any = SimpleNamespace(method=f"/{SERVICE_NAME}/{method}", invocation_metadata=())
            plain = service.handlers().service(details)

            async def continuation(_: Any, found: Any = plain) -> Any:
                return found

            guarded = await service.guard.intercept_service(continuation, details)
            handlers[method] = guarded.stream_stream
        cloud = cls(service, names, handlers)
        asyncio.get_running_loop().set_exception_handler(cloud._complain)
        work = (service.engine.serve(), housekeeping(service), service.guard.watch())
        cloud.tasks = [asyncio.create_task(coroutine) for coroutine in work]
        try:
            await cloud.capture()
            yield cloud
        finally:
            for task in cloud.tasks:
                task.cancel()
            await asyncio.gather(*cloud.tasks, return_exceptions=True)

    def _complain(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, grpc.aio.AbortError):
            self.complaints.append(f"{context.get('message')}: {words(error) if error else context}")

    # --- one case -----------------------------------------------------------------------------------------

    def metadata(self, rng: random.Random, share_wrong: float) -> list[tuple[str, str]]:
        """Return what a caller shows: a good token, but for a share."""
        good = ("authorization", f"Bearer {rng.choice(list(self.names.values()))}")
        if rng.random() >= share_wrong:
            return [good]
        wrong = damaged(rng, good[1].encode()).decode("latin-1")
        return rng.choice(([], [good, good], [("authorization", wrong)], [("authorization", wrong * 50)]))

    def edge(self, rng: random.Random, method: str) -> Edge:
        """Return an edge for a stream; one in six picks a dropped session up."""
        at = rng.randrange(len(self.offers))
        plan, fingerprint = self.offers[at].plan, self.fingerprints[at]
        if method == "Tune":
            return TuneEdge(rng, plan, fingerprint)
        found = [sid for sid, digest in self.dropped if digest == fingerprint.plan or rng.random() < 0.1]
        return DecodeEdge(rng, plan, fingerprint, rng.choice(found) if found and rng.random() < 0.2 else b"")

    async def call(self, rng: random.Random, method: str, tally: Tally, sent: list[bytes]) -> str:
        """Make one unary call; return how it ended."""
        honest: Message = pb.DescribeRequest(protocol_version=1)
        if method == "FetchEdgeParts":
            parts = self.service.edge_parts
            index = rng.randrange(len(parts))
            honest = pb.FetchEdgePartsRequest(part_index=index, offset_bytes=rng.randrange(parts[index].size))
        sent.append(Mutator(rng, self.corpus)(honest))
        context = StreamContext(self.metadata(rng, 0.02))
        try:
            return await self.unary(method, sent[-1], context)
        finally:
            (sort,) = sorts(sent, honest.SerializeToString(), mutated=True)
            if context.taken:
                tally.count(KINDS[method], sent[-1], sort)

    async def unary(self, method: str, raw: bytes, context: StreamContext) -> str:
        """Serve one unary call."""
        context.send(raw)
        context.end()
        task = asyncio.ensure_future(self.handlers[method](None, context))
        await ended(task)
        return context.outcome(task, was_cancelled=False)

    async def stream(
        self, rng: random.Random, method: str, tally: Tally, sent: list[bytes], *, honest: bool = False
    ) -> str:
        """Hold one stream whose messages are mutated; return how it ended."""
        edge, mutate = self.edge(rng, method), Mutator(rng, self.corpus)
        share = 0.0 if honest else rng.choice((0.3, 0.6, 0.9))
        share_first = (
            0.0 if honest else 0.45
        )  # what is deep inside a stream is reached by a right beginning only
        context = StreamContext(
            self.metadata(rng, 0 if honest else 0.02), reads=honest or rng.random() > 0.002
        )
        task = asyncio.ensure_future(self.handlers[method](None, context))
        changed = asyncio.Event()
        context.on_change = changed.set
        task.add_done_callback(lambda _: changed.set())
        turns = 20 if honest else rng.randint(1, MOST_TURNS)
        held: bytes | None = None
        for turn in range(turns):
            patience_s = DEADLINE_S if honest else PATIENCE_S
            in_time = await quiet(context, task, changed, edge, patience_s)
            if task.done():
                break
            if honest and not in_time:
                raise Failure(f"an honest {method} stream is not answered: {stack(task)}")
            message = edge.says()
            right, mutated = message.SerializeToString(), False
            raws = [right]
            if rng.random() < (share if turn else share_first):
                match rng.randrange(12):
                    case 0:
                        raws *= rng.choice((2, 2, 5))
                    case 1:
                        raws = []  # never said
                    case 2 if held is None:
                        held, raws = raws[0], []  # said later
                    case 3:
                        other = rng.choice(self.corpus[KINDS[method].DESCRIPTOR.full_name])
                        raws = [other.SerializeToString()]
                    case 4 if sent:
                        raws.append(rng.choice(sent))  # said again
                    case _:
                        raws, mutated = [mutate(message)], True
            elif held is not None:
                raws, held = [held, *raws], None
            for raw, sort in zip(raws, sorts(raws, right, mutated=mutated), strict=True):
                sent.append(raw)
                before = len(context.taken)
                context.send(raw)
                await taken(context, task, changed)
                if len(context.taken) > before:
                    tally.count(KINDS[method], raw, sort)
        was_cancelled = not task.done() and not honest and rng.random() < 0.4
        if was_cancelled:
            context.end()  # as gRPC does: the requests of a lost call end, then its handler is cancelled
            await asyncio.sleep(0)
            task.cancel()
            if isinstance(edge, DecodeEdge) and edge.session_id:
                at = [o.plan for o in self.offers].index(edge.plan)
                self.dropped.append((edge.session_id, self.fingerprints[at].plan))
        else:
            context.end()
        await ended(task)
        outcome = context.outcome(task, was_cancelled=was_cancelled)
        if honest and outcome != "OK":
            raise Failure(f"an honest {method} stream ended with {outcome}: {context.details}")
        return outcome

    async def replay(self, method: str, inputs: list[bytes]) -> str:
        """Say the same once more, alone; return how it ended."""
        metadata = [("authorization", f"Bearer {self.names['alice']}")]
        if method in ("Describe", "FetchEdgeParts"):
            return await self.unary(method, inputs[0], StreamContext(metadata))
        context = StreamContext(metadata)
        task = asyncio.ensure_future(self.handlers[method](None, context))
        changed = asyncio.Event()
        context.on_change = changed.set
        for raw in inputs:
            context.send(raw)
            await asyncio.sleep(4 * PATIENCE_S)
        context.end()
        await ended(task)
        return context.outcome(task, was_cancelled=False)

    # --- many cases ---------------------------------------------------------------------------------------

    async def capture(self) -> None:
        """Hold honest streams, and keep what was said as the corpus."""
        said: list[Message] = []
        for number in range(6 * len(self.offers)):
            for method in ("Decode", "Tune"):
                sent: list[bytes] = []
                await self.stream(generator(f"honest/{number}"), method, Tally(), sent, honest=True)
                said += [KINDS[method].FromString(raw) for raw in sent]
        said += [
            pb.DescribeRequest(protocol_version=1),
            pb.FetchEdgePartsRequest(part_index=1, offset_bytes=5),
        ]
        self.corpus = corpus_of(said)

    async def run(self, seed: str, mutated: int, seconds: float, tally: Tally) -> None:
        """Run cases until so many mutated messages were taken, or the time is over."""
        until, number = time.monotonic() + seconds, 0
        while tally.mutated < mutated and time.monotonic() < until and len(tally.findings) < MOST_FINDINGS:
            numbers = iter(range(number, number + EPOCH))
            number += EPOCH

            async def lane(left: Any = numbers) -> None:
                for at in left:
                    if tally.mutated >= mutated or time.monotonic() > until:
                        return
                    await self._case(f"{seed}/{at}", tally)

            await asyncio.gather(*(lane() for _ in range(LANES)))
            await self.check_idle(seed, number, tally)

    async def _case(self, case: str, tally: Tally) -> None:
        rng = generator(case)
        method = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        sent: list[bytes] = []
        act: Callable[..., Coroutine[Any, Any, str]] = (
            self.stream if method in ("Decode", "Tune") else self.call
        )
        tally.cases += 1
        try:
            tally.outcomes[await act(rng, method, tally, sent)] += 1
        except Failure as failure:
            tally.findings.append(finding(f"cloud-{method}", case, str(failure), sent))
        except Exception as error:
            what = f"the fuzzing itself failed: {words(error)}"
            tally.findings.append(finding(f"cloud-{method}", case, what, sent))

    async def check_idle(self, seed: str, number: int, tally: Tally) -> None:
        """Look whether anything is left of streams that have all ended, and whether the cloud serves."""
        try:
            await self.check(f"{seed}/{number}")
        except Failure as failure:
            tally.findings.append(finding("cloud", f"{seed}/{number}", str(failure), []))

    async def check(self, seed: str) -> None:
        """Do as `check_idle` says.

        Raises
        ------
        Failure
            If something is left, has died, or was complained of.
        """
        problems = list(self.complaints)
        self.complaints.clear()
        self.dropped.clear()
        deadline = time.monotonic() + DEADLINE_S
        while (left := self._left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        problems += [f"left over when all streams had ended: {', '.join(left)}"] if left else []
        for task in self.tasks:
            if task.done():
                error = None if task.cancelled() else task.exception()
                problems.append(f"the cloud has died: {words(error) if error else 'cancelled'}")
        if problems:
            raise Failure("; ".join(problems))
        for method in ("Decode", "Tune"):
            await self.stream(generator(seed), method, Tally(), [], honest=True)

    def _left(self) -> list[str]:
        s = self.service
        counts = {
            "sessions": len(s.sessions),
            "KV bytes": s.engine.cache.bytes_used,
            "steps": len(s.engine.steps) + len(s.engine.ready),
            "tuning streams": len(s.tuning.sessions),
            "tuning bytes": s.tuning.budget.used,
            "tuning jobs": len(s.tuning.queue._jobs),
            "fetches": s.part_service.under_way,
            "calls": len(s.guard._calls),
        }
        return [f"{count} {what}" for what, count in counts.items() if count]
