"""A process that works in the background and answers questions, and how whoever started it asks them.

Each side talks in lines of JSON over the child's stdin and stdout; the child ends with its stdin. The
asking side never waits without a bound: a child that hangs is an error, and says on SIGUSR1 where it
stands. Needs no torch.
"""

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.processes import ROOT, ProcessError, child_environment

ENDING_S = 30.0
Handlers = Mapping[str, Callable[..., Any]]


class Child:
    """A Python module as a process, inside the ``with`` block; ended after it.

    Parameters
    ----------
    module
        What ``python -m`` runs; it has to call `answering`.
    arguments
        Its first line of stdin.
    log
        File for what it writes to stderr.
    env
        Environment variables to set for it.
    """

    def __init__(
        self, module: str, arguments: Mapping[str, Any], log: Path, env: dict[str, str] | None = None
    ) -> None:
        self.module, self.log = module, log
        self._arguments, self._environment = dict(arguments), child_environment(env)
        self._lines: queue.Queue[str] = queue.Queue()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Child":
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C ends whoever started it, and that ends this
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.say(self._arguments)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def ask(self, do: str, timeout_s: float = 120.0, **request: Any) -> Any:
        """Return what its handler called ``do`` returns.

        Raises
        ------
        ProcessError
            If it is gone, or has not answered in time.
        """
        self.say({"do": do, **request})
        return self.answer(timeout_s)

    def answer(self, timeout_s: float = 120.0) -> Any:
        """Return its next answer, the first of which says that it is ready."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._show_stacks()
            raise ProcessError(f"{self.module} has not answered for {timeout_s:.0f} s: {self.log}") from None
        if not line:
            raise ProcessError(f"{self.module} is gone; what it said is in {self.log}: {self._last_words()}")
        return json.loads(line)

    def end(self) -> None:
        """End it, by force if it must be."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(ENDING_S)
        except (subprocess.TimeoutExpired, OSError):
            self._show_stacks()
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def say(self, request: Mapping[str, Any]) -> None:
        """Ask without waiting for the answer."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise ProcessError(f"{self.module} is gone: {self._last_words()}") from None

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def _show_stacks(self) -> None:
        if self.is_alive:
            os.kill(self.pid, signal.SIGUSR1)


def arguments() -> dict[str, Any]:
    """Return, in the child, what it was started with."""
    faulthandler.register(signal.SIGUSR1)
    found: dict[str, Any] = json.loads(sys.stdin.readline())
    return found


def answering(handlers: Handlers) -> None:
    """Answer, in the child, one question after another until there are no more.

    Parameters
    ----------
    handlers
        By name; each returns something that JSON can hold.
    """
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(handlers[request.pop("do")](**request)), flush=True)
