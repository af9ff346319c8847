"""A replica of several ranks in one process: real shares, real gloo, a thread for each rank that follows."""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cloud_server.attention import ATTENTION_NAME
from cloud_server.kv_cache import KvCache
from cloud_server.parallel_backbone import ParallelBackbone
from cloud_server.parallel_follower import Follower
from cloud_server.parallel_leader import Leader, LeadingBackbone, LeadingKvCache
from cloud_server.parallel_ranks import Ranks
from cloud_server.parallel_shard import Shard, sharded
from shared.checkpoint import Checkpoint
from shared.lowrank import LowRank
from shared.plan import Plan
from tests.inprocess import Cloud
from tests.tuning import InDouble

PATIENCE_S = 600.0  # only what hangs takes as long, however slow the machine


def gloo(size: int) -> list[Ranks]:
    """Return every rank's way to the others, over sockets of this machine."""
    store, found = dist.HashStore(), dict[int, Ranks]()

    def join(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=PATIENCE_S))
        found[rank] = Ranks(rank, size, group, group)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


class Replica:
    """Rank 0's backbone and cache, and followers that run until `stop`.

    ``failures`` is what ended a follower or the leader before its time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plans: Mapping[str, tuple[Plan, LowRank]],
        size: int,
        dtype: torch.dtype = torch.float32,
        kv_bytes: int = 16 << 20,
        beat_s: float = 1.0,
    ) -> None:
        self.failures: list[str] = []
        self.ranks = gloo(size)
        self.leader = Leader(self.ranks[0], beat_s, self.failures.append)
        shares = [sharded(checkpoint, Shard(rank, size)) for rank in range(size)]
        whole = checkpoint.geometry
        self.backbone = LeadingBackbone(
            shares[0], plans, whole, self.ranks[0], dtype=dtype, leader=self.leader
        )
        b = self.backbone
        self.cache = LeadingKvCache(self.leader, b.geometry, b.served, kv_bytes, b.dtype, b.device)
        self.followers = []
        for ranks, share in zip(self.ranks[1:], shares[1:], strict=True):
            backbone = ParallelBackbone(share, plans, whole, ranks, dtype=dtype)
            cache = KvCache(backbone.geometry, b.served, kv_bytes // size, dtype, b.device)
            self.followers.append(Follower(backbone, cache))
        self._threads = [threading.Thread(target=self._follow, args=(f,)) for f in self.followers]
        for thread in self._threads:
            thread.start()
        self.leader.start()

    def _follow(self, follower: Follower) -> None:
        double = follower.backbone.dtype is torch.float64
        try:
            with InDouble() if double else nullcontext():  # a mode is its thread's own
                follower.follow()
        except Exception as error:
            self.failures.append(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """End all ranks; an error if one had ended before."""
        self.leader.stop()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert not self.failures, self.failures


class ParallelCloud(Cloud):
    """A cloud on several ranks."""

    def __init__(self, *arguments: Any, size: int = 2, **options: Any) -> None:
        self.size = size
        super().__init__(*arguments, **options)

    def build(
        self, plans: Mapping[str, tuple[Plan, LowRank]], kv_bytes: int, dtype: torch.dtype
    ) -> tuple[LeadingBackbone, LeadingKvCache]:
        # The edge of these tests builds its shell from the same config object, again and again.
        self.checkpoint.config._attn_implementation = ATTENTION_NAME
        self.replica = Replica(self.checkpoint, plans, self.size, dtype, kv_bytes)
        return self.replica.backbone, self.replica.cache

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.replica.stop()
