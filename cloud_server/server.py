"""Puts a server together: model, plans, engine, service, gRPC, and their orderly end."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from cloud_server.backbone import Backbone
from cloud_server.config import CloudConfig, PlanConfig
from cloud_server.engine import Engine
from cloud_server.exposure import check_exposure
from cloud_server.guard import Guard
from cloud_server.handshake import Offer
from cloud_server.kv_cache import KvCache
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
DRAIN_S = 5.0

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # two servers on one port would silently share its clients
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Of one connection: what is not authenticated yet may hold a message's bytes for each.
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.keepalive_time_ms", 60_000),  # some clouds drop idle TCP after four minutes
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
        return Plan.one_trip(checkpoint.projections(), lora_rank=config.lora_rank, **facts)
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


def build_service(config: CloudConfig, *, progress: bool = True) -> Service:
    """Load the model and make everything behind the RPCs.

    Raises
    ------
    ValueError
        If the model, a plan or the KV budget is impossible; the message says what to change.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    checkpoint = models.resolve(config.model, cache_dir=config.cache_dir, progress=progress)
    made: dict[str, Plan] = {}
    for plan_config in config.plans:
        plan = plan_of(plan_config, checkpoint)
        if plan.name in made:
            raise ValueError(f"two plans are named {plan.name!r}; give each its own name")
        made[plan.name] = plan
    factors = {
        plan.name: lowrank.ensure(plan, checkpoint, config.cache_dir, progress=progress)
        for plan in made.values()
    }
    served = [(plan, factors[plan.name][1]) for plan in made.values()]
    parts = edge_parts.build(checkpoint, config.cache_dir, plans=served, progress=progress)
    offers: dict[bytes, Offer] = {}
    plans = {}
    for plan in made.values():
        matrices, path = factors[plan.name]
        print_of = fingerprint.for_model(plan, checkpoint, path, parts, config.cache_dir)
        plans[plan.name] = (plan, matrices)
        offers[print_of.plan] = Offer(plan, print_of)
    dtype = getattr(torch, config.dtype)
    backbone = Backbone(checkpoint, plans, dtype=dtype, device=config.device, progress=progress)
    cache = KvCache(backbone.geometry, backbone.served, config.kv_bytes, dtype, backbone.device)
    return Service(
        config,
        Engine(backbone, cache, config.engine),
        offers,
        parts,
        limits_of(config, checkpoint, plans, cache),
    )


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
        If there is no such device.
    OSError
        If somebody listens on the address already.
    """
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build of torch without the device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot compute on device {config.device!r}: {reason}") from None
    host, _, port = config.listen.rpartition(":")
    places = []
    with contextlib.suppress(OSError, ValueError):  # an address that only gRPC can make sense of
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    if places and all(_is_taken(place[0], place[4]) for place in places):
        raise _cannot_listen(config)


def _is_taken(family: int, address: Any) -> bool:
    """Whether somebody listens there; what else may be wrong with an address, gRPC finds out."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _cannot_listen(config: CloudConfig) -> OSError:
    return OSError(f"cannot listen on {config.listen}: the port is taken or the address is not ours")


async def serve(config: CloudConfig, on_ready: Callable[[str, Service], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Parameters
    ----------
    config
        The whole configuration.
    on_ready
        Called with the bound address and the service once requests are answered.
    """
    check_exposure(config)
    check_place(config)
    tls, guard = security_of(config)
    service = build_service(config)
    service.guard = guard
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(guard,))
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
        raise _cannot_listen(config) from None  # taken while the model was loaded
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    work = (service.engine.serve(), service.housekeeping(), guard.watch())
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    for task in tasks:
        task.add_done_callback(lambda _: stop.set())  # an engine that fails must not look healthy
    await server.start()
    for name in ("", SERVICE_NAME):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    on_ready(f"{host}:{bound}", service)
    await stop.wait()
    log.info("stopping: %d sessions", len(service.sessions))
    await health.enter_graceful_shutdown()
    await server.stop(DRAIN_S)
    failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    for task in tasks:
        task.cancel()
    for error in failed:
        if error is not None:
            raise error
