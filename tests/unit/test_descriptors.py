"""A cloud takes the descriptors that its bound on connections needs, or says that there are too few."""

import resource
from collections.abc import Iterator

import pytest

from cloud_server.descriptors import OWN, make_room


class Limits:
    """Stands in for this process's own."""

    def __init__(self, soft: int, hard: int, monkeypatch: pytest.MonkeyPatch, *, fixed: bool = False) -> None:
        self.found, self._fixed = (soft, hard), fixed
        monkeypatch.setattr(resource, "getrlimit", lambda _: self.found)
        monkeypatch.setattr(resource, "setrlimit", self._set)

    def _set(self, _: int, limits: tuple[int, int]) -> None:
        if self._fixed:
            raise ValueError("not allowed to raise maximum limit")
        self.found = limits


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level("INFO")
    yield caplog


def test_what_is_lacking_is_taken(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    for hard in (1 << 20, resource.RLIM_INFINITY):
        limits = Limits(1024, hard, monkeypatch)
        make_room(4096)
        assert limits.found == (4096 + OWN, hard) and not said.text


@pytest.mark.parametrize("soft", [4096 + OWN, resource.RLIM_INFINITY])
def test_what_is_enough_stays(
    soft: int, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    limits = Limits(soft, resource.RLIM_INFINITY, monkeypatch)
    make_room(4096)
    assert limits.found[0] == soft and not said.text


@pytest.mark.parametrize(("fixed", "left"), [(False, 2000), (True, 1024)])
def test_too_few_are_said_to_be_so(
    fixed: bool, left: int, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    limits = Limits(1024, 2000, monkeypatch, fixed=fixed)
    make_room(4096)
    assert limits.found == (left, 2000)
    assert f"only {left} files and connections may be open" in said.text and "ulimit -n" in said.text
