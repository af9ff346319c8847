"""Who makes the RPC that runs in a task. Set by `cloud_server.guard`, read where sessions and limits are."""

from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Caller:
    """Who calls. ``name`` is the identity that sessions and limits go by."""

    name: str
    token_digest: bytes | None = None
    not_after: datetime | None = None  # when the certificate that it has shown expires


ANONYMOUS = Caller("")  # everybody, where nothing is asked for
_caller: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def caller() -> Caller:
    """Return who made the RPC that runs in this task."""
    return _caller.get()


def set_caller(who: Caller) -> None:
    """State who made the RPC that runs in this task, and in those that it starts."""
    _caller.set(who)
