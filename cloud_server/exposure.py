"""Beyond loopback a cloud is closed by default: encrypted, and open only to those who are let in."""

import ipaddress
import logging
import re
import socket

from cloud_server.config.cloud import CloudConfig

log = logging.getLogger(__name__)

# A host's name. What has no letter is an address, and not everybody reads the same from one like 127.1.
NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9._-]*[a-z0-9.])?", re.IGNORECASE)


def check_exposure(config: CloudConfig) -> None:
    """Refuse to serve the network unprotected, unless that was asked for by name.

    On loopback nothing is asked for: whoever gets there is on this machine.

    Raises
    ------
    ValueError
        If TLS or authentication is missing; the message says what to give.
    """
    if is_local(config.listen):
        return
    plaintext = config.tls_cert is None
    anonymous = config.tokens is None and config.client_ca is None
    if plaintext and not config.allow_plaintext:
        raise ValueError(
            f"{config.listen} is reached from other machines: give --tls-cert and --tls-key "
            "(`privatelora-cloud cert dev` makes some to begin with), or --allow-plaintext if the network "
            "itself is private"
        )
    if anonymous and not config.allow_anonymous:
        raise ValueError(
            f"{config.listen} is reached from other machines: give --tokens FILE (`privatelora-cloud token "
            "add`) or --client-ca FILE, or --allow-anonymous to let everybody in"
        )
    if plaintext:
        log.warning("no TLS on %s: whoever is on the way reads and changes everything", config.listen)
    if anonymous:
        log.warning("no authentication on %s: whoever reaches it is served", config.listen)


def is_local(listen: str) -> bool:
    """Whether an address to listen on is reached from this machine only; False where that is not sure."""
    if listen.startswith(("unix:", "unix-abstract:")):
        return True
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    if not NAME.fullmatch(host):
        return False
    try:  # as those who listen ask: without that flag, what stands for every address is loopback
        places = {
            place[4][0]
            for place in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        }
    except (OSError, UnicodeError):
        return False
    return bool(places) and all(ipaddress.ip_address(str(p).partition("%")[0]).is_loopback for p in places)
