"""Edges (and whole models) that answer on request, as whoever measures them sees them.

Each is a process of its own (`benchmarks.edge_driver`), which may run in a network namespace. Needs no torch.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from benchmarks.processes import ROOT, ProcessError, child_environment
from benchmarks.quiet import stolen_s

ENDING_S = 30.0


class Driver:
    """A process that answers one request after another, inside the ``with`` block.

    Parameters
    ----------
    arguments
        As `benchmarks.edge_driver` takes them.
    prefix
        Words before the command, such as those that run it in a namespace.
    """

    def __init__(self, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self._command = [*prefix, sys.executable, "-m", "benchmarks.edge_driver", *arguments]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Driver":
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends the benchmark, and the benchmark ends this
        )
        try:
            self._reply()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Return what it answers, and ``steal``: the share of the cores that the host took meanwhile."""
        assert self._process is not None and self._process.stdin is not None
        taken, started = stolen_s(), time.perf_counter()
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise ProcessError("an edge is gone; what it said is above") from None
        reply = self._reply()
        cores = os.cpu_count() or 1
        steal = (stolen_s() - taken) / (cores * (time.perf_counter() - started))
        return {**reply, "steal": round(steal, 4)}

    def _reply(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessError(f"an edge ended with status {self._process.wait()}; what it said is above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        try:
            self._process.communicate(timeout=ENDING_S)  # its stdin ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
