"""When the steps of each edge began and ended, as its own thread saw it.

Three things are noted: each *attempt*, a step that was sent on a stream until it ended either way; each
*whole* step, from the wish for hidden states until they are there, whatever had to be tried in between; and
each *recovery*, from when a stream was found lost, or sent away, until its step was done after all, by
resuming the session or by replay. Takes 16 bytes a note, so as not to look like a leak of what is watched.
"""

import array
import threading
import time
from typing import Any

from edge_client.cloud_cache import CloudCache
from edge_client.recovery import Recovery
from edge_client.session import Session

Interval = tuple[float, float]  # (began, ended), monotonic seconds: one clock for a machine's processes


class StepLog:
    """Intervals, in order of their ends."""

    def __init__(self) -> None:
        self._times = array.array("d")

    def note(self, began: float, ended: float) -> None:
        """Note one."""
        self._times.extend((began, ended))

    def intervals(self) -> list[Interval]:
        """Return all."""
        return list(zip(self._times[::2], self._times[1::2], strict=True))

    def since(self, moment: float) -> list[Interval]:
        """Return those that ended then or later, while others may be noted."""
        times, found = self._times, list[Interval]()
        for place in range(len(times) // 2 - 1, -1, -1):
            if times[2 * place + 1] < moment:
                break
            found.append((times[2 * place], times[2 * place + 1]))
        return found[::-1]


class StepLogs:
    """The three logs of one edge."""

    def __init__(self) -> None:
        self.attempts, self.wholes, self.recoveries = StepLog(), StepLog(), StepLog()

    def since(self, moment: float) -> dict[str, list[Interval]]:
        """Return by log what ended then or later."""
        return {name: getattr(self, name).since(moment) for name in ("attempts", "wholes", "recoveries")}


_of_thread = threading.local()


def note_in(logs: StepLogs) -> None:
    """Note what this thread does from now on in ``logs``."""
    _of_thread.logs = logs


def watch() -> None:
    """Let every step of this process be noted; call it once."""
    _watch(Session, "step", "attempts")
    _watch(CloudCache, "extend", "wholes")
    _watch(Recovery, "again", "recoveries")


def _watch(owner: Any, name: str, kind: str) -> None:
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return original(*args, **kwargs)
        finally:
            logs = getattr(_of_thread, "logs", None)
            if logs is not None:
                getattr(logs, kind).note(began, time.monotonic())

    setattr(owner, name, noted)
