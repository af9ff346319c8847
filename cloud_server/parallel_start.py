"""How the ranks of a replica find each other, take their shares, and end together.

``--tensor-parallel N`` makes the process that a person starts rank 0; it starts the others on its machine,
gives them its settings through a pipe, and watches them (`cloud_server.parallel_children`). Under torchrun,
which starts all ranks itself on one machine or several, each finds its place in the environment. Either way
rank 0 alone listens, and all others follow it. A replica is there as a whole or not at all; who supervises
it starts it again.
"""

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cloud_server import logs
from cloud_server.config.cloud import CloudConfig
from cloud_server.kv_cache import KvCache
from cloud_server.parallel_backbone import ParallelBackbone
from cloud_server.parallel_children import Children, Place, set_threads
from cloud_server.parallel_follower import Follower
from cloud_server.parallel_leader import Leader, LeadingBackbone, LeadingKvCache, LeadingTuneBatch
from cloud_server.parallel_ranks import Ranks
from cloud_server.parallel_shard import Shard, check_divisible, sharded
from shared.checkpoint import Checkpoint
from shared.fingerprint import layers_digest
from shared.lowrank import LowRank
from shared.plan import Plan

log = logging.getLogger(__name__)

START = timedelta(hours=1)  # any rank may have to fetch and unpack a model while the others wait
ALONE_S = 2.0  # how long a rank lives on without rank 0: it may have been told to end, and be about to
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
Served = Mapping[str, tuple[Plan, LowRank]]


@dataclass
class Replica:
    """Rank 0's part of a replica, and the ranks that it has started."""

    leader: Leader
    backbone: LeadingBackbone
    cache: LeadingKvCache
    children: Children
    make_batch = LeadingTuneBatch

    def close(self) -> None:
        """End the other ranks, in order."""
        self.children.are_ending = True
        try:
            self.leader.stop()
        finally:
            self.children.close()
            dist.destroy_process_group()


def lead(
    config: CloudConfig, place: Place, checkpoint: Checkpoint, plans: Served, *, progress: bool
) -> Replica:
    """Start what has to be started, and return rank 0's part once all ranks hold theirs.

    Raises
    ------
    ValueError
        If the model cannot be divided so.
    RuntimeError
        If a rank does not come.
    """
    check_divisible(checkpoint.geometry, place.size)
    children = Children()
    try:
        if not place.by_torchrun:
            children.start(config, place)
        ranks = _joined(config, place, children.folder and children.folder / "store")
        leader = Leader(ranks, config.parallel_timeout_s / 4, children.end_replica)
        share, dtype = sharded(checkpoint, Shard(place.rank, place.size)), getattr(torch, config.dtype)
        device = _device(config, place)
        backbone = LeadingBackbone(
            share,
            plans,
            checkpoint.geometry,
            ranks,
            leader=leader,
            dtype=dtype,
            device=device,
            progress=progress,
        )
        cache = LeadingKvCache(
            leader, backbone.geometry, backbone.served, config.kv_bytes, dtype, backbone.device
        )
        ranks.agree(_identity(config, checkpoint, plans, cache), dist.group.WORLD)
        dist.barrier()
        leader.start()
    except BaseException:
        children.are_ending = True
        children.kill()
        raise
    return Replica(leader, backbone, cache, children)


def follow(config: CloudConfig, place: Place, store: Path | None = None) -> None:
    """Be another rank than 0, until that says stop.

    Raises
    ------
    ValueError
        If this rank was given another model or other settings than rank 0.
    RuntimeError
        If rank 0 or another rank is gone.
    """
    from cloud_server.server import factors_of, plans_of
    from shared import models

    set_threads(config, place)
    ranks = _joined(config, place, store)
    for number in (signal.SIGTERM, signal.SIGINT):  # rank 0 drains, and says when to end
        signal.signal(number, signal.SIG_IGN)
    checkpoint = models.resolve(config.model, cache_dir=config.cache_dir, progress=False)
    factors = factors_of(plans_of(config, checkpoint), config, checkpoint, progress=False)
    plans = {plan.name: (plan, matrices) for plan, matrices, _ in factors}
    share, dtype = sharded(checkpoint, Shard(place.rank, place.size)), getattr(torch, config.dtype)
    device = _device(config, place)
    backbone = ParallelBackbone(share, plans, checkpoint.geometry, ranks, dtype=dtype, device=device)
    budget = config.kv_bytes // place.size
    cache = KvCache(backbone.geometry, backbone.served, budget, dtype, backbone.device)
    if not ranks.agree(_identity(config, checkpoint, plans, cache), dist.group.WORLD):
        raise ValueError("not the model, the A/B files or the settings of rank 0; give all ranks the same")
    dist.barrier()
    log.info("rank %d of %d holds its share", place.rank, place.size)
    Follower(backbone, cache).follow()
    dist.destroy_process_group()


def main() -> None:
    """Be a rank that rank 0 started: settings come from it, and its end is this one's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; rank 0 knows what to do
    told = json.loads(sys.stdin.readline())
    config = CloudConfig.model_validate_json(told["config"])
    place = Place(told["rank"], told["size"], told["rank"], by_torchrun=False)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    status = follow_or_fail(config, place, Path(told["store"]))
    if status:
        logging.shutdown()
        os._exit(status)  # what a lost rank has left open may take long to close


def follow_or_fail(config: CloudConfig, place: Place, store: Path | None = None) -> int:
    """Follow, and return the process's status: an end that rank 0 did not ask for is a failure."""
    logs.set_up(config.log_level, config.log_format)
    try:
        follow(config, place, store)
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" This is typically")[0]  # gloo goes on with advice
        log.critical("rank %d of this replica cannot go on: %s", place.rank, reason)
        return 1
    return 0


def _end_with_rank_0() -> None:
    while os.read(sys.stdin.fileno(), 1):  # no sys.stdin.read(): at an orderly end Python wants its lock
        pass
    if threading.main_thread().is_alive():
        time.sleep(ALONE_S)
        os._exit(1)


def _joined(config: CloudConfig, place: Place, store: Path | None) -> Ranks:
    """Return the way to the other ranks, once all are there."""
    if place.local_size == place.size:  # nobody else is to reach these sockets, which ask for no name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    if store is None:
        dist.init_process_group("gloo", timeout=START)
    else:  # a file in a folder of this user's only: no port
        meeting = dist.FileStore(str(store), place.size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=meeting, rank=place.rank, world_size=place.size, timeout=START)
    patience = timedelta(seconds=config.parallel_timeout_s)
    control = dist.new_group(backend="gloo", timeout=patience)
    tensors = control if config.device == "cpu" else dist.new_group(backend="nccl", timeout=patience)
    return Ranks(place.rank, place.size, tensors, control)


def _device(config: CloudConfig, place: Place) -> str:
    if config.device == "cpu":
        return "cpu"
    torch.cuda.set_device(place.local_rank)
    return f"cuda:{place.local_rank}"


def _identity(config: CloudConfig, checkpoint: Checkpoint, plans: Served, cache: KvCache) -> list[int]:
    """Return a digest of what must be the same on all ranks, as numbers."""
    digest = hashlib.sha256(f"{config.dtype} {cache.num_blocks} {checkpoint.id}".encode())
    for plan, lowrank in plans.values():
        digest.update(plan.canonical_json().encode())
        digest.update(layers_digest(plan, checkpoint, config.cache_dir))
        for matrices in (lowrank.a, lowrank.b):
            for layer, tensor in sorted(matrices.items()):
                digest.update(f"{layer}".encode() + tensor.contiguous().numpy().tobytes())
    return list(digest.digest())
