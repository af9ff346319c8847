"""Two real processes give the tokens of one plain Hugging Face process, however generation is driven."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from benchmarks.processes import CloudProcess
from benchmarks.prompts import PROMPTS
from edge_client.model import PrivateLoraForCausalLM
from edge_client.wire_cost import wire_cost
from shared import lowrank
from shared.adapter import Adapter
from shared.exactness import Greedy, compare, continuation, greedy
from shared.models import DEFAULT_MODEL, resolve
from shared.reference import merged

STD = 0.05  # as in benchmarks/exact.py: changes nearly every answer and leaves it fluent
NEW_TOKENS = 16


@dataclass(frozen=True)
class Both:
    """The split model and the plain ones that it must equal."""

    edge: PrivateLoraForCausalLM
    base: PreTrainedModel
    mine: PreTrainedModel  # the base model with `adapter` merged in
    adapter: Adapter
    zeros: Adapter
    chats: list[list[int]]

    def ids(self, number: int = 0) -> torch.Tensor:
        return torch.tensor([self.chats[number]])


@pytest.fixture(scope="module")
def both(packaged_cloud: CloudProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    checkpoint = resolve(DEFAULT_MODEL, progress=False)
    base = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    pins = tmp_path_factory.mktemp("pins")
    with PrivateLoraForCausalLM.from_cloud(packaged_cloud.address, config_dir=pins) as edge:
        zeros = edge.adapter
        adapter = Adapter.random(zeros.plan, zeros.fingerprint, seed=0, std=STD)
        matrices, _ = lowrank.ensure(zeros.plan, checkpoint)
        edge.set_adapter(adapter)
        chats = [
            edge.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in PROMPTS[::5]
        ]
        mine = merged(base, zeros.plan, matrices, adapter.matrices)
        yield Both(edge, base, mine, adapter, zeros, chats)


@pytest.fixture(scope="module")
def expected(both: Both) -> list[Greedy]:
    return [greedy(both.mine, chat, NEW_TOKENS) for chat in both.chats]


pytestmark = pytest.mark.model


def test_random_m_is_exact_and_matters(both: Both, expected: list[Greedy]) -> None:
    verdict = compare(expected, continuation(both.edge))
    assert verdict.exact, str(verdict)
    base = [greedy(both.base, chat, NEW_TOKENS) for chat in both.chats]
    assert all(ours.tokens != theirs.tokens for ours, theirs in zip(expected, base, strict=True))

    # the same connection, now without personal weights, and back again
    both.edge.set_adapter(both.zeros)
    try:
        verdict = compare(base[:2], continuation(both.edge))
        assert verdict.exact, str(verdict)
    finally:
        both.edge.set_adapter(both.adapter)
    verdict = compare(expected[:1], continuation(both.edge))
    assert verdict.exact, str(verdict)


def test_logits_are_the_references(both: Both) -> None:
    with torch.no_grad():
        found, wanted = both.edge(both.ids()).logits, both.mine(both.ids()).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4)


def test_sampling_with_a_seed_is_the_references(both: Both) -> None:
    def sample(model: Any) -> list[int]:
        torch.manual_seed(11)
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 40}
        return model.generate(both.ids(1), max_new_tokens=20, **options)[0].tolist()

    assert sample(both.edge) == sample(both.mine)


def test_beams_are_the_references(both: Both) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    found, wanted = both.edge.generate(both.ids(2), **options), both.mine.generate(both.ids(2), **options)
    assert torch.equal(found, wanted)


def test_prompt_lookup_gives_the_same_tokens_in_fewer_steps(both: Both) -> None:
    text = "Repeat after me, word for word: the red fox and the grey fox and the red fox and the grey fox."
    chat = both.edge.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    wanted = [greedy(both.mine, chat, 24)]
    trips = []
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        before = both.edge.traffic()
        verdict = compare(wanted, continuation(both.edge, **options))
        assert verdict.exact, str(verdict)
        trips.append((both.edge.traffic() - before).round_trips)
    assert trips[1] < trips[0]


def test_a_token_costs_what_the_readmes_formula_says(both: Both) -> None:
    spent = []
    for tokens in (4, 4, 24):  # the first time the prompt is sent, then the cloud holds it
        before = both.edge.traffic()
        both.edge.generate(both.ids(), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        spent.append(both.edge.traffic() - before)
    more, cost = spent[2] - spent[1], wire_cost(both.edge.adapter.plan, both.edge.wire_dtypes)
    assert more.round_trips == 20 * cost.round_trips
    assert more.bytes_up == pytest.approx(20 * cost.up, rel=0.03)
    assert more.bytes_down == pytest.approx(20 * cost.down, rel=0.03)


def test_a_streamer_streams_what_generate_returns(both: Both, expected: list[Greedy]) -> None:
    streamer = TextIteratorStreamer(both.edge.tokenizer, skip_prompt=True, timeout=300)
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    thread = Thread(target=both.edge.generate, args=(both.ids(),), kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == both.edge.tokenizer.decode(expected[0].tokens)
    assert len(pieces) > 3, "text should arrive in pieces"


def test_a_stopping_criterion_stops(both: Both, expected: list[Greedy]) -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([input_ids.shape[1] >= both.ids().shape[1] + 5])

    criteria = StoppingCriteriaList([After()])
    found = both.edge.generate(both.ids(), do_sample=False, max_new_tokens=20, stopping_criteria=criteria)
    assert found[0, both.ids().shape[1] :].tolist() == list(expected[0].tokens[:5])


def test_the_next_turn_continues_from_what_the_cloud_holds(both: Both, expected: list[Greedy]) -> None:
    continuation(both.edge)(both.chats[3], NEW_TOKENS)
    tail = both.edge.tokenizer("<|im_end|>\n<|im_start|>user\nAnd why is that?", add_special_tokens=False)
    turn = [*both.chats[3], *expected[3].tokens, *tail.input_ids]
    before = both.edge.positions()
    verdict = compare([greedy(both.mine, turn, 8)], continuation(both.edge))
    assert verdict.exact, str(verdict)
    assert both.edge.positions() - before <= len(tail.input_ids) + 1 + 8


def test_several_threads_at_once_are_exact(both: Both, expected: list[Greedy]) -> None:
    found: dict[int, list[int]] = {}

    def answer(number: int) -> None:
        found[number] = continuation(both.edge)(both.chats[number], NEW_TOKENS)

    threads = [Thread(target=answer, args=(number,)) for number in range(len(both.chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = compare(expected, lambda ids, _: found[both.chats.index(ids)])
    assert verdict.exact, str(verdict)
