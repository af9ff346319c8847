"""Who is worth waiting for at the first layer: sessions that usually come back soon, and are not late."""

from cloud_server.company import GONE_S, Company


def rested(company: Company, owner: str, seconds: float, times: int = 1) -> None:
    """Let a session rest so long so often, each time from 0 on."""
    for _ in range(times):
        company.rest(owner, 0.0)
        company.come_back(owner, seconds)


def test_nobody_is_expected_of_nobody() -> None:
    company = Company(0.05)
    assert company.is_empty
    assert company.expected_until(0.0, 1.0) is None


def test_a_newcomer_is_expected_for_a_while() -> None:
    company = Company(0.05)
    company.rest("a", 10.0)
    assert not company.is_empty
    assert company.expected_until(10.09, 0.06) is not None
    assert company.expected_until(10.11, 0.06) is None
    assert company.expected_until(10.0, 0.04) is None  # it would take longer than is worth waiting


def test_an_edge_is_known_by_what_it_usually_takes() -> None:
    company = Company(0.05)
    rested(company, "slow", 0.2)
    company.rest("slow", 0.0)
    assert company.expected_until(0.0, 0.1) is None  # others do not wait for it
    assert company.expected_until(0.0, 0.3) is not None
    rested(company, "quick", 0.01)
    company.rest("quick", 0.0)
    assert company.expected_until(0.015, 0.1) is not None
    assert company.expected_until(0.03, 0.1) is None  # late


def test_what_is_usual_follows_the_edge() -> None:
    company = Company(0.05)
    rested(company, "a", 0.01)
    rested(company, "a", 0.2, times=30)
    company.rest("a", 0.0)
    assert company.expected_until(0.0, 0.1) is None
    assert company.expected_until(0.3, 0.25) is not None


def test_a_pause_says_nothing_of_the_next_rest() -> None:
    company = Company(0.05)
    rested(company, "a", 0.01)
    company.rest("a", 0.0)
    assert company.expected_until(GONE_S + 1, 5.0) is None
    assert company.is_empty
    company.come_back("a", GONE_S + 1)
    company.rest("a", 0.0)
    assert company.expected_until(0.015, 0.05) is not None


def test_a_pause_of_the_only_session_says_nothing_either() -> None:
    company = Company(0.05)
    rested(company, "a", 0.01)
    rested(company, "a", 60.0)  # nobody asked meanwhile who is expected
    company.rest("a", 0.0)
    assert company.expected_until(0.0, 0.05) == 0.02


def test_who_leaves_is_not_expected() -> None:
    company = Company(0.05)
    company.rest("a", 0.0)
    assert company.leave("a")
    assert not company.leave("a")
    assert company.expected_until(0.0, 1.0) is None


def test_rested_since() -> None:
    company = Company(0.05)
    company.rest("a", 3.0)
    assert company.rested_since(2.9)
    assert not company.rested_since(3.0)
