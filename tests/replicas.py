"""Clouds in this process behind real gRPC, that a test may kill, restart, freeze or drain at any moment.

Backbone, engine, service and streams are those that serve; only the process around them is missing, so a
replica starts in milliseconds. `Fleet` builds the model once and hands out replicas of it.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import torch

from benchmarks.ports import free_port
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.plans import PlanConfig
from cloud_server.engine import Engine
from cloud_server.housekeeping import housekeeping
from cloud_server.kv_cache import KvCache
from cloud_server.server import SERVER_OPTIONS, build_service
from cloud_server.service import Service
from edge_client.connection import Timeouts
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter

T = TypeVar("T")
TIMEOUT_S = 600.0  # only what hangs takes as long, however slow the machine
PATIENCE = Timeouts(connect_s=TIMEOUT_S, step_s=TIMEOUT_S, recover_s=TIMEOUT_S)
PLANS = (
    PlanConfig(name="r8", r_c2d=8, r_d2c=8),
    PlanConfig(name="ends", r_c2d=7, r_d2c=5, head_layers=1, tail_layers=1, lora_rank=3, layers=(1, 2)),
    PlanConfig(name="trip", r_c2d=6, r_d2c=4, one_trip=True, lora_rank=2),
)


class Fleet:
    """A thread that serves replicas of one model, until `close`."""

    def __init__(self, model: Path, cache_dir: Path, **config: Any) -> None:
        torch.set_num_threads(1)
        self.config = CloudConfig(
            model=str(model), cache_dir=cache_dir, kv_bytes=16 << 20, plans=PLANS,
            **{"grace_period_s": TIMEOUT_S, "drain_timeout_s": TIMEOUT_S} | config,
        )  # fmt: skip
        self.built = build_service(self.config)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.replicas: list[Replica] = []

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the fleet's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def replica(self, **config: Any) -> "Replica":
        """Start one more replica."""
        self.replicas.append(Replica(self, self.config.model_copy(update=config)))
        self.replicas[-1].start()
        return self.replicas[-1]

    def stop_all(self) -> None:
        """Kill every replica."""
        while self.replicas:
            self.replicas.pop().kill()

    def close(self) -> None:
        """End the thread."""
        self.stop_all()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Replica:
    """One server. What it knows is lost when it is killed; its address is not."""

    def __init__(self, fleet: Fleet, config: CloudConfig) -> None:
        self.fleet, self.config = fleet, config
        self.address = f"127.0.0.1:{free_port()}"
        self.service: Service
        self.opened = 0  # streams that were opened, over all its lives
        self.steps = 0  # steps that have come, over all its lives
        self.before_step: Callable[[int], object] = lambda number: None  # called on the fleet's thread
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Serve, with no memory of any session."""
        self.fleet.call(self._start())

    async def _start(self) -> None:
        built, config = self.fleet.built, self.config
        backbone = built.engine.backbone
        cache = KvCache(backbone.geometry, backbone.served, config.kv_bytes, backbone.dtype, backbone.device)
        engine = Engine(backbone, cache, config.engine)
        self.service = Service(config, engine, built.offers, built.edge_parts, built.limits)
        submit, open_ = engine.submit, self.service.reception.open

        def counted(step: Any) -> None:
            self.steps += 1
            submit(step)
            self.before_step(self.steps)

        def noted(message: Any) -> Any:
            session = open_(message)
            self.opened += 1
            return session

        engine.submit, self.service.reception.open = counted, noted  # type: ignore[method-assign]
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self.service.handlers(),))
        assert self._server.add_insecure_port(self.address)
        self._tasks = [asyncio.ensure_future(work) for work in (engine.serve(), housekeeping(self.service))]
        await self._server.start()

    def kill(self) -> None:
        """End at once, as a crash would."""
        self.fleet.call(self.die())

    async def die(self) -> None:
        """Do as `kill`, from the fleet's thread."""
        server, self._server = self._server, None
        if server is not None:
            for task in self._tasks:
                task.cancel()
            await server.stop(0)

    def kill_soon(self) -> None:
        """Do as `kill` from the fleet's own thread, without waiting."""
        self.fleet.loop.create_task(self.die())

    def restart(self) -> None:
        """Kill and start again at the same address."""
        self.kill()
        self.start()

    def break_streams(self) -> None:
        """Cut every stream, as a lost connection would; sessions are held."""

        async def cut() -> None:
            for session in list(self.service.sessions.values()):
                if session.dropped_at is None:
                    session.cut_off("a test cut it off")

        self.fleet.call(cut())

    def drain(self) -> None:
        """Tell everybody to move, then stop."""

        async def leave() -> None:
            await self.service.drain.run(self.service, self.config.drain_timeout_s)
            await self.die()

        self.fleet.call(leave())

    @property
    def kv_used(self) -> int:
        return self.service.engine.cache.bytes_used


def edge(
    cloud: str, folder: Path, plan: str = "r8", timeouts: Timeouts = PATIENCE, **options: Any
) -> PrivateLoraForCausalLM:
    """Return a model at these addresses, with an M that is not zero."""
    model = PrivateLoraForCausalLM.from_cloud(
        cloud, plan=plan, cache_dir=folder, config_dir=folder, timeouts=timeouts, **options
    )
    model.set_adapter(Adapter.random(model.adapter.plan, model.adapter.fingerprint, seed=3, std=0.5))
    return model
