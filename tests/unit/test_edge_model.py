"""The edge model must do under `generate` and `forward` exactly what the whole model does."""

import copy
import gc
import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from edge_client.cloud_cache import CloudCache, ContextLengthError
from shared.adapter import Adapter
from tests import families
from tests.unit.edge_fake import FINGERPRINT, split

PROMPT = torch.tensor([families.prompts(1)[0]])


@pytest.fixture(scope="module")
def whole():
    return families.build("llama")


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        pad = width - len(prompt)
        ids.append([0] * pad + prompt if side == "left" else prompt + [0] * pad)
        mask.append([0] * pad + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * pad)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


CALLS = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95},
    "returned sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("model_type", list(families.FAMILIES))
@pytest.mark.parametrize("call", ["greedy", "sampling", "beams", "prompt lookup"])
def test_generate_equals_the_whole_model_in_every_family(model_type, call):
    model = families.build(model_type)
    edge, _ = split(model)
    expected, found = [], []
    for one, out in ((model, expected), (edge, found)):
        torch.manual_seed(7)
        out.append(one.generate(PROMPT, max_new_tokens=10, **CALLS[call]))
    assert torch.equal(expected[0], found[0])


@pytest.mark.parametrize("call", list(CALLS))
def test_generate_equals_the_whole_model(whole, call):
    edge, _ = split(whole)
    repeated = torch.cat([PROMPT, PROMPT], dim=1)  # so that there is something to look up
    results = []
    for one in (whole, edge):
        torch.manual_seed(3)
        results.append(one.generate(repeated, max_new_tokens=24, **CALLS[call]))
    assert torch.equal(*results)


@pytest.mark.parametrize("call", ["greedy", "sampling", "beams"])
def test_left_padded_batch_equals_each_prompt(whole, call):
    edge, sessions = split(whole)
    prompts = families.prompts(2)
    results = []
    for one in (whole, edge):
        torch.manual_seed(3)
        results.append(one.generate(**padded(prompts), max_new_tokens=12, **CALLS[call]))
    assert torch.equal(*results)
    assert sessions[0].steps[0][0][0].count == len(prompts[0]), "padding is not sent"


def test_streamer_and_stopping_criteria(whole):
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT.shape[1] + 5)

    edge, _ = split(whole)
    results = []
    for one in (whole, edge):
        streamer = Collect()
        ids = one.generate(
            PROMPT, max_new_tokens=20, streamer=streamer, stopping_criteria=StoppingCriteriaList([After()])
        )
        results.append((ids.tolist(), streamer.tokens))
    assert results[0] == results[1]
    assert len(results[1][0][0]) == PROMPT.shape[1] + 5


def test_decoding_sends_one_position_a_token(whole):
    edge, sessions = split(whole)
    edge.generate(PROMPT, max_new_tokens=6)
    counts = [[span.count for span in spans] for spans, _ in sessions[0].steps]
    assert counts == [[PROMPT.shape[1]]] + [[1]] * 5


def test_beams_run_the_prompt_once(whole):
    edge, sessions = split(whole)
    edge.generate(PROMPT, max_new_tokens=4, num_beams=4)
    spans, parents = sessions[0].steps[0]
    assert [span.count for span in spans] == [PROMPT.shape[1]] and parents is None
    assert sessions[0].steps[1][1] == [0, 0, 0, 0]


def test_forward_gives_all_logits(whole):
    edge, _ = split(whole)
    prompts = families.prompts(3)
    for side in ("left", "right"):
        batch = padded(prompts, side)
        real = batch["attention_mask"].bool()
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = whole(**batch, position_ids=positions).logits
        found = edge(**batch).logits
        assert found.shape == expected.shape
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
        last = edge(**batch, logits_to_keep=4).logits
        torch.testing.assert_close(last[real[:, -4:]], expected[:, -4:][real[:, -4:]], rtol=1e-4, atol=1e-4)
    picked = edge(PROMPT, logits_to_keep=torch.tensor([3, 1])).logits
    torch.testing.assert_close(picked, whole(PROMPT).logits[:, [3, 1]], rtol=1e-4, atol=1e-4)


def test_labels_give_the_loss(whole):
    edge, _ = split(whole)
    labels = PROMPT.clone()
    labels[:, :4] = -100
    torch.testing.assert_close(edge(PROMPT, labels=labels).loss, whole(PROMPT, labels=labels).loss)


def test_next_turn_continues_in_the_same_session(whole):
    edge, sessions = split(whole)
    first = edge.generate(PROMPT, max_new_tokens=5)
    second = torch.cat([first, torch.tensor([[9, 8, 7]])], dim=1)
    computed = sessions[0].positions
    found = edge.generate(second, max_new_tokens=5)
    assert len(sessions) == 1
    # The last token of the first turn was sampled but never run, so four new positions are.
    assert sessions[0].steps[5][0][0].count == 4
    assert sessions[0].positions == computed + 4 + 4
    assert torch.equal(found, whole.generate(second, max_new_tokens=5))


def test_same_prompt_again_recomputes_one_position(whole):
    edge, sessions = split(whole)
    one = edge.generate(PROMPT, max_new_tokens=4)
    two = edge.generate(PROMPT, max_new_tokens=4)
    assert torch.equal(one, two)
    assert sessions[0].steps[4][0][0].count == 1
    logits = edge(PROMPT).logits  # all positions are asked for, so none can be reused
    assert sessions[0].steps[-1][0][0].count == PROMPT.shape[1]
    assert logits.shape[1] == PROMPT.shape[1]


def test_rows_with_a_shared_prefix_fork(whole, monkeypatch):
    monkeypatch.setattr("edge_client.cloud_cache.MIN_SHARED_TOKENS", 8)
    edge, sessions = split(whole)
    prompts = [[*PROMPT[0].tolist(), 9, 8], [*PROMPT[0].tolist(), 5], [*PROMPT[0].tolist(), 6, 7, 8]]
    batch = padded(prompts)
    found = edge.generate(**batch, max_new_tokens=6)
    assert torch.equal(found, whole.generate(**batch, max_new_tokens=6))
    (first, _), (second, parents) = sessions[0].steps[:2]
    assert [s.count for s in first] == [PROMPT.shape[1]]
    assert parents == [0, 0, 0] and [s.count for s in second] == [2, 1, 3]


def test_sessions_go_back_to_the_pool(whole):
    edge, sessions = split(whole)
    for prompt in families.prompts(4):
        edge.generate(torch.tensor([prompt]), max_new_tokens=2)
    assert len(sessions) == 1
    held = edge.generate(PROMPT, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    edge.generate(PROMPT, max_new_tokens=2)
    assert len(sessions) == 2, "a cache that is kept keeps its session"
    del held
    gc.collect()
    edge.generate(PROMPT, max_new_tokens=2)
    assert len(sessions) == 2


def test_many_threads_each_get_a_session(whole):
    edge, sessions = split(whole)
    prompts = [torch.tensor([p]) for p in families.prompts(4)]
    expected = [whole.generate(p, max_new_tokens=8) for p in prompts]
    found = {}

    def run(index):
        found[index] = edge.generate(prompts[index], max_new_tokens=8)

    _guard(edge, threading.Lock())  # hooks on the one fake model are not thread-safe
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(found[i], expected[i]) for i in range(4))
    assert 1 <= len(sessions) <= 4


def _guard(edge, lock):
    open_session = edge._pool._open

    def guarded():
        session = open_session()
        step = session.step

        def locked(*args):
            with lock:
                return step(*args)

        session.step = locked
        return session

    edge._pool._open = guarded


def test_interrupted_step_leaves_the_session_usable(whole):
    edge, sessions = split(whole)
    expected = whole.generate(PROMPT, max_new_tokens=8)
    edge.generate(PROMPT, max_new_tokens=2)

    def interrupt():
        sessions[0].before_step = lambda: None
        raise KeyboardInterrupt

    sessions[0].before_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        edge.generate(torch.cat([PROMPT, PROMPT], dim=1), max_new_tokens=4)
    assert sessions[0].cancelled == 1
    assert torch.equal(edge.generate(PROMPT, max_new_tokens=8), expected)
    assert len(sessions) == 1


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_failed_step_with_moved_rows_costs_only_the_session(whole, kind):
    edge, sessions = split(whole)

    def fail():
        if sessions[0].steps[-1][1] is not None:
            raise kind("lost")

    edge.generate(PROMPT, max_new_tokens=2)
    sessions[0].before_step = fail
    with pytest.raises(kind):
        edge.generate(PROMPT, max_new_tokens=4, num_beams=3)
    found = edge.generate(PROMPT, max_new_tokens=4, num_beams=3)
    assert torch.equal(found, whole.generate(PROMPT, max_new_tokens=4, num_beams=3))
    assert len(sessions) == 2 and sessions[0].closed


def test_stopping_in_between_keeps_the_session(whole):
    class Stop(BaseStreamer):
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self):
            pass

    edge, sessions = split(whole)
    with pytest.raises(KeyboardInterrupt):
        edge.generate(PROMPT, max_new_tokens=9, streamer=Stop())
    assert torch.equal(edge.generate(PROMPT, max_new_tokens=4), whole.generate(PROMPT, max_new_tokens=4))
    assert len(sessions) == 1 and sessions[0].steps[1][0][0].count == 1


def test_returned_cache_can_be_continued_copied_and_cropped(whole):
    edge, _sessions = split(whole)
    first = edge.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, CloudCache) and cache.get_seq_length() == PROMPT.shape[1] + 3
    twin = copy.deepcopy(cache)
    expected = whole.generate(first.sequences, max_new_tokens=4)
    for past in (cache, twin):
        assert torch.equal(edge.generate(first.sequences, past_key_values=past, max_new_tokens=4), expected)
    cache.crop(-2)
    with pytest.raises(ValueError, match="cannot remove"):
        cache.crop(-500)
    out = edge(first.sequences[:, -1:], past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache
    out = edge(PROMPT[:, :1], cache=cache, use_cache=True)  # the name since transformers 5.24
    assert out.past_key_values is cache and cache.rows[0].tokens[-1] == PROMPT[0, 0]
    with pytest.raises(ValueError, match="two names"):
        edge(PROMPT[:, :1], cache=cache, past_key_values=cache)


def test_new_adapter_forgets_what_sessions_hold(whole):
    edge, sessions = split(whole)
    kept = edge.generate(PROMPT, max_new_tokens=3, return_dict_in_generate=True)
    plan = edge.adapter.plan
    edge.set_adapter(Adapter.random(plan, FINGERPRINT, seed=1, std=0.1))
    edge.generate(PROMPT, max_new_tokens=3)
    assert len(sessions) == 2
    assert sessions[1].steps[0][0][0].count == PROMPT.shape[1]
    assert sessions[1].personal is not sessions[0].personal
    edge.generate(kept.sequences, past_key_values=kept.past_key_values, max_new_tokens=2)
    assert sessions[1].steps[-2][0][0].start > 0, "the kept cache now runs on a session of the new adapter"


def test_full_context_is_said_and_changes_nothing(whole):
    edge, sessions = split(whole, max_context_tokens=PROMPT.shape[1] + 3)
    with pytest.raises(ContextLengthError, match=f"{PROMPT.shape[1] + 4} tokens asked for") as caught:
        edge.generate(PROMPT, max_new_tokens=9, eos_token_id=None)
    assert (caught.value.asked, caught.value.limit) == (PROMPT.shape[1] + 4, PROMPT.shape[1] + 3)
    expected = whole.generate(PROMPT, max_new_tokens=2)
    assert torch.equal(edge.generate(PROMPT, max_new_tokens=2), expected)
    assert len(sessions) == 1


def test_misuse_is_refused(whole):
    edge, _ = split(whole)
    with pytest.raises(TypeError, match="from_cloud"):
        type(edge).from_pretrained("x")
    with pytest.raises(ValueError, match="stay in the cloud"):
        edge(PROMPT, output_hidden_states=True)
    with pytest.raises(ValueError, match="gaps"):
        edge(PROMPT, position_ids=torch.arange(PROMPT.shape[1])[None] * 2)
    with pytest.raises(ValueError, match="9 rows"):
        edge.generate(**padded(families.prompts(9)), max_new_tokens=2)
    with pytest.raises(TypeError, match="adapter.save"):
        edge.save_pretrained("x")
    with pytest.raises(ValueError, match="cache is in the cloud"):
        edge.generate(PROMPT, cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (PROMPT[0], "batch, columns"),
        (PROMPT.float(), "whole numbers"),
        (PROMPT[:, :0], "at least one token"),
        (PROMPT - PROMPT.max() - 1, "vocabulary"),
        (PROMPT + 1_000_000, "vocabulary"),
    ],
)
def test_what_are_no_token_ids_is_refused_in_words_that_show_none(whole, ids, words):
    edge, _ = split(whole)
    for call in (edge, edge.generate):
        with pytest.raises(ValueError, match=words) as refused:
            call(ids)
        assert "1000" not in str(refused.value)
    assert edge.positions() == 0, "something was sent"


def test_a_mask_of_another_width_is_refused(whole):
    edge, _ = split(whole)
    with pytest.raises(ValueError, match="attention_mask"):
        edge.generate(PROMPT, attention_mask=torch.ones(1, PROMPT.shape[1] - 2), max_new_tokens=2)
