"""What a look at one thing has found, and what is known so far for the looks that follow."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edge_client.config import EdgeConfig
from edge_client.credentials import Credentials
from edge_client.offer import CloudOffer
from edge_client.plain import printable
from shared.adapter import Adapter
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A verdict on one thing.

    Parameters
    ----------
    verdict
        ``failed`` is what keeps this edge from working; ``skipped`` could not be looked at.
    says
        What was found, for people.
    fix
        What to do about it; empty where nothing has to be done.
    facts
        The same for programs: plain values, named with their units.
    """

    verdict: Verdict
    says: str
    fix: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what a cloud wrote holds no control characters."""
        words = {"check": self.check, "verdict": self.verdict, "says": printable(self.says)}
        return {**words, "fix": printable(self.fix), "facts": dict(self.facts)}


def ok(says: str, **facts: Any) -> Finding:
    """Return that a thing is as it should be."""
    return Finding("ok", says, facts=facts)


def warning(says: str, fix: str, **facts: Any) -> Finding:
    """Return that a thing works but may not for long, or not well."""
    return Finding("warning", says, fix, facts)


def failed(says: str, fix: str, **facts: Any) -> Finding:
    """Return that a thing has to be mended first."""
    return Finding("failed", says, fix, facts)


@dataclass
class Exam:
    """What is known so far of the cloud at one address; each look fills in what it learns.

    ``target`` is that address, HOST:PORT. ``asked_at`` and ``answered_at`` are this machine's clock around
    the `Describe` (seconds since 1970).
    """

    settings: EdgeConfig
    target: str
    credentials: Credentials = field(default_factory=Credentials)
    response: pb.DescribeResponse | None = None
    asked_at: float = 0.0
    answered_at: float = 0.0
    offer: CloudOffer | None = None
    adapter: Adapter | None = None

    @property
    def host(self) -> str:
        """Return the cloud's name or address, without brackets."""
        return self.target.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the cloud's port."""
        return int(self.target.rpartition(":")[2])
