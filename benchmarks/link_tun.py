"""The link between two network namespaces: moves packets from one TUN to the other when they are due.

    python -m benchmarks.link_tun NAME '{"up": {...}, "down": {...}}'

Makes the namespaces NAME-cloud and NAME-edge, each with one TUN, prints a JSON line once they are
joined, and answers every line on stdin with one of statistics. When stdin ends, because whoever started
it asked for it or died, it ends what still runs in the namespaces and removes them, so nothing is left
behind however a benchmark ends. Needs Linux, root, iproute2 and /dev/net/tun; imports only the standard
library. The kernel does the rest: its TCP sees delay, rate and loss as on any network.
"""

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict
from types import FrameType
from typing import Any

from benchmarks.link_queue import MTU, DueTimeQueue, Lateness, LinkShape

TUN_DEVICE = "/dev/net/tun"
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
ADDRESSES = {"cloud": "10.77.0.1", "edge": "10.77.0.2"}  # the same in every run: no namespace sees another's
# Linux's default. Namespaces would inherit what this machine has set, and every figure would depend on it:
# on `wan` the time to a first token was about a third longer with BBR.
CONGESTION_CONTROL = "cubic"
READ_AT_ONCE = 64  # packets taken from one TUN before looking at what is due
QUEUE_PACKETS = 10_000  # of the TUN itself, so that only our buffer ever drops
ENDING_S = 3.0  # for what still runs in a namespace, before SIGKILL


class LinkError(RuntimeError):
    """The link could not be made, or is not what its preset says."""


def namespace_of(name: str, side: str) -> str:
    """Return the name of one side's namespace."""
    return f"{name}-{side}"


def missing() -> str | None:
    """Return what this machine lacks for a link between namespaces, or None if it has everything."""
    if sys.platform != "linux":
        return "network namespaces, which only Linux has"
    if os.geteuid() != 0:
        return "root"
    if not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        return TUN_DEVICE
    try:  # a container's root may lack the capability: making one is the only proof
        name = f"privatelora-try-{os.getpid()}"
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except FileNotFoundError:
        return "the command `ip` (iproute2)"
    except LinkError:
        return "the right to make network namespaces"
    return None


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise LinkError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _open_tun(interface: str, namespace: str) -> int:
    """Make a TUN, move it into a namespace and return its descriptor; it goes when that is closed."""
    tun = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", interface.encode(), IFF_TUN | IFF_NO_PI))
    _ip("link", "set", "dev", interface, "netns", namespace)
    return tun


def _join(name: str, keeps_window: bool) -> dict[str, int]:
    """Make both namespaces with a TUN each; return the descriptors by side."""
    tuns = {}
    for side, address in ADDRESSES.items():
        namespace = namespace_of(name, side)
        _ip("netns", "add", namespace)
        # Names of interfaces have at most 15 characters.
        interface = f"pl{name[-8:]}{side[0]}"
        tuns[side] = _open_tun(interface, namespace)
        inside = ("netns", "exec", namespace)
        # No router solicitations, and no slow-start threshold kept from one measurement to the next.
        settings = "echo 1 > ipv6/conf/all/disable_ipv6; echo 1 > ipv4/tcp_no_metrics_save"
        settings += f"; echo {0 if keeps_window else 1} > ipv4/tcp_slow_start_after_idle"
        _ip(*inside, "sh", "-c", f"cd /proc/sys/net && ({settings}) 2>/dev/null || true")
        _ip(*inside, "ip", "address", "add", f"{address}/30", "dev", interface)
        link = ("dev", interface, "mtu", str(MTU), "txqueuelen", str(QUEUE_PACKETS), "up")
        _ip(*inside, "ip", "link", "set", *link)
        _ip(*inside, "ip", "link", "set", "dev", "lo", "up")
        with contextlib.suppress(LinkError):  # a kernel without it uses what this machine has set
            network = ("10.77.0.0/30", "dev", interface, "proto", "kernel", "scope", "link", "src", address)
            _ip(*inside, "ip", "route", "change", *network, "congctl", CONGESTION_CONTROL)
    return tuns


def remove(name: str) -> None:
    """End whatever runs in the namespaces of a link and remove them; those that are gone are no error."""
    for side in ADDRESSES:
        namespace = namespace_of(name, side)
        with contextlib.suppress(LinkError):
            for number in (signal.SIGTERM, signal.SIGKILL):
                deadline = time.monotonic() + ENDING_S
                if _signal_all(namespace, number):
                    while _ip("netns", "pids", namespace).split() and time.monotonic() < deadline:
                        time.sleep(0.02)
            _ip("netns", "del", namespace)


def _signal_all(namespace: str, number: signal.Signals) -> bool:
    """Signal every process in a namespace, which is ours alone; return whether there was one."""
    pids = [int(pid) for pid in _ip("netns", "pids", namespace).split()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(pids)


class Direction:
    """One direction: reads packets from a TUN, holds them in its queue, writes them to the other TUN."""

    def __init__(self, source: int, target: int, shape: LinkShape) -> None:
        self.source, self.target = source, target
        self.queue: DueTimeQueue[bytes] = DueTimeQueue(shape)
        self.lateness = Lateness()

    def take(self) -> None:
        """Read what the TUN has, up to a limit."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(READ_AT_ONCE):
                packet = os.read(self.source, MTU)
                self.queue.push(packet, len(packet), time.monotonic())

    def deliver(self) -> None:
        """Write what is due."""
        while (due := self.queue.pop(now := time.monotonic())) is not None:
            self.lateness.note(now - due[0])
            # An interface that is not up refuses packets; a real link would lose them as well.
            with contextlib.suppress(OSError):
                os.write(self.target, due[1])

    def figures(self) -> dict[str, Any]:
        """Return counts, and how late packets left."""
        queue = self.queue
        return {
            "packets": queue.packets,
            "bytes": queue.bytes,
            "dropped": queue.dropped,
            "late_ms": self.lateness.figures(),
        }


def _statistics(up: Direction, down: Direction) -> dict[str, Any]:
    return {"up": up.figures(), "down": down.figures(), "cpu_s": round(time.process_time(), 3)}


def forward(up: Direction, down: Direction, control: int) -> None:
    """Move packets until ``control`` ends; each line on it is answered with statistics on stdout."""
    while True:
        up.deliver()
        down.deliver()
        dues = [due for queue in (up.queue, down.queue) if (due := queue.next_due()) is not None]
        # select takes microseconds; epoll would round the time up to whole milliseconds.
        wait_s = max(0.0, min(dues) - time.monotonic()) if dues else None
        ready, _, _ = select.select([up.source, down.source, control], [], [], wait_s)
        for direction in (up, down):
            if direction.source in ready:
                direction.take()
        if control in ready:
            asked = os.read(control, 4096)
            if not asked:
                return
            for _ in range(asked.count(b"\n")):
                print(json.dumps(_statistics(up, down)), flush=True)


def _be_punctual() -> str:
    """Run before other processes where that is allowed, as a link needs no CPU; return how that went."""
    gc.disable()
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        return "ordinary"
    return "real-time"


def _end_on_sigterm(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that the namespaces are removed on the way out."""
    raise SystemExit(128 + number)


def main() -> None:
    """Make the link, forward until stdin ends, remove the link."""
    name, shapes = sys.argv[1], json.loads(sys.argv[2])
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    try:
        try:
            tuns = _join(name, shapes["keeps_window"])
        except (LinkError, OSError) as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return
        up = Direction(tuns["edge"], tuns["cloud"], LinkShape(**shapes["up"]))
        down = Direction(tuns["cloud"], tuns["edge"], LinkShape(**shapes["down"]))
        print(json.dumps({"addresses": ADDRESSES, "priority": _be_punctual()}), flush=True)
        forward(up, down, sys.stdin.fileno())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # let the removal itself come to its end
        remove(name)


def command(name: str, up: LinkShape, down: LinkShape, keeps_window: bool = False) -> list[str]:
    """Return the command line that `main` reads."""
    shapes = json.dumps({"up": asdict(up), "down": asdict(down), "keeps_window": keeps_window})
    return [sys.executable, "-m", "benchmarks.link_tun", name, shapes]


if __name__ == "__main__":
    main()
