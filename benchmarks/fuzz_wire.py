"""The smaller share of the fuzzing that goes over real gRPC channels to a real cloud process.

What `benchmarks.fuzz_cloud` leaves out is in here: gRPC's own parsing of frames, flow control, several
connections, edges that vanish. The process has to be there at the end, serve an honest stream, hold no KV
byte of those that have left, and be no larger than after a tenth of the cases.
"""

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import grpc

from benchmarks.fuzz_cases import Failure, Tally, finding, generator, sorts
from benchmarks.fuzz_cloud import KINDS, WEIGHTS
from benchmarks.fuzz_context import FORBIDDEN
from benchmarks.fuzz_edges import DecodeEdge, TuneEdge
from benchmarks.fuzz_model import PLANS, save_model
from benchmarks.fuzz_mutation import Corpus, Mutator, corpus_of
from benchmarks.processes import CloudProcess, memory_bytes
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan

SERVICE = "/privatelora.v1.PrivateLoraService/"
LANES = 8
DEADLINE_S = 60.0  # of a case
PATIENCE_S = 0.2  # for an answer that may never come
WARM_UP = 0.1
# How gRPC's client begins to say that it could not send, since the stream had ended: it makes an INTERNAL of
# its own of that, and the status that the cloud gave is lost.
UNSENT = 'Failed "execute_batch"'


class Wire:
    """Cases over channels to one cloud."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.corpus: Corpus = {}
        self.plans: list[tuple[Plan, pb.Fingerprint]] = []

    async def run(self, seed: str, mutated: int, seconds: float, tally: Tally, pid: int) -> dict[str, Any]:
        """Run cases until so many mutants were sent or the time is over; return the process's memory."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with contextlib.AsyncExitStack() as stack:
            channels: list[Any] = [
                await stack.enter_async_context(grpc.aio.insecure_channel(self.address, options=options))
                for _ in range(4)
            ]
            stated = pb.DescribeResponse.FromString(
                await channels[0].unary_unary(SERVICE + "Describe")(b"", wait_for_ready=True)
            )
            self.plans = [(Plan.parse(o.plan_json), o.fingerprint) for o in stated.plans]
            said: list[Any] = [pb.DescribeRequest(), pb.FetchEdgePartsRequest(part_index=1, offset_bytes=9)]
            for method in ("Decode", "Tune"):
                said += await self._stream(
                    channels[0], generator(f"honest/{method}"), method, Tally(), [], honest=True
                )
            self.corpus = corpus_of(said)
            loop = asyncio.get_running_loop()
            began, number, warm = loop.time(), iter(range(1 << 60)), 0

            async def lane(index: int) -> None:
                nonlocal warm
                while tally.mutated < mutated and loop.time() - began < seconds and not tally.findings:
                    case = f"{seed}/{next(number)}"
                    await self._case(channels[index % len(channels)], case, tally)
                    done = max(tally.mutated / mutated, (loop.time() - began) / seconds)
                    if not warm and done > WARM_UP:
                        warm, _ = memory_bytes(pid)

            await asyncio.gather(*(lane(index) for index in range(LANES)))
            await self._stream(channels[0], generator("last"), "Decode", Tally(), [], honest=True)
            await self._settled(channels[0])
            end, _ = memory_bytes(pid)
        return {"rss_warm": warm, "rss_end": end, "growth": round(end / warm - 1, 4) if warm else None}

    async def _settled(self, channel: Any) -> None:
        for _ in range(300):
            raw = await channel.unary_unary(SERVICE + "Describe")(b"")
            if pb.DescribeResponse.FromString(raw).kv_bytes_used == 0:
                return
            await asyncio.sleep(0.1)
        raise Failure("KV bytes are held for nobody")

    async def _case(self, channel: Any, case: str, tally: Tally) -> None:
        rng = generator(case)
        method = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        sent: list[bytes] = []
        tally.cases += 1
        try:
            if method in ("Decode", "Tune"):
                await self._stream(channel, rng, method, tally, sent)
            else:
                await self._call(channel, rng, method, tally, sent)
        except Failure as failure:
            tally.findings.append(finding(f"wire-{method}", case, str(failure), sent))

    async def _call(
        self, channel: Any, rng: random.Random, method: str, tally: Tally, sent: list[bytes]
    ) -> None:
        honest = (
            pb.DescribeRequest()
            if method == "Describe"
            else pb.FetchEdgePartsRequest(part_index=rng.randrange(4))
        )
        sent.append(Mutator(rng, self.corpus)(honest))
        (sort,) = sorts(sent, honest.SerializeToString(), mutated=True)
        tally.count(KINDS[method], sent[-1], sort)
        call = channel.unary_stream(SERVICE + method)(sent[-1], timeout=DEADLINE_S)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        await self._judge(call, tally)

    async def _stream(
        self,
        channel: Any,
        rng: random.Random,
        method: str,
        tally: Tally,
        sent: list[bytes],
        *,
        honest: bool = False,
    ) -> list[Any]:
        """Hold a stream; return what was said if it was honest."""
        plan, fingerprint = rng.choice(self.plans)
        edge = DecodeEdge(rng, plan, fingerprint) if method == "Decode" else TuneEdge(rng, plan, fingerprint)
        mutate, share = Mutator(rng, self.corpus), 0.0 if honest else rng.choice((0.3, 0.6))
        call = channel.stream_stream(SERVICE + method)(timeout=DEADLINE_S)
        said: list[Any] = []
        heard: asyncio.Future[Any] | None = None
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for _ in range(24 if honest else rng.randint(1, 12)):
                while edge.waits():
                    patience = DEADLINE_S if honest else PATIENCE_S
                    heard = asyncio.ensure_future(call.read())
                    done, _ = await asyncio.wait([heard], timeout=patience)
                    if not done or heard.result() is grpc.aio.EOF:
                        break
                    edge.hears(heard.result())
                    heard = None
                else:
                    message = edge.says()
                    said.append(message)
                    right = message.SerializeToString()
                    raw = mutate(message) if rng.random() < share else right
                    sent.append(raw)
                    (sort,) = sorts([raw], right, mutated=True)
                    tally.count(KINDS[method], raw, sort)
                    await call.write(raw)
                    continue
                break
            if rng.random() < 0.3 and not honest:
                call.cancel()
                tally.outcomes["cancelled"] += 1
                await _over(heard)
                return said
            await call.done_writing()
        await _over(heard)
        await self._judge(call, tally)
        if honest and await call.code() is not grpc.StatusCode.OK:
            raise Failure(f"an honest {method} stream ended with {await call.code()}: {await call.details()}")
        return said

    async def _judge(self, call: Any, tally: Tally) -> None:
        while not call.done():  # what is left to be read
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.read()
            await asyncio.sleep(0)
        code = await call.code()
        if code is grpc.StatusCode.INTERNAL and (await call.debug_error_string()).startswith(UNSENT):
            tally.outcomes["ended while a message was sent"] += 1
            return
        if code in FORBIDDEN or code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
            raise Failure(f"answered with {code.name}: {await call.details()}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and "cut off" not in (await call.details() or ""):
            raise Failure(f"hangs: {await call.details()}")
        tally.outcomes[code.name] += 1


async def _over(heard: asyncio.Future[Any] | None) -> None:
    """Wait for a read that was given up: of two at once, one waits for an end that nobody reads on to."""
    if heard is not None:
        await asyncio.wait([heard])
        if not heard.cancelled():
            heard.exception()


def run_wire(folder: Path, seed: str, mutated: int, seconds: float, tally: Tally) -> dict[str, Any]:
    """Start a cloud, fuzz it, stop it; return its memory."""
    arguments = ["--cache-dir", str(folder / "cache"), "--kv-bytes", str(4 << 20), "--grace-period-s", "1"]
    for plan in PLANS:
        arguments += ["--plan", plan]
    arguments += ["--threads", "1", "--log-level", "error"]
    log = folder / "wire.log"
    cloud = CloudProcess(str(save_model(folder / "model")), arguments=arguments, log=log)
    try:
        with cloud as process:
            return asyncio.run(Wire(process.address).run(seed, mutated, seconds, tally, process.pid))
    finally:  # a cloud that has failed most of all has something in its log
        text = cloud.logs()
        if "Traceback" in text or "never retrieved" in text:
            tally.findings.append(finding("wire", f"{seed}/log", f"in the cloud's log: {text[-2000:]}", []))
