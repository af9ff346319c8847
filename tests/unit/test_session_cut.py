"""Cutting a step into chunks: nothing is lost, nothing is said twice, kept positions stay the last ones."""

from hypothesis import given
from hypothesis import strategies as st

from edge_client.spans import Span, cut

SPAN = st.tuples(st.integers(0, 50), st.integers(1, 40)).flatmap(
    lambda sizes: st.builds(
        Span, st.integers(0, 7), st.just(sizes[0]), st.just(sizes[1]), st.integers(0, sizes[1])
    )
)


def positions(spans: list[Span]) -> list[tuple[int, int]]:
    return [(s.row, s.start + i) for s in spans for i in range(s.count)]


def kept(spans: list[Span]) -> list[tuple[int, int]]:
    return [(s.row, p) for s in spans for p in range(s.start + s.count - s.keep, s.start + s.count)]


@given(spans=st.lists(SPAN, min_size=1, max_size=6), limit=st.integers(1, 64))
def test_chunks_laid_end_to_end_are_the_step(spans: list[Span], limit: int) -> None:
    runs = cut(spans, limit)
    flat = [span for run in runs for span in run]
    assert positions(flat) == positions(spans)
    assert kept(flat) == kept(spans)
    for run in runs[:-1]:
        assert sum(span.count for span in run) == limit
    assert 1 <= sum(span.count for span in runs[-1]) <= limit
    assert all(span.count >= 1 and 0 <= span.keep <= span.count for span in flat)


def test_a_step_that_fits_is_left_alone() -> None:
    spans = [Span(0, 5, 3, 1), Span(1, 0, 4, 4)]
    assert cut(spans, 7) == [spans]


def test_a_long_prompt_keeps_its_last_position_only() -> None:
    assert cut([Span(0, 0, 10, 1)], 4) == [[Span(0, 0, 4, 0)], [Span(0, 4, 4, 0)], [Span(0, 8, 2, 1)]]


def test_a_row_may_be_cut_in_the_middle_of_a_chunk() -> None:
    assert cut([Span(0, 0, 3, 2), Span(1, 7, 3, 3)], 4) == [
        [Span(0, 0, 3, 2), Span(1, 7, 1, 1)],
        [Span(1, 8, 2, 2)],
    ]


def test_nothing_makes_no_chunk() -> None:
    assert cut([], 4) == []
