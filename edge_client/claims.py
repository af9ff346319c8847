"""What an answer may come to need of the KV cache: stated as it begins, so that it is there to the end.

Known where generation begins, stated where streams are opened and steps are sent; between the two lies code
that has nothing to do with it, so it is kept beside the call (a context variable, one value a thread).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from shared.pb.privatelora.v1 import private_lora_pb2 as pb


@dataclass(frozen=True)
class Claim:
    """So many rows, the longest of so many positions."""

    rows: int
    row_tokens: int

    def message(self) -> pb.KvClaim:
        """Return it as a message."""
        return pb.KvClaim(rows=self.rows, row_tokens=self.row_tokens)


_present: ContextVar[Claim | None] = ContextVar("claim", default=None)


def present() -> Claim | None:
    """Return what the answer that is being generated may come to need; None if that is not known."""
    return _present.get()


def state(claim: Claim) -> None:
    """Say what the answer may come to need, from here to the end of `answering`."""
    _present.set(claim)


@contextmanager
def answering() -> Iterator[None]:
    """Forget afterwards what is stated meanwhile."""
    token = _present.set(None)
    try:
        yield
    finally:
        _present.reset(token)
