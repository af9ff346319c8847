"""Two network namespaces joined by a link, as whoever runs processes in them sees it.

The work is done by a process of its own (`benchmarks.link_tun`); this side starts it, asks it and ends
it. Processes in the namespaces are real ones with real sockets, on a network with two hosts.
"""

import json
import os
import secrets
import subprocess
from typing import Any

from benchmarks import link_tun
from benchmarks.link_queue import LinkShape
from benchmarks.link_tun import LinkError
from benchmarks.processes import ROOT, child_environment

CLOSING_S = 30.0  # more than processes in the namespaces are given to end


class Namespaces:
    """Two namespaces and the process that forwards between them."""

    kind = "namespaces"

    def __init__(self, up: LinkShape, down: LinkShape, *, keeps_window: bool = False) -> None:
        self.name = f"privatelora-{os.getpid()}-{secrets.token_hex(4)}"
        self.cloud_prefix, self.edge_prefix = (
            ("ip", "netns", "exec", link_tun.namespace_of(self.name, side)) for side in ("cloud", "edge")
        )
        self._process = subprocess.Popen(
            link_tun.command(self.name, up, down, keeps_window),
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends the benchmark, and the benchmark ends the link
        )
        try:
            joined = self._reply()
            if "error" in joined:
                raise LinkError(f"could not make the link: {joined['error']}")
        except BaseException:
            self.close()
            raise
        self.cloud_host: str = joined["addresses"]["cloud"]
        self.priority: str = joined["priority"]

    @property
    def forwarder_pid(self) -> int:
        """Process id of the forwarder."""
        return self._process.pid

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LinkError(f"the forwarder ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def address(self, port: int) -> str:
        """Return the server's own address: namespaces are joined by routes."""
        return f"{self.cloud_host}:{port}"

    def statistics(self) -> dict[str, Any]:
        """Ask the forwarder."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except OSError:
            raise LinkError("the forwarder is gone") from None
        return {**self._reply(), "priority": self.priority}

    def close(self) -> None:
        """Tell the forwarder to end; remove what it could not, had it been killed."""
        try:
            # Its stdin ends, and with it the forwarder: it removes the namespaces by itself.
            self._process.communicate(timeout=CLOSING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        link_tun.remove(self.name)
