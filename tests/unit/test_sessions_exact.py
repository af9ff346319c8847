"""Sessions that share one engine, its batches and its blocks get the tokens that each gets alone."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edge_client.spans import Span
from shared.exactness import Greedy, compare, greedy
from tests.families import FAMILIES, prompts
from tests.features import WINDOW
from tests.inprocess import Stream
from tests.splits import NEW_TOKENS, PLANS, assert_close, logits_of, serve, split_of


async def decode(stream: Stream, edge: Any, prompt: list[int], new_tokens: int, delay: int) -> list[int]:
    """Generate greedily on the cloud's own thread, beside other sessions."""
    for _ in range(delay):
        await asyncio.sleep(0)
    tokens, new = list(prompt), list(prompt)
    while len(tokens) < len(prompt) + new_tokens:
        start = len(tokens) - len(new)
        hidden = await stream.step_async(edge._embed(new), [Span(0, start, len(new), 1)])
        logits = edge.lm_head(edge.norm(hidden))[-1]  # (vocabulary,)
        logits[edge.config.eos_token_id] = float("-inf")  # as in the reference
        new = [int(logits.argmax())]
        tokens += new
    stream.session.close()
    return tokens[len(prompt) :]


ENGINES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"gather_wait_s": 0.05},
    "gemma3_text": {"short_step_tokens": 1, "slice_s": 1e-9},
    "phi3": {"inline_s": 0.0},  # everything on the torch thread
}


@pytest.mark.parametrize(("name", "engine"), ENGINES.items(), ids=ENGINES)
def test_any_mix_of_sessions_equals_each_alone(name: str, engine: dict[str, Any], folder_of) -> None:
    """Different users, M, plans, prompt lengths, chunk sizes and starting times in one engine."""
    kinds = list(PLANS)
    splits = [split_of(name, kinds[i % len(kinds)], seed=i, std=0.0 if i == 9 else 0.5) for i in range(10)]
    texts = prompts(10, shortest=WINDOW + 2)
    expected = [greedy(s.reference, text, NEW_TOKENS) for s, text in zip(splits, texts, strict=True)]
    with serve(name, folder_of(name), engine) as cloud:
        edge = cloud.edge(splits[0].plan, splits[0].matrices)

        async def together(order: list[int]) -> dict[int, list[int]]:
            tasks = {
                i: decode(
                    cloud.open(splits[i].plan, splits[i].matrices, chunk_tokens=1 + 5 * (i % 4)),
                    edge, texts[i], NEW_TOKENS, delay=7 * place,
                )
                for place, i in enumerate(order)
            }  # fmt: skip
            return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))

        for order in (list(range(10)), [8, 3, 6, 5, 9], [1, 0]):
            found = cloud.call(together(order))
            verdict = compare([expected[i] for i in order], _lookup(expected, found))
            assert verdict.exact, str(verdict)
        batches = cloud.engine.batches
        assert batches.steps > batches.count, "some sessions should have met in a batch"
        if engine.get("gather_wait_s"):
            assert batches.mean_steps > 1.5
        assert cloud.cache.bytes_used == 0


def _lookup(expected: list[Greedy], found: dict[int, list[int]]) -> Any:
    prompt_of = {reference.prompt: i for i, reference in enumerate(expected)}
    return lambda ids, _: found[prompt_of[tuple(ids)]]


def test_forked_rows_part_ways(parts_of) -> None:
    """Rows that continue one prompt share blocks until they write; each then has its own keys."""
    split, cloud, edge = parts_of("mistral")
    prompt, *tails = prompts(4, shortest=33)  # one position into the second block of 32
    stream = cloud.open(split.plan, split.matrices)
    stream.step(edge._embed(prompt), [Span(0, 0, 33, 1)])
    shared_bytes = cloud.cache.bytes_used
    spans = [Span(row, 33, 4, 4) for row in range(3)]
    hidden = stream.step(edge._embed([t for tail in tails for t in tail[:4]]), spans, [0, 0, 0])
    for row, tail in enumerate(tails):
        expected = logits_of(split.reference, prompt + tail[:4])[33:]
        assert_close(edge.lm_head(edge.norm(hidden[4 * row : 4 * row + 4])), expected)
    # Rows 2, 0 and 0 again live on, the last of them one position shorter.
    tokens = [tails[2][4], tails[0][4], 77]
    spans = [Span(0, 37, 1, 1), Span(1, 37, 1, 1), Span(2, 36, 1, 1)]
    hidden = stream.step(edge._embed(tokens), spans, [2, 0, 0])
    for row, tail in enumerate([tails[2][:5], tails[0][:5], [*tails[0][:3], 77]]):
        expected = logits_of(split.reference, prompt + tail)[-1]
        assert_close(edge.lm_head(edge.norm(hidden[row])), expected)
    assert shared_bytes < cloud.cache.bytes_used < 3 * shared_bytes, "three rows should share a block"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replay_with_residual_codes_up_front_is_bit_for_bit(name: str, parts_of) -> None:
    split, cloud, edge = parts_of(name)
    ids = prompts(1, shortest=40)[0]
    first, second = (cloud.open(split.plan, split.matrices) for _ in range(2))

    async def replay(number: int, start: int, end: int) -> Tensor:
        spans = [Span(0, start, end - start, end - start)]
        return await second.step_async(edge._embed(ids[start:end]), spans, known=first.answers[number])

    for number, (start, end) in enumerate([(0, 20), (20, 39), (39, 40)], start=1):
        original = first.step(edge._embed(ids[start:end]), [Span(0, start, end - start, end - start)])
        assert torch.equal(cloud.call(replay(number, start, end)), original)
    assert not second.answers, "nothing should have been asked again"


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_of_a_long_step_do_not_matter(name: str, folder_of) -> None:
    """A long prefill that yields to decodes after every few positions gives the same logits."""
    split = split_of(name)
    ids = prompts(1, shortest=7 * WINDOW + 1)[0]
    expected = logits_of(split.reference, ids)
    engine = {"short_step_tokens": 1, "slice_s": 1e-9, "gather_wait_s": 0.0}
    with serve(name, folder_of(name), engine) as cloud, cloud.edge(split.plan, split.matrices) as edge:
        embed, short = edge._embed, cloud.open(split.plan, split.matrices)

        async def both() -> Tensor:
            long = cloud.open(split.plan, split.matrices)
            done = asyncio.ensure_future(long.step_async(embed(ids), [Span(0, 0, len(ids), len(ids))]))
            at = 0
            while not done.done():
                await short.step_async(embed([ids[at % len(ids)]]), [Span(0, at, 1, 1)])
                at += 1
            hidden = await done
            long.session.close()
            assert at > 1
            return hidden

        hidden = cloud.call(both())
        assert_close(edge.lm_head(edge.norm(hidden)), _before_softcap(split.reference, expected))


def _before_softcap(model: PreTrainedModel, logits: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.atanh(logits / cap) * cap
