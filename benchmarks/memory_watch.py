"""How much memory processes take over time, and by how much each has grown.

Linux's own figures, from /proc: anonymous memory plus mapped files. Shared memory is left out, which is
the pool of the KV cache: it is taken page by page, up to its budget and never beyond, as positions are
written; a pool that fills is no leak. Bytes of it in use are what `Describe` states.
"""

import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

PERIOD_S = 0.5


def private_bytes(pid: int) -> int | None:
    """Return resident bytes of a process without shared memory; None if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "RssAnon" not in fields:  # it has ended, and nobody has asked for its status yet
        return None
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


@dataclass
class Life:
    """One process and what it took: ``(monotonic seconds, bytes)``, in order."""

    name: str
    pid: int
    samples: list[tuple[float, int]] = field(default_factory=list)

    def growth(self, warm_up_s: float, window_s: float, begin: float = 0.0) -> dict[str, float] | None:
        """Return how it grew; None if it lived too short to say.

        The median of the last ``window_s`` seconds against that of as many after ``warm_up_s`` (seconds
        from its first sample, or from ``begin`` if that is later): a batch under way comes and goes.
        """
        if not self.samples:
            return None
        start = max(self.samples[0][0], begin) + warm_up_s
        end = self.samples[-1][0]
        if end - start < 2 * window_s:
            return None
        first = [size for at, size in self.samples if start <= at <= start + window_s]
        last = [size for at, size in self.samples if at >= end - window_s]
        if not first or not last:
            return None
        before, after = statistics.median(first), statistics.median(last)
        return {
            "seconds": round(end - start, 1),
            "first_bytes": int(before),
            "last_bytes": int(after),
            "growth": round(after / before - 1, 4),
        }


class MemoryWatch:
    """Looks at processes on a thread of its own inside the ``with`` block."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self.lives: list[Life] = []
        self._watched: list[Life] = []
        self._period_s = period_s
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def add(self, name: str, pid: int) -> Life:
        """Look at a process until it is gone or left."""
        life = Life(name, pid)
        with self._lock:
            self.lives.append(life)
            self._watched.append(life)
        return life

    def leave(self, life: Life) -> None:
        """Look at it no more."""
        with self._lock:
            if life in self._watched:
                self._watched.remove(life)

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            with self._lock:
                for life in list(self._watched):
                    size = private_bytes(life.pid)
                    if size is None:
                        self._watched.remove(life)
                    else:
                        life.samples.append((time.monotonic(), size))
