"""Which rank this process is, and the ranks that it starts and watches.

A rank that ends before it was told to ends rank 0 with an error: none can go on without the others. Knows
nothing about models or process groups.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from cloud_server.config.cloud import CloudConfig

log = logging.getLogger(__name__)

STOP_S = 10.0
# What a rank runs: with rank 0's own modules, wherever that was started.
BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from cloud_server.parallel_start import main
main()
"""


@dataclass(frozen=True)
class Place:
    """Which rank of how many this process is; ``local_rank`` counts on this machine."""

    rank: int
    size: int
    local_rank: int
    by_torchrun: bool

    @property
    def local_size(self) -> int:
        """Ranks on this machine."""
        return int(os.environ["LOCAL_WORLD_SIZE"]) if self.by_torchrun else self.size


def place_of(config: CloudConfig) -> Place:
    """Return this process's place.

    Raises
    ------
    ValueError
        If torchrun started another number of ranks than the settings ask for, or torch has no ranks.
    """
    if not dist.is_available():  # as in some builds of torch for small boards
        if config.tensor_parallel > 1:
            raise ValueError("this build of torch has no torch.distributed; --tensor-parallel needs it")
        return Place(0, 1, 0, by_torchrun=False)
    if not dist.is_torchelastic_launched():
        return Place(0, config.tensor_parallel, 0, by_torchrun=False)
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if config.tensor_parallel not in (1, size):
        raise ValueError(
            f"--tensor-parallel {config.tensor_parallel}, but torchrun started {size} ranks; "
            "leave the former out"
        )
    return Place(rank, size, local_rank, by_torchrun=True)


def check_parallel(config: CloudConfig) -> None:
    """Refuse what cannot run on several ranks, before anything is loaded.

    Raises
    ------
    ValueError
        With what to change.
    """
    place = place_of(config)
    if place.size > 1 and config.device not in ("cpu", "cuda"):
        raise ValueError(
            f"device {config.device!r} with {place.size} ranks: say cpu, or cuda for one GPU a rank"
        )
    if place.size > 1 and config.device == "cuda" and torch.cuda.device_count() < place.local_size:
        raise ValueError(
            f"{place.local_size} ranks on this machine, which has {torch.cuda.device_count()} GPUs"
        )


def set_threads(config: CloudConfig, place: Place) -> None:
    """Share the cores among the ranks of this machine, unless the settings say how many each has."""
    torch.set_num_threads(config.threads or max(1, torch.get_num_threads() // place.local_size))


@dataclass
class Children:
    """The ranks that rank 0 has started, and where they meet. Ends this process if one ends too soon."""

    folder: Path | None = None
    processes: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    are_ending: bool = False

    def start(self, config: CloudConfig, place: Place) -> None:
        """Start all ranks but this one."""
        self.folder = Path(tempfile.mkdtemp(prefix="privatelora-ranks-"))
        for rank in range(1, place.size):
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", BOOT, json.dumps(sys.path)], stdin=subprocess.PIPE
            )
            self.processes[rank] = process
            told = {"rank": rank, "size": place.size, "store": str(self.folder / "store")}
            told["config"] = config.model_dump_json()
            assert process.stdin is not None
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.flush()  # and stays open: that is how a rank knows that this process is there
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        if not self.are_ending:
            self.end_replica(f"rank {rank} of this replica ended ({_how(status)})")

    def end_replica(self, reason: str) -> NoReturn:
        """End all ranks at once, this one too: none can go on without the others. Edges replay elsewhere.

        Parameters
        ----------
        reason
            What happened, for the log.
        """
        self.are_ending = True
        try:
            log.critical("%s; the replica ends. Start it again", reason)
            self.kill()
            logging.shutdown()
        finally:
            os._exit(1)  # threads may be waiting for a rank that will not answer

    def kill(self) -> None:
        """End the ranks, whatever they do."""
        for process in list(self.processes.values()):  # one may end while others are being started
            with contextlib.suppress(OSError):
                process.kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Wait for ranks that have been told to end."""
        self.are_ending = True
        for rank, process in self.processes.items():
            try:
                status = process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status:
                log.warning("rank %d of this replica did not end in order (%s)", rank, _how(status))
        self.kill()


def _how(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"
