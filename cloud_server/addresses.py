"""The addresses that a cloud listens on: looked at before the model is fetched and loaded.

Loading takes minutes, and that somebody else has a port can be said at once. It may still be taken meanwhile:
who listens then says the same words.
"""

import contextlib
import errno
import itertools
import socket
from typing import TYPE_CHECKING, Any

from cloud_server.config.observation import METRICS_OFF

if TYPE_CHECKING:
    from cloud_server.config.cloud import CloudConfig


def check_addresses(config: "CloudConfig") -> None:
    """Refuse addresses that were asked for and are taken.

    Raises
    ------
    OSError
        If somebody listens on one of them already.
    ValueError
        If one is given for two purposes.
    """
    wanted = {"--listen": config.listen, "--metrics": config.metrics, "--health": config.health}
    given = {flag: address for flag, address in wanted.items() if address not in (None, METRICS_OFF)}
    for (one, address), (two, other) in itertools.combinations(given.items(), 2):
        if address == other and not str(address).endswith(":0"):
            raise ValueError(f"{one} and {two} are both {address}: give each a port of its own")
    if is_taken(config.listen):
        raise cannot_listen(config.listen)
    if "--metrics" in given and is_taken(str(config.metrics)):
        raise cannot_serve_metrics(str(config.metrics))
    if "--health" in given and is_taken(str(config.health)):
        raise cannot_answer_probes(str(config.health))


def is_taken(address: str) -> bool:
    """Whether somebody listens at HOST:PORT; what else may be wrong with it is found by who listens there."""
    host, _, port = address.rpartition(":")
    places = []
    with contextlib.suppress(OSError, ValueError):  # an address that only gRPC can make sense of
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    return bool(places) and all(_is_taken(place[0], place[4]) for place in places)


def cannot_listen(address: str) -> OSError:
    """Return the error of a cloud that cannot listen there."""
    return OSError(
        errno.EADDRINUSE,
        f"cannot listen on {address}: the port is taken or the address is not ours; give --listen another "
        "HOST:PORT",
    )


def cannot_serve_metrics(address: str) -> OSError:
    """Return the error of a cloud that cannot serve metrics there."""
    return OSError(
        errno.EADDRINUSE,
        f"cannot serve metrics on {address}: the port is taken or the address is not ours; give --metrics "
        "another HOST:PORT, or off",
    )


def cannot_answer_probes(address: str) -> OSError:
    """Return the error of a cloud that cannot answer probes there."""
    return OSError(
        errno.EADDRINUSE,
        f"cannot answer probes on {address}: the port is taken or the address is not ours; give --health "
        "another HOST:PORT",
    )


def _is_taken(family: int, address: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
