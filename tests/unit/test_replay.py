"""Steps taken again are the same steps: as many positions, as many accepted, whatever the model would say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.edge_driver import Answering
from benchmarks.replay import guessed
from tests import families
from tests.unit.edge_fake import split

PROMPT = families.prompts(1)[0]


@pytest.fixture(scope="module")
def edge():
    edge, sessions = split(families.build("llama"))
    return Answering(edge), sessions


@st.composite
def answers(draw):
    """Return an answer of any tokens, and steps (positions, tokens) that yield all after the first."""
    tokens = draw(st.lists(st.integers(3, families.VOCAB - 1), min_size=2, max_size=24))  # none ends it
    left, steps = len(tokens) - 1, []
    while left:
        count = draw(st.integers(1, min(left, 6)))
        steps.append((draw(st.integers(count, max(count, min(left, 9)))), count))
        left -= count
    return tokens, steps


@settings(max_examples=25)
@given(answers())
def test_any_steps_can_be_taken_again(edge, answer):
    tokens, steps = answer
    answering, _ = edge
    again = {"tokens": tokens, "steps": [(*step, 0.1) for step in steps]}
    found = answering.answer(PROMPT, len(tokens), 9, again)
    assert found["tokens"] == tokens
    assert [tuple(step[:2]) for step in found["steps"]] == steps
    undrafted = answering.answer(PROMPT, len(tokens), 0, again)
    assert undrafted["tokens"] == tokens
    assert [tuple(step[:2]) for step in undrafted["steps"]] == [(1, 1)] * (len(tokens) - 1)


def test_an_answer_is_the_models_own_and_counts_what_was_run(edge):
    answering, sessions = edge
    whole = families.build("llama")
    right = whole.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)[
        0, len(PROMPT) :
    ].tolist()
    for draft_tokens in (0, 5):
        found = answering.answer(PROMPT, 20, draft_tokens)
        assert found["tokens"] == right
        spans = [spans[0] for spans, _ in sessions[-1].steps]
        assert (spans[0].start, spans[0].count) == (0, len(PROMPT)), "the session held something already"
        assert [span.count for span in spans[1:]] == [positions for positions, _, _ in found["steps"]]
        assert sum(count for _, count, _ in found["steps"]) == 19


def test_the_whole_model_answers_the_same(edge):
    answering, _ = edge
    alone = Answering(families.build("llama"))
    found, ours = alone.answer(PROMPT, 12), answering.answer(PROMPT, 12)
    assert found["tokens"] == ours["tokens"]
    assert [step[:2] for step in found["steps"]] == [step[:2] for step in ours["steps"]]
    assert alone.first(PROMPT)["token"] == answering.first(PROMPT)["token"] == found["tokens"][0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_as_many_guesses_are_right_as_are_asked_for(text, data):
    at = data.draw(st.integers(0, len(text) - 1))
    accepted = data.draw(st.integers(0, len(text) - at - 1))
    drafted = data.draw(st.integers(accepted, accepted + 5))
    found = guessed(text, at, drafted, accepted)
    assert len(found) == drafted and found[:accepted] == text[at : at + accepted]
    if drafted > accepted:
        assert found[accepted] != text[at + accepted]
