"""The rule for *exact*, on candidates that are wrong in every way it knows."""

from collections.abc import Sequence

import pytest

from shared.exactness import TIE_GAP, TOKENS_PER_TIE, Comparison, Greedy, compare

PROMPT = (7, 7)
TOKENS = (10, 11, 12, 13, 14)
SECONDS = (20, 21, 22, 23, 24)


def reference(gaps: Sequence[float] = (1.0,) * 5) -> Greedy:
    return Greedy(PROMPT, TOKENS, SECONDS, tuple(gaps))


class Candidate:
    """Continues with the reference's tokens, except where told otherwise; records what it was asked."""

    def __init__(self, wrong: dict[int, int] | None = None, length: int = len(TOKENS)) -> None:
        self.wrong, self.length, self.asked = wrong or {}, length, []

    def __call__(self, ids: list[int], new_tokens: int) -> list[int]:
        self.asked.append(list(ids))
        done = len(ids) - len(PROMPT)
        out = [self.wrong.get(i, TOKENS[i]) for i in range(done, min(done + new_tokens, self.length))]
        for i in self.wrong:  # off the reference's path, everything is different
            if i >= done:
                out[i + 1 - done :] = [99] * len(out[i + 1 - done :])
                break
        return out


def test_identical_tokens_are_exact() -> None:
    verdict = compare([reference(), reference()], Candidate())
    assert verdict.exact
    assert (verdict.tokens, verdict.prompts, verdict.ties, verdict.mismatches) == (10, 2, 0, 0)


def test_a_difference_without_a_tie_is_a_mismatch_and_ends_the_prompt() -> None:
    candidate = Candidate({2: SECONDS[2]})
    verdict = compare([reference()], candidate)
    assert not verdict.exact
    assert (verdict.mismatches, verdict.tokens, len(candidate.asked)) == (1, 3, 1)
    assert "MISMATCH: prompt 0, new token 2: expected id 12, got 22" in str(verdict)


def test_a_tie_is_excused_and_what_follows_is_still_compared() -> None:
    candidate = Candidate({2: SECONDS[2]})
    verdict = compare([reference((1, 1, TIE_GAP / 2, 1, 1))], candidate)
    assert verdict.exact
    assert (verdict.ties, verdict.tokens) == (1, 5)
    assert candidate.asked == [[*PROMPT], [*PROMPT, 10, 11, 12]]  # goes on from the reference's token
    assert "tie: prompt 0, new token 2" in str(verdict)
    assert verdict.smallest_gap == TIE_GAP / 2


def test_a_mismatch_behind_a_tie_is_found() -> None:
    verdict = compare([reference((1, TIE_GAP / 2, 1, 1, 1))], Candidate({1: SECONDS[1], 4: 0}))
    assert (verdict.ties, verdict.mismatches) == (1, 1)
    assert not verdict.exact


def test_a_tie_excuses_no_third_token() -> None:
    assert compare([reference((1, TIE_GAP / 2, 1, 1, 1))], Candidate({1: 50})).mismatches == 1


def test_a_gap_at_the_bound_is_no_tie() -> None:
    assert compare([reference((1, TIE_GAP, 1, 1, 1))], Candidate({1: SECONDS[1]})).mismatches == 1


def test_a_tie_at_the_last_token_asks_for_nothing_more() -> None:
    candidate = Candidate({4: SECONDS[4]})
    assert compare([reference((1, 1, 1, 1, 0.0))], candidate).exact
    assert len(candidate.asked) == 1


def test_stopping_early_is_a_mismatch() -> None:
    verdict = compare([reference((0.0,) * 5)], Candidate(length=3))
    assert not verdict.exact
    assert verdict.differences[0].got is None


@pytest.mark.parametrize(("tokens", "allowed"), [(1, 1), (TOKENS_PER_TIE, 1), (TOKENS_PER_TIE + 1, 2)])
def test_one_tie_per_5000_tokens(tokens: int, allowed: int) -> None:
    assert Comparison(tokens=tokens).ties_allowed == allowed


def test_too_many_ties_are_not_exact() -> None:
    verdict = compare([reference((0.0,) * 5)], Candidate({1: SECONDS[1], 3: SECONDS[3]}))
    assert (verdict.ties, verdict.mismatches) == (2, 0)
    assert not verdict.exact


def test_nothing_compared_is_not_exact() -> None:
    assert not compare([], Candidate()).exact
