"""A network link to measure on: delay and rate per direction between a cloud's and an edge's processes.

    python -m benchmarks.link check --preset 5g

Two network namespaces joined by a TUN pair (`benchmarks.link_tun`), or, where root, TUN or Linux is
missing, a proxy inside this process (`benchmarks.link_proxy`), with the same queues
(`benchmarks.link_queue`) and a line that says so. Every link is checked before it is used, by round
trips and a bulk TCP transfer each way, and refused if it is not what its preset says. Without delay and
limit it is this machine's own loopback, with nothing in between.

    with Link(preset("5g")) as link:
        with CloudProcess(model, host=link.cloud_host, prefix=link.cloud_prefix) as cloud:
            edge_json("generate", "--cloud", link.address(cloud.port), ..., prefix=link.edge_prefix)
"""

import argparse
import json
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Literal

from benchmarks import link_tun
from benchmarks.link_check import checked, say
from benchmarks.link_namespaces import Namespaces
from benchmarks.link_preset import PRESETS, Joined, Preset, preset
from benchmarks.link_proxy import LOCALHOST, Proxy
from benchmarks.link_tun import LinkError

__all__ = ["PRESETS", "Joined", "Kind", "Link", "LinkError", "Preset", "end_on_sigterm", "preset", "say"]

Kind = Literal["best", "namespaces", "proxy"]


class Loopback:
    """Nothing in between: this machine's own loopback interface."""

    kind = "loopback"
    cloud_prefix: tuple[str, ...] = ()
    edge_prefix: tuple[str, ...] = ()
    cloud_host = LOCALHOST

    def address(self, port: int) -> str:
        """Return the server's own address."""
        return f"{LOCALHOST}:{port}"

    def statistics(self) -> dict[str, Any]:
        """Return nothing: nobody counts."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def _joined(preset: Preset, kind: Kind) -> Joined:
    up, down = preset.shape(preset.up_mbit_s), preset.shape(preset.down_mbit_s)
    if preset.is_loopback:
        return Loopback()
    lacking = None if kind == "proxy" else link_tun.missing()
    if kind == "namespaces" and lacking:
        raise LinkError(f"a link between namespaces needs {lacking}, which is missing here; use the proxy")
    if lacking or kind == "proxy":
        say(f"a proxy in this process, not a network: {f'{lacking} is missing' if lacking else 'as asked'}")
        return Proxy(up, down)
    return Namespaces(up, down, keeps_window=preset.keeps_window)


class Link:
    """A link between the cloud's side and the edge's, inside the ``with`` block; gone after it.

    Entering returns what joins the sides: the words to put before a command (``cloud_prefix``,
    ``edge_prefix``), where a server listens (``cloud_host``) and where the edge finds it (``address``).

    Parameters
    ----------
    preset : Preset
        What it is like.
    kind : str
        ``best`` (namespaces if this machine can, else the proxy), ``namespaces`` or ``proxy``.
    check : bool
        Measure it first, and refuse it if it is not what the preset says.

    Attributes
    ----------
    checked : dict or None
        The figures of that check, once it has passed.

    Raises
    ------
    LinkError
        On entering, if it cannot be made or is not what the preset says.
    """

    def __init__(self, preset: Preset, kind: Kind = "best", check: bool = True) -> None:
        self.preset = preset
        self._kind, self._check = kind, check
        self.checked: dict[str, Any] | None = None
        self._joined: Joined | None = None

    def __enter__(self) -> Joined:
        self._joined = _joined(self.preset, self._kind)
        try:
            if self._check:
                self.checked = checked(self._joined, self.preset)
        except BaseException:
            self._joined.close()
            raise
        return self._joined

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._joined is not None:
            self._joined.close()


def end_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that processes and links end with what started them."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def main() -> int:
    """Check a link and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("check",))
    parser.add_argument("--preset", default="5g", choices=tuple(PRESETS))
    parser.add_argument("--kind", default="best", choices=("best", "namespaces", "proxy"))
    options = parser.parse_args()
    end_on_sigterm()
    link = Link(preset(options.preset), options.kind)
    try:
        with link:
            print(json.dumps(link.checked))
    except LinkError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
