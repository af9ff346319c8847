"""Measure a link from its two ends: round trips of one byte, and a bulk TCP transfer each way.

    python -m benchmarks.link_probe serve HOST             on the cloud's side; prints its port
    python -m benchmarks.link_probe measure HOST:PORT ...  on the edge's side; prints one JSON line
    python -m benchmarks.link_probe swap HOST:PORT --up 663000 --down 297000

The last one says what TCP alone takes for so many bytes up and, when all are there, so many down, over a
connection that has carried as many before and then been quiet: what a prompt's messages cost at least.

It is TCP throughout, as what is measured over the link will be, so the same probe fits both kinds of
link. Imports only the standard library, to start quickly in a namespace.
"""

import argparse
import contextlib
import json
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator

PIECE = bytes(1 << 16)
TIMEOUT_S = 30.0
# Linux's default, asked for here so that a link's check does not depend on what this machine has set:
# BBR, for one, loses a constant share of its packets in a buffer of one round trip.
CONGESTION_CONTROL = b"cubic"


def _set_up(connection: socket.socket) -> None:
    """Send small pieces at once; control congestion in the same way everywhere, where that can be chosen."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(AttributeError, OSError):  # Linux only; a kernel may not have it
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL)


def _receive_line(connection: socket.socket) -> bytes:
    """Read up to a line end, one byte at a time so that nothing after it is taken."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise ConnectionError("the other side went away")
        line += byte
    return line


def _send_until_closed(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(PIECE)


def _receive(connection: socket.socket, count: int) -> None:
    """Receive exactly ``count`` bytes."""
    buffer = bytearray(min(count, 1 << 18))
    while count:
        if not (received := connection.recv_into(buffer, min(count, len(buffer)))):
            raise ConnectionError("the other side went away")
        count -= received


class _Counter:
    """Bytes received so far, one connection at a time."""

    def __init__(self) -> None:
        self._received = 0

    def drain(self, connection: socket.socket) -> None:
        """Receive and count until the connection ends."""
        buffer = bytearray(1 << 18)
        with contextlib.suppress(OSError):
            while received := connection.recv_into(buffer):
                self._received += received

    def rate(self, warm_up_s: float, seconds: float) -> float:
        """Return bytes a second over ``seconds``, after a time in which TCP finds the rate."""
        time.sleep(warm_up_s)
        before, started = self._received, time.perf_counter()
        time.sleep(seconds)
        return (self._received - before) / (time.perf_counter() - started)


# --- the cloud's side -------------------------------------------------------------------------------


def _answer(connection: socket.socket, uploads: _Counter) -> None:
    with connection, contextlib.suppress(ConnectionError, TimeoutError):
        connection.settimeout(TIMEOUT_S)
        _set_up(connection)
        kind, *rest = _receive_line(connection).split()
        if kind == b"echo":
            while piece := connection.recv(1 << 16):
                connection.sendall(piece)
        elif kind == b"down":
            _send_until_closed(connection)
        elif kind == b"up":
            uploads.drain(connection)
        elif kind == b"rate":
            connection.sendall(json.dumps(uploads.rate(*map(float, rest))).encode() + b"\n")
        elif kind == b"swap":
            up, down = map(int, rest)
            while True:
                _receive(connection, up)
                connection.sendall(bytes(down))


def serve(host: str) -> None:
    """Answer probes for ever, on a free port whose number is printed first."""
    uploads = _Counter()
    with socket.create_server((host, 0), backlog=64) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_answer, args=(connection, uploads), daemon=True).start()


# --- the edge's side --------------------------------------------------------------------------------


def _ask(address: tuple[str, int], line: str) -> socket.socket:
    connection = socket.create_connection(address, TIMEOUT_S)
    _set_up(connection)
    connection.sendall(line.encode() + b"\n")
    return connection


@contextlib.contextmanager
def _transfer(address: tuple[str, int], kind: str, work: Callable[[socket.socket], None]) -> Iterator[None]:
    """Keep a connection busy for the length of the block."""
    connection = _ask(address, kind)
    thread = threading.Thread(target=work, args=(connection,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        # What is still in the socket's buffer must not travel into the next measurement.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        thread.join(TIMEOUT_S)


def congestion_control(address: tuple[str, int]) -> str:
    """Return how TCP finds its rate on this link unless a process asks for another way, as we do here."""
    with socket.create_connection(address, TIMEOUT_S) as connection:
        try:
            name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        except (AttributeError, OSError):
            return "unknown"
    return name.rstrip(b"\0").decode()


def round_trips(address: tuple[str, int], count: int) -> list[float]:
    """Return the seconds of each of ``count`` echoes, one after the other, after one that does not count."""
    taken = []
    with _ask(address, "echo") as connection:
        for _ in range(count + 1):
            started = time.perf_counter()
            connection.sendall(b"x")
            if not connection.recv(1):
                raise ConnectionError("the other side went away")
            taken.append(time.perf_counter() - started)
    return taken[1:]


def swaps(address: tuple[str, int], up: int, down: int, rounds: int, pause_s: float) -> list[float]:
    """Return the seconds of ``rounds`` swaps of bytes, a pause before each, after one that does not count."""
    taken = []
    with _ask(address, f"swap {up} {down}") as connection:
        for _ in range(rounds + 1):
            time.sleep(pause_s)
            started = time.perf_counter()
            connection.sendall(bytes(up))
            _receive(connection, down)
            taken.append(time.perf_counter() - started)
    return taken[1:]


def download(address: tuple[str, int], warm_up_s: float, seconds: float) -> float:
    """Return bytes a second from the cloud's side to here."""
    counter = _Counter()
    with _transfer(address, "down", counter.drain):
        return counter.rate(warm_up_s, seconds)


def upload(address: tuple[str, int], warm_up_s: float, seconds: float) -> float:
    """Return bytes a second from here to the cloud's side, counted there.

    The question travels before the link is full, the answer the other way: neither waits in a buffer.
    """
    with (
        _ask(address, f"rate {warm_up_s} {seconds}") as reply,
        _transfer(address, "up", _send_until_closed),
    ):
        return float(json.loads(_receive_line(reply)))


def main() -> None:
    """Serve, or measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("host")
    measure = commands.add_parser("measure")
    measure.add_argument("address", help="HOST:PORT of the serving side")
    measure.add_argument("--echoes", type=int, default=20)
    measure.add_argument("--warm-up-s", type=float, default=1.0)
    measure.add_argument("--seconds", type=float, default=1.5)
    swap = commands.add_parser("swap")
    swap.add_argument("address", help="HOST:PORT of the serving side")
    swap.add_argument("--up", type=int, required=True, help="bytes to the serving side")
    swap.add_argument("--down", type=int, required=True, help="bytes back")
    swap.add_argument("--rounds", type=int, default=1)
    swap.add_argument("--pause-s", type=float, default=1.0)
    options = parser.parse_args()
    if options.command == "serve":
        serve(options.host)
        return
    host, _, port = options.address.rpartition(":")
    address = (host, int(port))
    if options.command == "swap":
        print(json.dumps(swaps(address, options.up, options.down, options.rounds, options.pause_s)))
        return
    echoes = round_trips(address, options.echoes)
    figures = {
        "congestion_control": congestion_control(address),
        "rtt_ms": round(1e3 * statistics.median(echoes), 3),
        "rtt_ms_range": [round(1e3 * min(echoes), 3), round(1e3 * max(echoes), 3)],
        "up_mbit_s": round(8e-6 * upload(address, options.warm_up_s, options.seconds), 2),
        "down_mbit_s": round(8e-6 * download(address, options.warm_up_s, options.seconds), 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
