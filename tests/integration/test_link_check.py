"""The emulated link's check of itself: what is off is named, and such a link is refused."""

import threading

import pytest

from benchmarks import link_check
from benchmarks.link import PRESETS, Link, LinkError, Preset
from benchmarks.link_check import deviations
from tests.integration.link_sides import LACKING, SLOW

pytestmark = pytest.mark.alone


def test_loopback_joins_nothing() -> None:
    with Link(PRESETS["loopback"], check=False) as link:
        assert (link.cloud_prefix, link.edge_prefix, link.address(5)) == ((), (), "127.0.0.1:5")


def test_a_check_names_what_is_off() -> None:
    right = {"rtt_ms": 20.5, "up_mbit_s": 57.9, "down_mbit_s": 96.5}
    assert deviations(right, PRESETS["5g"]) == []
    assert deviations({**right, "rtt_ms": 23.1}, PRESETS["5g"]) == ["a round trip takes 23.1 ms, not 20"]
    assert deviations({**right, "rtt_ms": 16.9}, PRESETS["5g"]) != []
    assert deviations({**right, "up_mbit_s": 53.0}, PRESETS["5g"]) == ["up carries 53.0 Mbit/s, not 60"]
    assert deviations({**right, "down_mbit_s": 111.0}, PRESETS["5g"]) == [
        "down carries 111.0 Mbit/s, not 100"
    ]


def test_a_link_that_is_not_what_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is given another delay than the preset says, and its check is a real one."""
    honest = Preset.shape
    slower = {"rtt_ms": SLOW.rtt_ms + 20}
    monkeypatch.setattr(link_check, "CHECKS", 1)
    monkeypatch.setattr(Preset, "shape", lambda self, rate: honest(self.model_copy(update=slower), rate))
    before = set(threading.enumerate())
    with pytest.raises(LinkError, match="a round trip takes .* ms, not 30"), Link(SLOW, "proxy"):
        pytest.fail("it should not have been entered")
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(LACKING is None, reason="this machine can make namespaces")
def test_asking_for_namespaces_where_there_are_none_says_what_is_missing() -> None:
    with pytest.raises(LinkError, match="which is missing here"), Link(SLOW, "namespaces", check=False):
        pytest.fail("it should not have been entered")
