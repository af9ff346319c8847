"""Room for connections: each takes a descriptor, of which a process has so many.

A shell gives 1,024 of them by default and lets a program take more, so a cloud takes what its bound on
connections needs. Without one left it would accept nobody and read no file, and gRPC would say nothing of it.
"""

import logging

from cloud_server.logs import warning

log = logging.getLogger(__name__)

OWN = 128  # for listening, files, and what ranks say to each other; 20 are open when a cloud serves


def make_room(connections: int) -> None:
    """Raise this process's limit of open files for so many connections; warn if that cannot be had.

    Parameters
    ----------
    connections
        The most that are let in (count).
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    needed = connections + OWN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # a system may have a bound besides
        allowed = soft
    if allowed < needed:
        warning(
            log,
            "descriptors_short",
            f"{connections} connections are let in, and only {allowed} files and connections may be open: "
            f"beyond that nobody is heard. Raise the limit to {needed} (`ulimit -n`, LimitNOFILE of a "
            "systemd unit), or lower max_connections",
            allowed=allowed,
            needed=needed,
        )
