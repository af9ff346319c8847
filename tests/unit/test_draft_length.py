"""The length of drafts: worth its cost by the estimates, and bounded in its loss whatever they say."""

import itertools

import pytest

from edge_client.draft_length import (
    CREDIT_SHARE,
    CREDIT_STEPS,
    Acceptance,
    Allowance,
    StepTimes,
    best_length,
    expected_tokens,
)


def line(base: float, slope: float, limit: int) -> list[float]:
    return [base + slope * n for n in range(limit + 1)]


def test_expected_tokens_is_the_mean_over_all_outcomes():
    first, later, limit = 0.6, 0.9, 4
    chances = [first] + [later] * (limit - 1)
    mean = 0.0
    for right in itertools.product([True, False], repeat=limit):
        chance = 1.0
        for is_right, p in zip(right, chances, strict=True):
            chance *= p if is_right else 1 - p
        accepted = right.index(False) if False in right else limit
        mean += chance * (1 + accepted)
    assert expected_tokens(first, later, limit)[limit] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("base", "slope", "first", "later", "length"),
    [
        (1.0, 0.0, 0.5, 0.5, 8),  # free: nothing bounds it but the limit
        (1.0, 0.25, 0.2, 0.8, 0),  # a token costs more than it is likely to save
        (1.0, 0.25, 0.9, 0.9, 8),
        (1.0, 0.25, 0.9, 0.5, 2),
        (1.0, 2.0, 1.0, 1.0, 0),  # as long as a step of its own and more: not even when always right
        (100.0, 0.25, 0.2, 0.8, 8),  # the same step far away
    ],
)
def test_the_length_weighs_cost_against_chance(base, slope, first, later, length):
    found, gain = best_length(expected_tokens(first, later, 8), line(base, slope, 8), 1 / base)
    assert found == length
    assert (gain > 0) == (length > 0)


def test_no_other_length_is_faster_over_an_answer():
    """Half of the contexts have a good match, half none: tokens a second over both, for every length."""
    times, tokens = line(1.0, 0.25, 8), expected_tokens(0.8, 0.8, 8)
    speeds = [(tokens[n] + tokens[0]) / (times[n] + times[0]) for n in range(9)]
    best = max(range(9), key=speeds.__getitem__)
    assert best_length(tokens, times, max(speeds))[0] == best
    step_alone = max(range(9), key=lambda n: tokens[n] / times[n])
    assert step_alone != best, "the example tells the two apart"


def test_nothing_is_drafted_before_a_plain_step_was_measured():
    times = StepTimes()
    assert times.estimate(3) is None
    times.note(3, 1.0)
    assert times.estimate(3) is None


def test_step_times_follow_what_is_measured():
    times = StepTimes()
    times.note(1, 0.1)
    assert times.estimate(4) == pytest.approx([0.1, 0.125, 0.15, 0.175, 0.2])  # the prior
    for _ in range(20):
        times.note(1, 0.1)
        times.note(5, 0.12)
    estimate = times.estimate(8)
    assert estimate[4] == pytest.approx(0.12, rel=0.02)
    assert estimate[8] == pytest.approx(0.14, rel=0.05)
    assert estimate == sorted(estimate)


def test_a_stall_does_not_move_the_estimate():
    times = StepTimes()
    for seconds in [0.1] * 8 + [30.0] + [0.1] * 3:
        times.note(1, seconds)
    assert times.estimate(0) == [0.1]


def test_a_stall_in_a_longer_step_does_not_end_drafting():
    times = StepTimes()
    for seconds in [0.1] * 10:
        times.note(1, seconds)
    for positions in (2, 3, 4, 3):
        times.note(positions, 0.1 + 0.005 * (positions - 1))
    times.note(5, 3.0)
    assert times.estimate(4)[1] == pytest.approx(0.105, rel=0.02)


def test_another_network_replaces_the_estimate():
    times = StepTimes()
    for seconds in [0.1] * 40 + [0.02] * 32:
        times.note(1, seconds)
    assert times.estimate(0) == [0.02]


def test_acceptance_learns_by_source_and_match_and_forgets():
    seen = Acceptance()
    prior = seen.rates("session", 2)
    assert [seen.rates("session", n)[0] for n in (1, 2, 3, 5, 20)] == sorted(
        seen.rates("session", n)[0] for n in (1, 2, 3, 5, 20)
    )
    for _ in range(30):
        seen.note("session", 2, 4, 0)
    assert seen.rates("session", 2)[0] < prior[0] / 3
    assert seen.rates("session", 3) == Acceptance().rates("session", 3)
    assert seen.rates("documents", 2) == Acceptance().rates("documents", 2)
    low = seen.rates("session", 2)[0]
    for _ in range(300):
        seen.idle("session", 2)
    assert low < seen.rates("session", 2)[0] == pytest.approx(prior[0], rel=0.05)
    for _ in range(30):
        seen.note("session", 2, 4, 4)
    first, later = seen.rates("session", 2)
    assert first > 0.8 and later > 0.9


@pytest.mark.parametrize("slope", [0.01, 0.25, 0.5, 3.0])
def test_what_is_always_wrong_costs_a_few_percent_at_most(slope):
    """Whoever drafts as much as the allowance lets him, and is never right."""
    times, allowance, spent = line(1.0, slope, 8), Allowance(), 0.0
    for token in range(1, 401):
        drafted = allowance.affordable(times)
        spent += times[drafted]
        allowance.note(1, times[drafted], times[0])
        assert spent <= token * (1 + CREDIT_SHARE) + CREDIT_STEPS + 1e-9


def test_what_drafts_saved_may_be_risked():
    times, allowance = line(1.0, 0.25, 8), Allowance()
    assert allowance.affordable(times) == 2
    allowance.note(3, times[2], times[0])
    assert allowance.affordable(times) == 8
    for _ in range(100):
        allowance.note(1, times[8], times[0])
    assert allowance.affordable(times) == 0
