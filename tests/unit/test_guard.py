"""Who may go on: whose token is still known and whose certificate has not expired, if shown."""

from datetime import datetime, timedelta, timezone
from pathlib import Path

from cloud_server import tokens
from cloud_server.caller import ANONYMOUS, Caller
from cloud_server.guard import Guard
from cloud_server.tokens import TokenBook

HOUR = timedelta(hours=1)


def test_a_caller_may_go_on_while_all_that_it_has_shown_is_good(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    digest = tokens.digest(tokens.add(file, "alice"))
    guard, now = Guard(TokenBook(file), by_certificate=True), datetime.now(timezone.utc)
    assert guard.may_still(ANONYMOUS)
    assert guard.may_still(Caller("alice", digest))
    assert guard.may_still(Caller("alice", digest, not_after=now + HOUR))
    assert not guard.may_still(Caller("alice", digest, not_after=now - HOUR))
    assert not guard.may_still(Caller("alice", not_after=now - HOUR))
    assert not guard.may_still(Caller("alice", tokens.digest("another"), not_after=now + HOUR))
    assert not guard.may_still(Caller("bob", digest))
    tokens.revoke(file, "alice")
    assert guard.tokens is not None
    guard.tokens.refresh()
    assert not guard.may_still(Caller("alice", digest, not_after=now + HOUR))
