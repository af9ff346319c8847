"""Start and stop the two real processes on localhost, as a person would from two terminals.

Used by `make demo`, the integration tests and the benchmarks. Neither process knows that it is
being measured: both are started through their command lines, and readiness is asked of the cloud's
standard gRPC health service. Needs no torch.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 300.0  # the first start may fetch, unpack and factorise a model
ASKING_S = 0.25  # between two questions: asking takes from what the cloud starts with
DRAIN_S = 10.0  # so long a cloud may wait for its edges; then it is told to stop at once
STOP_TIMEOUT_S = 120.0  # only what hangs is still there then


class ProcessError(RuntimeError):
    """A process did not start, or ended with an error; carries the end of its log."""


@cache
def settings_folder() -> str:
    """Return an empty folder for the settings of the edges that are started here; it goes at the end.

    Every cloud here has a port of its own: among the user's settings their fingerprints would pile up,
    and refuse the model that happens to get an old one's port. Nor may a claim depend on those settings.
    """
    folder = tempfile.mkdtemp(prefix="privatelora-settings-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def child_environment(overrides: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child: this one's, the repository on the path, settings of its own."""
    environment = dict(os.environ)
    environment["PRIVATELORA_CONFIG_DIR"] = settings_folder()
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.update(overrides or {})
    return environment


def is_serving(
    address: str,
    timeout_s: float = 60.0,
    prefix: Sequence[str] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> bool:
    """Ask the health service at `address` (host:port) whether the whole server is ready.

    Where nobody listens, that is known at once; who listens may take `timeout_s` (seconds) for the answer.
    With a `prefix` a child asks, from where that puts it (a namespace). With `credentials` it is asked
    over TLS.
    """
    if prefix:
        question = (  # for some seconds: a child that fails at once would soon be followed by the next
            "import time; from benchmarks.processes import is_serving; until = time.monotonic() + 5\n"
            f"while not (serving := is_serving({address!r}, {timeout_s!r})) and time.monotonic() < until:\n"
            f"    time.sleep({ASKING_S})\n"
            "exit(not serving)"
        )
        command = [*prefix, sys.executable, "-c", question]
        return subprocess.run(command, cwd=ROOT, env=child_environment(), check=False).returncode == 0
    own = (("grpc.use_local_subchannel_pool", 1),)  # another channel's failures here are not this one's
    channel = (
        grpc.insecure_channel(address, own)
        if credentials is None
        else grpc.secure_channel(address, credentials, own)
    )
    with channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def memory_bytes(pid: int | str = "self") -> tuple[int, int]:
    """Return (resident now, resident at its peak) of a process in bytes, from Linux's /proc."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


class CloudProcess:
    """A cloud server as a child process, ready to serve inside the ``with`` block, gone after it.

    Parameters
    ----------
    model : str
        Packaged name, Hugging Face folder, GGUF file or hub id.
    dtype : str
        Compute dtype: float32, bfloat16 or float16.
    arguments : sequence of str
        Further arguments of ``privatelora-cloud serve``.
    env : dict, optional
        Environment variables to set for the child.
    port : int, optional
        Port to listen on; a free one by default. Give the old one to restart a cloud in place.
    log : path, optional
        File for the child's output, appended to; a temporary one by default.
    host : str
        Address to listen on.
    credentials : grpc.ChannelCredentials, optional
        With what to ask a cloud that serves TLS (by ``arguments``) whether it is ready.
    prefix : sequence of str
        Words before the command, such as those that run it in a network namespace (`benchmarks.link`);
        ``host`` is then an address there.

    Attributes
    ----------
    address : str
        ``host:port`` to point an edge at.
    port : int
        The port of it.
    pid : int
        Process id of the running child.

    Raises
    ------
    ProcessError
        On entering, when the child ends or is not ready in time; the message ends with its log.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        arguments: tuple[str, ...] | list[str] = (),
        env: dict[str, str] | None = None,
        port: int | None = None,
        log: str | Path | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self.port = port or free_port()
        self.address = f"{host}:{self.port}"
        self._prefix = tuple(prefix)
        self.command = [*prefix, sys.executable, "-m", "cloud_server.cli", "serve", "--model", str(model)]
        self.command += ["--listen", self.address, "--dtype", dtype, *arguments]
        if host != "127.0.0.1":  # in a namespace, where nobody else is
            self.command += ["--allow-plaintext", "--allow-anonymous"]
        self._environment = child_environment(env)
        self._start_timeout_s = start_timeout_s
        self._log_is_ours = log is None
        if log is None:
            handle, name = tempfile.mkstemp(prefix="privatelora-cloud-", suffix=".log")
            os.close(handle)
            log = name
        self.log = Path(log)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the child; an error when it was never started."""
        if self._process is None:
            raise ProcessError("the cloud process was not started")
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status of the child, None while it runs; -N where signal N ended it."""
        return None if self._process is None else self._process.poll()

    def logs(self, last: int | None = None) -> str:
        """Return what the child has printed, or only its last lines."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if last is None else "\n".join(text.splitlines()[-last:])

    def start(self) -> "CloudProcess":
        """Start the child and wait until its health service answers SERVING."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is meant for the edge
            )
        deadline = time.monotonic() + self._start_timeout_s
        try:
            while not is_serving(self.address, prefix=self._prefix, credentials=self._credentials):
                status = self._process.poll()
                if status is not None:
                    raise self._error(f"the cloud ended with status {status} before it was ready")
                if time.monotonic() > deadline:
                    raise self._error(f"the cloud was not ready in {self._start_timeout_s:.0f} s")
                time.sleep(ASKING_S)
        except BaseException:
            self.stop()
            raise
        return self

    def _error(self, what: str) -> ProcessError:
        return ProcessError(f"{what}; {self.log} ends:\n{self.logs(last=30)}")

    def kill(self) -> None:
        """End the child with SIGKILL, as a crash would."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End the child with SIGTERM, a second one if it waits for its edges, SIGKILL if it hangs."""
        for patience_s in (DRAIN_S, STOP_TIMEOUT_S):
            if self._process is None or self._process.poll() is not None:
                return
            self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        self.kill()

    def __enter__(self) -> "CloudProcess":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._log_is_ours and kind is None:
            self.log.unlink(missing_ok=True)


def edge_command(*arguments: str) -> list[str]:
    """Return the command line of an edge, for `subprocess`."""
    return [sys.executable, "-m", "edge_client.cli", *arguments]


def run_edge(
    *arguments: str,
    env: dict[str, str] | None = None,
    timeout_s: float = 300.0,
    prefix: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run an edge command to its end, with its output captured; its status is the caller's to judge."""
    return subprocess.run(
        [*prefix, *edge_command(*arguments)],
        cwd=ROOT,
        env=child_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def edge_json(
    *arguments: str,
    env: dict[str, str] | None = None,
    timeout_s: float = 300.0,
    prefix: Sequence[str] = (),
) -> dict[str, Any]:
    """Run an edge command with ``--json`` and return the object on its last line.

    Raises
    ------
    ProcessError
        When the command fails; the message ends with what it wrote to stderr.
    """
    done = run_edge(*arguments, "--json", env=env, timeout_s=timeout_s, prefix=prefix)
    if done.returncode != 0:
        raise ProcessError(f"the edge ended with status {done.returncode}; it said:\n{done.stderr.strip()}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
