"""Puts a server together: model, plans, engine, service, gRPC, and their orderly end."""

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from cloud_server.addresses import cannot_listen, check_addresses
from cloud_server.backbone import Backbone
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.plans import PlanConfig
from cloud_server.descriptors import make_room
from cloud_server.drain import FAREWELL_S
from cloud_server.engine import Engine
from cloud_server.exposure import check_exposure
from cloud_server.guard import Guard
from cloud_server.handshake import Offer
from cloud_server.housekeeping import housekeeping
from cloud_server.kv_cache import KvCache
from cloud_server.logs import event, warning
from cloud_server.memory import available_bytes, needing_memory, share_one_heap
from cloud_server.metrics import DRAINS, open_metrics
from cloud_server.parallel_children import check_parallel, place_of, set_threads
from cloud_server.parallel_start import lead
from cloud_server.probes import open_probes
from cloud_server.service import SERVICE_NAME, Service
from cloud_server.session import Limits
from cloud_server.tls import TlsFiles
from cloud_server.tokens import TokenBook
from shared import edge_parts, fingerprint, lowrank, models
from shared.checkpoint import Checkpoint
from shared.lowrank import LowRank
from shared.plan import Plan

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 << 20  # gRPC's own default; steps are bounded to fit, so it is never lifted

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers on one port would silently share its clients
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),  # of one connection
    ("grpc.keepalive_time_ms", 30_000),  # an edge that is gone without a word is noticed
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # or edges that ping are sent away
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.bdp_probe", 0),  # its pings delay exchanges; a fixed window does instead
    ("grpc.http2.lookahead_bytes", 2 << 20),  # more than 100 Mbit/s x 80 ms has under way
)


def plan_of(config: PlanConfig, checkpoint: Checkpoint) -> Plan:
    """Return the plan that ``config`` describes for this model."""
    g = checkpoint.geometry
    facts: dict[str, Any] = {
        "name": config.name,
        "backbone": checkpoint.id,
        "num_layers": g.num_layers,
        "hidden_size": g.hidden_size,
        "r_c2d": config.r_c2d,
        "r_d2c": config.r_d2c,
        "layout": config.layout,
        "initialiser": config.initialiser,
        "scale": config.scale,
        "share_residual_codes": config.share_residual_codes,
    }
    if config.one_trip:
        sides: dict[str, Any] = {"lora_rank": config.lora_rank, "tail": config.edge_tail}
        return Plan.one_trip(checkpoint.projections(), **sides, **facts)
    resident = bool(config.head_layers or config.tail_layers)
    with_lora = resident and config.lora_rank > 0
    return Plan.subset(
        () if resident and config.layers is None else config.layers,
        **facts,
        exchange_layers=config.exchange_layers,
        head_layers=config.head_layers,
        tail_layers=config.tail_layers,
        lora=checkpoint.projections() if with_lora else (),
        lora_rank=config.lora_rank if with_lora else 0,
    )


def build_service(config: CloudConfig, guard: Guard | None = None, *, progress: bool = True) -> Service:
    """Load the model and make everything behind the RPCs.

    Parameters
    ----------
    config
        The whole configuration.
    guard
        Who is let in; everybody if absent.
    progress
        Whether loading is shown on the terminal.

    Raises
    ------
    ValueError
        If the model, a plan or the KV budget is impossible; the message says what to change.
    """
    guard, place = guard or Guard(), place_of(config)
    set_threads(config, place)
    checkpoint = models.resolve(config.model, cache_dir=config.cache_dir, progress=progress)
    factors = factors_of(plans_of(config, checkpoint), config, checkpoint, progress=progress)
    served = [(plan, path) for plan, _, path in factors]
    parts = edge_parts.build(checkpoint, config.cache_dir, plans=served, progress=progress)
    offers: dict[bytes, Offer] = {}
    plans = {}
    for plan, matrices, path in factors:
        print_of = fingerprint.for_model(plan, checkpoint, path, parts, config.cache_dir)
        plans[plan.name] = (plan, matrices)
        offers[print_of.plan] = Offer(plan, print_of)
    if place.size > 1:
        with needing_memory(
            f"no memory for rank 0's share of the model in {config.dtype} and of the KV cache: raise "
            "--tensor-parallel, give --dtype bfloat16, or lower --kv-bytes"
        ):
            replica = lead(config, place, checkpoint, plans, progress=progress)
        limits = limits_of(config, checkpoint, plans, replica.cache)
        engine = Engine(replica.backbone, replica.cache, config.engine)
        service = Service(config, engine, offers, parts, limits, guard, close=replica.close)
        service.tuning.make_batch = replica.make_batch
        return service
    dtype = getattr(torch, config.dtype)
    with needing_memory(
        f"no memory for the model's layers in {config.dtype}: give --dtype bfloat16, a smaller --model, or a "
        "machine with more"
    ):
        backbone = Backbone(checkpoint, plans, dtype=dtype, device=config.device, progress=progress)
    with needing_memory(
        f"no memory for a KV cache of {config.kv_bytes / 2**30:.1f} GiB on {config.device}: lower --kv-bytes "
        f"({config.kv_bytes} now)"
    ):
        cache = KvCache(backbone.geometry, backbone.served, config.kv_bytes, dtype, backbone.device)
    if backbone.device.type == "cpu":
        check_memory(cache.bytes_total, config.tuning.max_bytes if config.tuning.max_streams else 0)
    return Service(
        config,
        Engine(backbone, cache, config.engine),
        offers,
        parts,
        limits_of(config, checkpoint, plans, cache),
        guard,
    )


def check_memory(kv_bytes: int, tuning_bytes: int) -> None:
    """Warn if more memory may come to be used than there is: on a CPU it is only taken as it is used."""
    available = available_bytes()
    if available is not None and kv_bytes + tuning_bytes > available:
        warning(
            log,
            "memory_short",
            f"the KV cache ({kv_bytes / 2**30:.1f} GiB) and tuning ({tuning_bytes / 2**30:.1f} GiB) may come "
            f"to take more than the {available / 2**30:.1f} GiB that are free: lower --kv-bytes or "
            "tuning.max_bytes, or the system may end this process when they do",
            kv_bytes=kv_bytes,
            tuning_bytes=tuning_bytes,
            available_bytes=available,
        )


def plans_of(config: CloudConfig, checkpoint: Checkpoint) -> list[Plan]:
    """Return the plans that are offered, in order.

    Raises
    ------
    ValueError
        If two have one name, or one does not fit the model.
    """
    made: dict[str, Plan] = {}
    for plan_config in config.plans:
        plan = plan_of(plan_config, checkpoint)
        if plan.name in made:
            raise ValueError(f"two plans are named {plan.name!r}; give each its own name")
        made[plan.name] = plan
    return list(made.values())


def factors_of(
    plans: Sequence[Plan], config: CloudConfig, checkpoint: Checkpoint, *, progress: bool
) -> list[tuple[Plan, LowRank, Path]]:
    """Return A and B of plans and their files, which are made on first use."""
    return [(plan, *lowrank.ensure(plan, checkpoint, config.cache_dir, progress=progress)) for plan in plans]


def limits_of(
    config: CloudConfig, checkpoint: Checkpoint, plans: Mapping[str, tuple[Plan, LowRank]], cache: KvCache
) -> Limits:
    """Return bounds that fit the model, the KV budget and gRPC's message size."""
    widest = max(max(plan.hidden_size, plan.codes_width, plan.residual_width) for plan, _ in plans.values())
    fits = (MAX_MESSAGE_BYTES - (64 << 10)) // (4 * widest)  # float32, with room for the rest of the message
    context = min(
        config.max_context_tokens or checkpoint.geometry.max_positions, checkpoint.geometry.max_positions
    )
    return Limits(
        max_context_tokens=min(context, cache.num_tokens),
        max_step_tokens=max(1, min(config.max_step_tokens, fits)),
        max_rows=config.max_rows,
        max_steps_in_flight=config.max_steps_in_flight,
    )


def security_of(config: CloudConfig) -> tuple[TlsFiles | None, Guard]:
    """Return the TLS files, None for plaintext, and who lets callers in.

    Raises
    ------
    TlsError, TokenFileError
        If a file is missing or cannot be used.
    """
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        tls = TlsFiles(config.tls_cert, config.tls_key, config.client_ca)
    tokens = None if config.tokens is None else TokenBook(config.tokens)
    return tls, Guard(tokens, by_certificate=config.client_ca is not None)


def check_place(config: CloudConfig) -> None:
    """Refuse at once what would else fail only when the model has been fetched and loaded.

    Raises
    ------
    ValueError
        If there is no such device, or an address is given for two purposes.
    OSError
        If somebody listens on an address already.
    """
    check_addresses(config)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot compute on device {config.device!r}: {reason}") from None


async def serve(config: CloudConfig, on_ready: Callable[[str, Service], None]) -> bool:
    """Serve until SIGTERM or SIGINT: then tell edges to move, and stop. The second signal stops at once.

    Parameters
    ----------
    config
        The whole configuration.
    on_ready
        Called with the bound address and the service once requests are answered.

    Returns
    -------
    bool
        Whether everybody had gone when it stopped; else a second signal has cut somebody off.
    """
    check_exposure(config)
    check_parallel(config)
    check_place(config)
    share_one_heap()
    tls, guard = security_of(config)
    service = build_service(config, guard, progress=config.log_format == "text")
    try:
        return await _serve(config, service, tls, on_ready)
    finally:
        service.close()


async def _serve(
    config: CloudConfig,
    service: Service,
    tls: TlsFiles | None,
    on_ready: Callable[[str, Service], None],
) -> bool:
    make_room(config.max_connections)
    guard, metrics = service.guard, open_metrics(config.metrics, service)
    options = (*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", config.max_connections))
    server = grpc.aio.server(options=options, interceptors=(guard,))
    server.add_generic_rpc_handlers((service.handlers(),))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (SERVICE_NAME, reflection.SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name),
        server,
    )
    host = config.listen.rpartition(":")[0]
    try:
        if tls is None:
            bound = server.add_insecure_port(config.listen)
        else:
            bound = server.add_secure_port(config.listen, tls.credentials())
    except RuntimeError:
        raise cannot_listen(config.listen) from None  # taken while the model was loaded
    stop, at_once = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (at_once if stop.is_set() else stop).set()
        )
    work = (service.engine.serve(), housekeeping(service), guard.watch())
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    for task in tasks:
        task.add_done_callback(lambda _: stop.set())  # an engine that fails must not look healthy
    await server.start()
    for name in ("", SERVICE_NAME):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    probes = await open_probes(config.health, health)
    on_ready(f"{host}:{bound}", service)
    await stop.wait()
    DRAINS.inc()
    sessions = len(service.sessions)
    event(log, "stopping", f"stopping: {sessions} sessions", sessions=sessions)
    await health.enter_graceful_shutdown()
    if not any(task.done() for task in tasks):
        leaving = asyncio.create_task(service.drain.run(service, config.drain_timeout_s))
        hurry = asyncio.create_task(at_once.wait())
        await asyncio.wait([leaving, hurry, *tasks], return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        hurry.cancel()
    cut = service.drain.streams(service) if at_once.is_set() else []
    if cut:
        warning(log, "stopped_at_once", f"stopped at once: {len(cut)} streams are cut off", streams=len(cut))
    await server.stop(0 if at_once.is_set() else FAREWELL_S)
    if probes is not None:
        await probes.stop(None)
    failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)  # a batch that runs holds blocks of the KV cache
    left = service.end()
    event(log, "stopped", f"stopped: {left} bytes of KV cache are in use", kv_bytes_used=left)
    if metrics is not None:
        metrics.close()
    for error in failed:
        if error is not None:
            raise error
    return not cut
