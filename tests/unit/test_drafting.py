"""Drafting must change nothing but the number of steps, whatever is guessed and however long it takes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from edge_client import cli
from edge_client.answer import answer, make_drafter
from edge_client.config import EdgeConfig, SettingsError, load_config
from edge_client.datastore import Datastore, DatastoreError
from edge_client.draft_length import DEFAULT_DRAFT_TOKENS, Allowance
from edge_client.drafting import DraftCounts, Drafter
from edge_client.lookup import Match
from edge_client.positioned import Positioned
from tests import families
from tests.unit.edge_fake import split

PROMPT = torch.tensor([families.prompts(1)[0]])
NEW = 40


class Told(Drafter):
    """Drafts as much of what it is told as the answer has room for, however bad that has been."""

    def __init__(self, texts: Sequence[Sequence[int]], max_tokens: int = 5, wrong_every: int = 0) -> None:
        super().__init__(max_tokens)
        self.texts, self.wrong_every = texts, wrong_every

    def candidates(self, tokens, limit):
        found = []
        for text in self.texts:
            guess = np.array(text[len(tokens) : len(tokens) + limit], dtype=np.int32)
            if self.wrong_every:
                places = np.arange(len(tokens), len(tokens) + len(guess)) % self.wrong_every == 0
                guess = np.where(places, (guess + 1) % families.VOCAB, guess).astype(np.int32)
            found.append(Match("told", 4, guess))
        return found

    def choose(self, matches, limit, rate, allowance: Allowance):
        return (matches[0], len(matches[0].tokens)) if matches else (None, 0)


class Steps(BaseStreamer):
    """What arrives, step by step; the first is the prompt."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def put(self, value):
        self.steps.append(value.flatten().tolist())

    def end(self):
        self.steps.append([])


@pytest.fixture(scope="module")
def whole():
    return families.build("llama")


@pytest.fixture(scope="module")
def right(whole):
    return whole.generate(PROMPT, max_new_tokens=NEW, do_sample=False)[0].tolist()


@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3, 7])
def test_greedy_tokens_do_not_depend_on_the_drafts(whole, right, wrong_every):
    edge, sessions = split(whole)
    drafter = Told([right], wrong_every=wrong_every)
    found = edge.generate(PROMPT, max_new_tokens=NEW, do_sample=False, drafter=drafter)[0].tolist()
    assert found == right
    new, steps = len(right) - PROMPT.shape[1], len(sessions[0].steps)
    assert steps == new - drafter.counts.accepted
    assert (steps < new) == (wrong_every != 1)
    assert sessions[0].positions == PROMPT.shape[1] + steps - 1 + drafter.counts.drafted


@pytest.mark.parametrize("model_type", list(families.FAMILIES))
def test_greedy_tokens_in_every_family(model_type):
    """With a window, rejected drafts are deeper than what some families keep."""
    whole = families.build(model_type)
    prompt = torch.cat([PROMPT, PROMPT], dim=1)
    expected = whole.generate(prompt, max_new_tokens=24, do_sample=False)
    edge, _ = split(whole)
    for drafter in (Told([expected[0].tolist()], 7, wrong_every=4), Drafter()):
        assert torch.equal(
            edge.generate(prompt, max_new_tokens=24, do_sample=False, drafter=drafter), expected
        )


@pytest.mark.parametrize("second", [1e-4, 1.0])
def test_timing_changes_steps_but_no_token(whole, second):
    """One clock on which longer steps cost nothing, one on which each position costs a whole step."""
    prompt = torch.cat([PROMPT] * 3, dim=1)
    expected = whole.generate(prompt, max_new_tokens=NEW, do_sample=False)
    edge, sessions = split(whole)
    now = [0.0]

    def clock():
        positions = sessions[0].steps[-1][0][0].count if sessions else 0
        now[0] += 1.0 + second * positions
        return now[0]

    drafter = Drafter(clock=clock)
    assert torch.equal(edge.generate(prompt, max_new_tokens=NEW, do_sample=False, drafter=drafter), expected)


def test_prompts_that_repeat_take_fewer_steps_by_themselves(whole, right):
    """The real sources and the real choice, on an answer that is in the prompt."""
    edge, _ = split(whole, max_context_tokens=512)
    drafter = Drafter(clock=iter(range(10**6)).__next__)  # every step takes one second
    prompt = torch.tensor([right + right + right[: PROMPT.shape[1] + 8]])
    expected = whole.generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(edge.generate(prompt, max_new_tokens=30, do_sample=False, drafter=drafter), expected)
    assert drafter.counts.drafted > 0


def test_documents_and_earlier_answers_are_drafted_from(whole, right):
    for documents, calls in ((Datastore([right]), 1), (None, 2)):
        edge, sessions = split(whole)
        drafter = Drafter(documents=documents, clock=iter(range(10**6)).__next__)
        other = torch.tensor([[5, 9, 7]])
        for prompt in (PROMPT, other, PROMPT)[-calls if calls == 1 else 0 :]:
            before, count = drafter.counts, sum(len(s.steps) for s in sessions)
            ids = edge.generate(prompt, max_new_tokens=NEW, do_sample=False, drafter=drafter)[0].tolist()
        assert ids == right
        assert (drafter.counts - before).accepted > NEW / 4
        assert sum(len(s.steps) for s in sessions) - count < NEW * 3 / 4


def test_a_continued_conversation_is_no_history(whole):
    edge, _ = split(whole)
    drafter = Drafter()
    first = edge.generate(PROMPT, max_new_tokens=6, do_sample=False, drafter=drafter)
    edge.generate(torch.cat([first, PROMPT], dim=1), max_new_tokens=6, do_sample=False, drafter=drafter)
    assert drafter._history.tokens.size == 0
    edge.generate(torch.tensor([[5, 9, 7]]), max_new_tokens=6, do_sample=False, drafter=drafter)
    assert drafter._history.tokens[: first.shape[1]].tolist() == first[0].tolist()


# --- limits -----------------------------------------------------------------------------------------


def test_drafts_end_where_the_answer_and_the_context_do(whole, right):
    for new, context in ((9, 128), (9, PROMPT.shape[1] + 8), (3, 128), (2, 128), (1, 128)):
        edge, sessions = split(whole, max_context_tokens=context)
        found = edge.generate(PROMPT, max_new_tokens=new, do_sample=False, drafter=Told([right], 64))
        assert found[0].tolist() == right[: PROMPT.shape[1] + new]
        last = max(span.start + span.count for spans, _ in sessions[0].steps for span in spans)
        assert last <= min(context, PROMPT.shape[1] + new - 1)


def test_a_step_has_no_more_positions_than_the_cloud_takes(whole, right):
    for most in (1, 2, 4):
        edge, sessions = split(whole, max_step_tokens=most)
        edge.generate(PROMPT, max_new_tokens=NEW, do_sample=False, drafter=Told([right], 64))
        counts = [span.count for spans, _ in sessions[0].steps[1:] for span in spans]
        assert max(counts) == most


def test_answers_end_at_their_end_token(whole, right):
    at = PROMPT.shape[1] + 12
    end = right[at]
    plain = whole.generate(PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=end)
    edge, _ = split(whole)
    for drafter in (Told([right]), Told([right], wrong_every=3), Drafter(clock=iter(range(10**6)).__next__)):
        found = edge.generate(PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=end, drafter=drafter)
        assert torch.equal(found, plain)


def test_a_stopping_rule_sees_every_token(whole, right):
    """Any rule may hold in the middle of a step, so nothing is drafted under rules that we do not know."""

    class At(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids[0, -1].item() == right[PROMPT.shape[1] + 7])

    edge, _ = split(whole)
    rules = StoppingCriteriaList([At()])
    plain = whole.generate(PROMPT, max_new_tokens=NEW, do_sample=False, stopping_criteria=rules)
    drafter = Told([right])
    found = edge.generate(
        PROMPT, max_new_tokens=NEW, do_sample=False, stopping_criteria=rules, drafter=drafter
    )
    assert torch.equal(found, plain) and found.shape[1] < len(right)
    assert drafter.counts == DraftCounts()


def test_stop_strings_stop(whole, right):
    edge, _ = split(whole)
    words = families.tokenizer()
    options = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": words}
    options["stop_strings"] = [words.decode(right[PROMPT.shape[1] + 5 : PROMPT.shape[1] + 6])]
    found = edge.generate(PROMPT, drafter=Told([right]), **options)
    assert torch.equal(found, whole.generate(PROMPT, **options))


def test_a_streamer_gets_the_tokens_of_each_step(whole, right):
    edge, sessions = split(whole)
    streamer = Steps()
    edge.generate(PROMPT, max_new_tokens=NEW, do_sample=False, streamer=streamer, drafter=Told([right]))
    assert [token for step in streamer.steps for token in step] == right
    assert len(streamer.steps) == len(sessions[0].steps) + 2  # the prompt, the end


def test_what_cannot_be_drafted_for_is_refused(whole):
    edge, _ = split(whole)
    for options, message in (
        ({"num_beams": 3}, "3 beams"),
        ({"prompt_lookup_num_tokens": 3}, "not both"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
    ):
        with pytest.raises(ValueError, match=message):
            edge.generate(PROMPT, max_new_tokens=4, drafter=Drafter(), **options)
    with pytest.raises(ValueError, match="batch_size = 1"):
        edge.generate(torch.cat([PROMPT, PROMPT]), max_new_tokens=4, drafter=Drafter())
    with pytest.raises(ValueError, match="at least 1"):
        Drafter(0)
    plain = edge.generate(PROMPT, max_new_tokens=4, do_sample=False)  # nothing is left behind
    assert torch.equal(plain, whole.generate(PROMPT, max_new_tokens=4, do_sample=False))


# --- sampling ---------------------------------------------------------------------------------------

SAMPLING = {"do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95}


def test_sampled_tokens_of_a_seed_do_not_depend_on_the_drafts(whole, right):
    edge, _ = split(whole)
    results = []
    drafters = [Told([[]]), Told([right]), Drafter(2), Drafter(8)]
    torch.manual_seed(5)
    first = edge.generate(PROMPT, max_new_tokens=NEW, drafter=drafters[0], **SAMPLING)[0].tolist()
    drafters += [Told([first]), Told([first], wrong_every=3)]
    for drafter in drafters:
        torch.manual_seed(5)
        one = edge.generate(PROMPT, max_new_tokens=NEW, drafter=drafter, **SAMPLING)
        two = edge.generate(PROMPT, max_new_tokens=NEW, drafter=drafter, **SAMPLING)
        results.append((one[0].tolist(), two[0].tolist(), torch.get_rng_state().tolist()))
    assert all(result == results[0] for result in results)
    assert results[0][0] == first != results[0][1]
    assert drafters[4].counts.accepted > 10 and drafters[5].counts.accepted > 0


def test_the_sampler_takes_each_token_as_often_as_its_probability(monkeypatch):
    """Exactly, by a grid over the uniform number that decides; no token of probability 0 ever."""
    logits = torch.tensor([[1.0, -torch.inf, 0.3, -2.0, 2.5, -torch.inf]])
    wanted = torch.softmax(logits[0].double(), dim=0)
    size = 20_000
    counts = torch.zeros(6, dtype=torch.float64)

    class Grid:
        def __init__(self, bits):
            self.value = next(values)

        def random(self):
            return self.value

    values = iter([*((i + 0.5) / size for i in range(size)), 0.0, float(np.nextafter(1.0, 0.0))])
    monkeypatch.setattr(np.random, "Generator", Grid)
    for _ in range(size):
        counts += torch.isfinite(Positioned(1)(torch.zeros(1, 3), logits))[0]
    assert torch.allclose(counts / size, wanted, atol=1.0 / size)
    edges = [Positioned(1)(torch.zeros(1, 3), logits)[0].argmax().item() for _ in range(2)]
    assert edges == [0, 4]


def test_drafting_keeps_the_distribution_of_the_plain_sampler(whole):
    """Three tokens of three choices each, the second one drafted: every outcome as often as it should be.

    Compared with exact probabilities by the chi-square statistic, against its value at which one in a
    million right samplers would fail.
    """
    edge, _ = split(whole)
    prompt, count, options = PROMPT[:, :6], 150, {"temperature": 1.5, "top_k": 3, "top_p": 1.0}
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        for outcome in list(chances):
            ids = torch.cat([prompt, torch.tensor([outcome], dtype=torch.long)], dim=1)
            with torch.no_grad():
                best = (whole(ids).logits[0, -1] / options["temperature"]).topk(3)
            chance = chances.pop(outcome)
            for p, token in zip(best.values.softmax(dim=0).tolist(), best.indices.tolist(), strict=True):
                chances[(*outcome, token)] = chance * p
    likeliest = max(chances, key=lambda outcome: chances[outcome])
    drafter = Told([[*prompt[0].tolist(), *likeliest]])
    torch.manual_seed(0)
    seen = dict.fromkeys(chances, 0)
    for _ in range(count):
        ids = edge.generate(prompt, max_new_tokens=3, do_sample=True, drafter=drafter, **options)
        seen[tuple(ids[0, -3:].tolist())] += 1
    assert drafter.counts.drafted == count
    assert 0.05 < drafter.counts.accepted / count < 0.95, "neither always right nor never"
    rare = [outcome for outcome in chances if chances[outcome] * count < 5]
    cells = [(seen[k], chances[k] * count) for k in chances if k not in rare]
    cells.append((sum(seen[k] for k in rare), sum(chances[k] for k in rare) * count))
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells if wanted)
    freedom = len(cells) - 1
    assert freedom > 5
    # Wilson and Hilferty's approximation of the quantile; 4.75 is that of the normal distribution
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < bound


# --- settings and figures ---------------------------------------------------------------------------


@pytest.fixture
def model(whole):
    edge, _ = split(whole, max_context_tokens=256)
    edge.tokenizer = families.tokenizer()
    return edge


def test_answers_say_what_drafting_did(model):
    prompt = families.prompts(1)[0] * 2
    plain = answer(model, prompt, EdgeConfig(max_new_tokens=NEW, draft_tokens=0, temperature=0))
    assert (plain.figures.drafted_tokens, plain.figures.tokens_per_step) == (0, 1.0)
    assert "tokens/step" not in plain.figures.line()
    right = prompt + plain.tokens
    drafter = Told([right], wrong_every=5)
    found = answer(model, prompt, EdgeConfig(max_new_tokens=NEW, temperature=0), drafter=drafter)
    assert found.tokens == plain.tokens
    figures = found.figures
    decoded = len(found.tokens) - 1
    assert figures.tokens_per_step == round(decoded / (decoded - figures.accepted_tokens), 3) > 1.5
    assert 0 < figures.accepted_tokens < figures.drafted_tokens
    assert f"{figures.accepted_tokens} of {figures.drafted_tokens} guesses right" in figures.line()
    assert figures.to_json()["tokens_per_step"] == figures.tokens_per_step


def test_settings_of_drafting(model, tmp_path, monkeypatch):
    text = tmp_path / "mine.txt"
    text.write_text("some text")
    assert make_drafter(model, EdgeConfig()).max_tokens == DEFAULT_DRAFT_TOKENS
    assert make_drafter(model, EdgeConfig(draft_tokens=3)).max_tokens == 3
    assert make_drafter(model, EdgeConfig(draft_tokens=0)) is None
    found = make_drafter(model, EdgeConfig(draft_from=(text,)))
    assert [match.source for match in found.candidates(np.array([*b"no"], dtype=np.int32), 3)] == []
    context = np.array(model.tokenizer("a text")["input_ids"][:-2], dtype=np.int32)
    assert "documents" in [match.source for match in found.candidates(context, 3)]
    with pytest.raises(SettingsError, match="draft_from"):
        make_drafter(model, EdgeConfig(draft_from=(text,), draft_tokens=0))
    with pytest.raises(DatastoreError, match="no such file"):
        make_drafter(model, EdgeConfig(draft_from=(tmp_path / "none",)))
    monkeypatch.setenv("PRIVATELORA_EDGE_DRAFT_FROM", f'["{text}"]')
    assert load_config().draft_from == (text,)
    assert load_config(draft_from=[tmp_path]).draft_from == (tmp_path,)
    assert cli._flags({"draft_from": None, "quiet": True}) == {"draft_from": None}


def test_beams_of_the_model_itself_are_not_drafted_for_unless_asked(model, whole):
    import copy

    model.generation_config = copy.deepcopy(whole.generation_config)
    model.generation_config.num_beams = 2
    assert make_drafter(model, EdgeConfig()) is None
    drafter = make_drafter(model, EdgeConfig(draft_tokens=4))
    with pytest.raises(ValueError, match="2 beams"):
        model.generate(PROMPT, max_new_tokens=3, drafter=drafter)


def test_the_processor_leaves_others_their_say(whole):
    """A custom processor comes before the sampler: what it forbids is never sampled."""

    class Only(torch.nn.Module):
        def __call__(self, input_ids, scores):
            allowed = torch.full_like(scores, -torch.inf)
            allowed[:, 40:44] = scores[:, 40:44]
            return allowed

    edge, _ = split(whole)
    found = edge.generate(
        PROMPT,
        max_new_tokens=20,
        drafter=Drafter(),
        logits_processor=LogitsProcessorList([Only()]),
        **SAMPLING,
    )
    assert set(found[0, PROMPT.shape[1] :].tolist()) <= set(range(40, 44))
