"""The cloud of a chaos run: one process after another behind one link, and how each of them ends.

Every process is started as a person would start it (`benchmarks.processes`). A polite end that takes
too long, or has another status than 0, is remembered, as is one that nobody asked for, and one that leaves
KV cache in use when all sessions are gone, which a cloud logs last.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.chaos_link import Gate
from benchmarks.memory_watch import Life, MemoryWatch
from benchmarks.processes import CloudProcess
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

DESCRIBE = "/privatelora.v1.PrivateLoraService/Describe"
STOPPED = re.compile(r"stopped: (\d+) bytes of KV cache")
BAD_WORDS = ("Traceback", "never retrieved", "Segmentation", "CRITICAL")


@dataclass(frozen=True)
class Stroke:
    """When an event struck (just before, just after) and when it was over, in monotonic seconds.

    ``back`` is when the cloud could first answer again: later than that, and earlier than whoever undoes the
    event comes to note that it is over.
    """

    before: float
    after: float
    back: float
    over: float


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal, or do nothing if nobody is there any more, which the status tells."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def leaks(log: str, ends: int) -> list[str]:
    """Return in words what KV cache clouds had in use at their orderly ends, of which there were so many."""
    left = [int(number) for number in STOPPED.findall(log)]
    found = [f"a cloud had {number} bytes of KV cache in use at its end" for number in left if number]
    if len(left) < ends:
        found.append(f"{ends} clouds ended in order; {len(left)} said how much KV cache was in use then")
    return found


class Clouds:
    """The cloud that serves now, and what became of those before it, inside the ``with`` block.

    Parameters
    ----------
    model
        What to serve.
    arguments
        Further words of ``privatelora-cloud serve``.
    folder
        For the log.
    watch
        Looks at the memory of each.
    patience_s
        How long one that was asked to end may take (seconds).
    env
        Environment variables for it.
    """

    def __init__(
        self,
        model: str,
        arguments: Sequence[str],
        folder: Path,
        watch: MemoryWatch,
        patience_s: float,
        env: dict[str, str] | None = None,
    ) -> None:
        self._model, self._arguments, self._env = model, tuple(arguments), env
        self.log = folder / "cloud.log"
        self._watch, self._patience_s = watch, patience_s
        self.lives: list[dict[str, Any]] = []
        self._now, self._life, self._ready = self._started(None)
        self.gate = Gate(self._now.port)

    def __enter__(self) -> "Clouds":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.kill(self._now.pid, signal.SIGCONT)
        self._now.kill()
        self.gate.close()

    @property
    def has_died(self) -> bool:
        """Whether the one that serves now has ended by itself."""
        return self._now.status is not None

    def describe(self) -> pb.DescribeResponse:
        """Ask the one that serves now, past the link."""
        with grpc.insecure_channel(self._now.address) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(DESCRIBE)
            raw = call(b"", timeout=10, wait_for_ready=True)
        return pb.DescribeResponse.FromString(raw)

    @property
    def address(self) -> str:
        """Where the one that serves now listens, past the link."""
        return self._now.address

    # --- what happens to it -------------------------------------------------------------------------------

    def kill(self, away_s: float, aim_s: float) -> Stroke:
        """End it with SIGKILL; start it again on the same port after ``away_s`` seconds."""
        before, after = self._signal(signal.SIGKILL, aim_s)
        self._now.kill()  # waits until it is gone
        self._note("kill", True)
        time.sleep(away_s)
        back = time.monotonic()
        self._start_in_place()
        return Stroke(before, after, back, time.monotonic())

    def restart(self, aim_s: float) -> Stroke:
        """End it with SIGTERM; start it again on the same port as soon as it is gone."""
        before, after = self._end("restart", aim_s)
        back = time.monotonic()
        self._start_in_place()
        return Stroke(before, after, back, time.monotonic())

    def pause(self, hold_s: float, aim_s: float) -> Stroke:
        """Stop it with SIGSTOP and let it go on after ``hold_s`` seconds."""
        before, after = self._signal(signal.SIGSTOP, aim_s)
        time.sleep(hold_s)
        back = time.monotonic()
        send(self._now.pid, signal.SIGCONT)
        return Stroke(before, after, back, time.monotonic())

    def drain(self, aim_s: float) -> Stroke:
        """Start a successor, lead new connections to it, and end the one before with SIGTERM."""
        successor = self._started(None)
        self.gate.route(successor[0].port)
        before, after = self._end("drain", aim_s)
        self._now, self._life, self._ready = successor
        return Stroke(before, after, after, time.monotonic())

    def stop(self) -> None:
        """End the last one politely."""
        self._end("stop", 0.0)

    def faults(self) -> list[str]:
        """Return what no cloud may do, in words."""
        found = [
            f"{life['name']} was asked to end ({life['how']}) and ended with status {life['status']} "
            f"after {life['ending_s']} s"
            for life in self.lives
            if not life["clean"]
        ]
        log = self.log.read_text(errors="replace")
        found += leaks(log, sum(life["status"] == 0 for life in self.lives))
        return found + [f"the cloud's log has {word!r}: {self.log}" for word in BAD_WORDS if word in log]

    def _started(self, port: int | None) -> tuple[CloudProcess, Life, float]:
        process = CloudProcess(
            self._model, arguments=self._arguments, env=self._env, port=port, log=self.log
        ).start()
        number = sum(life.name.startswith("cloud") for life in self._watch.lives) + 1
        return process, self._watch.add(f"cloud {number}", process.pid), time.monotonic()

    def _start_in_place(self) -> None:
        self._now, self._life, self._ready = self._started(self._now.port)

    def _signal(self, number: signal.Signals, aim_s: float) -> tuple[float, float]:
        """Send a signal to the present one, in the middle of a step if asked to; return when."""
        pid = self._now.pid
        return self.gate.at_a_step(lambda: send(pid, number), aim_s)

    def _end(self, how: str, aim_s: float) -> tuple[float, float]:
        """Ask the present one to end, and see to it; return when it was asked, before and after."""
        before, after = self._signal(signal.SIGTERM, aim_s)
        process = self._now
        while process.status is None and time.monotonic() - after < self._patience_s:
            time.sleep(0.02)
        clean = process.status == 0
        process.kill()
        self._note(how, clean, process.status, time.monotonic() - after)
        return before, after

    def _note(self, how: str, clean: bool, status: int | None = None, ending_s: float = 0.0) -> None:
        self.lives.append(
            {
                "name": self._life.name,
                "seconds": round(time.monotonic() - self._ready, 1),
                "how": how,
                "status": status,
                "ending_s": round(ending_s, 2),
                "clean": clean,
            }
        )
