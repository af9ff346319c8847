"""Whether the cloud's name is known, and anything listens there. Nothing is sent."""

import os
import socket
import time

from edge_client.doctor.finding import Exam, Finding, failed, ok, warning

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # what gRPC obeys, in its order


def name(exam: Exam) -> Finding:
    """Look the cloud's name up."""
    try:
        found = socket.getaddrinfo(exam.host, exam.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return failed(
            f"the name {exam.host!r} is not known here ({getattr(error, 'strerror', None) or error})",
            "check the spelling of --cloud and this machine's DNS (`getent hosts NAME`); an IP address works "
            "too if the cloud's certificate names it",
        )
    addresses = list(dict.fromkeys(str(place[4][0]) for place in found))
    is_number = addresses == [exam.host]
    says = f"{exam.host} needs no look-up" if is_number else f"{exam.host} is {', '.join(addresses)}"
    return ok(says, addresses=addresses)


def connection(exam: Exam) -> Finding:
    """Open a TCP connection to the port."""
    started = time.perf_counter()
    try:
        with socket.create_connection((exam.host, exam.port), exam.settings.connect_timeout_s) as open_one:
            address = str(open_one.getpeername()[0])
    except (OSError, OverflowError) as error:
        return failed(*_unreachable(exam, error))
    taken_ms = round(1e3 * (time.perf_counter() - started), 3)
    says = f"port {exam.port} of {address} is open ({taken_ms:.1f} ms)"
    if proxy := next((name for name in PROXIES if os.environ.get(name)), None):
        return warning(
            f"{says}, but {proxy} is set: gRPC may go through that proxy, which this doctor does not",
            f"unset {proxy}, or put {exam.host} into no_proxy, unless the way is through the proxy",
            connect_ms=taken_ms,
        )
    return ok(says, connect_ms=taken_ms)


def _unreachable(exam: Exam, error: Exception) -> tuple[str, str]:
    """Return what is wrong, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        return (
            f"nothing listens on port {exam.port} of {exam.host}",
            "is `privatelora-cloud serve` running there, with a --listen that this machine reaches (not "
            "127.0.0.1 of another machine), and is the port right? It takes a while to load its model first",
        )
    if isinstance(error, TimeoutError):
        return (
            f"port {exam.port} of {exam.host} does not answer within {exam.settings.connect_timeout_s:g} s",
            "a firewall on the way may drop packets: let this machine through to that port, or check that "
            "the machine is up",
        )
    return (
        f"there is no way to {exam.target} ({getattr(error, 'strerror', None) or error})",
        "check this machine's network and the address",
    )
