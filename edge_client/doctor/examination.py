"""The order of the looks: each needs some before it, and is skipped where one of these has failed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edge_client.config import EdgeConfig
from edge_client.doctor import certificate, cloud, folders, link, network
from edge_client.doctor.finding import Exam, Finding
from shared.complaint import in_words


@dataclass(frozen=True)
class Check:
    """One look: what it is called, how it is done, what has to be in order before."""

    name: str
    look: Callable[[Exam], Finding]
    needs: tuple[str, ...] = ()
    fix: str = "see what is wrong there, and try again"  # where the look itself has failed


CHECKS = (
    Check("keys", certificate.keys, fix="give the right files, or none; docs/security.md has the commands"),
    Check("name", network.name),
    Check("connection", network.connection, ("name",)),
    Check("tls", certificate.tls, ("keys", "connection")),
    Check("service", cloud.service, ("tls",)),
    Check("token", cloud.token, ("service",)),
    Check("clock", cloud.clock, ("token",)),
    Check("versions", cloud.versions, ("token",)),
    Check("model", cloud.model, ("versions",)),
    Check("adapter", cloud.adapter, ("model",)),
    Check("folders", folders.folders),
    Check("link", link.link, ("adapter",)),
)


def addresses(settings: EdgeConfig) -> list[str]:
    """Return each address of the cloud: it may have several, of replicas."""
    return settings.cloud.split(",")


def examine(settings: EdgeConfig, address: str, *, with_link: bool = True) -> Iterator[Finding]:
    """Look at everything in order, and yield what was found as it is found.

    Parameters
    ----------
    settings
        With which files, and what is meant to be served; nothing of them is changed.
    address
        Which cloud, or which of its replicas (HOST:PORT).
    with_link
        Whether to measure the link, which takes some seconds.
    """
    exam = Exam(settings, address)
    in_order: set[str] = set()
    for check in CHECKS:
        if check.name == "link" and not with_link:
            continue
        if lacking := [name for name in check.needs if name not in in_order]:
            found = Finding("skipped", f"needs {' and '.join(lacking)} first")
        else:
            try:
                found = check.look(exam)
            except (ValueError, OSError, RuntimeError) as error:
                found = Finding("failed", in_words(error), check.fix)
        if found.verdict in ("ok", "warning"):
            in_order.add(check.name)
        yield replace(found, check=check.name)
