"""The split equals the single-process reference, for every family: tokens and logits, without a network.

Logits are compared at every position, so that a mistake shows where it is made and not only where it
turns a token. What runs is the real backbone, engine, session and edge model (`tests/inprocess.py`).
"""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edge_client.session import Span
from shared.exactness import Greedy, compare, continuation, greedy
from shared.lowrank import LowRank
from shared.plan import Plan
from shared.reference import Matrices, Reference, merged
from tests.families import (
    CASE_IDS,
    CASES,
    FAMILIES,
    VARIANTS,
    WINDOW,
    Feature,
    build,
    lowrank_for,
    matrices_for,
    plan_for,
    prompts,
    save,
)
from tests.inprocess import Cloud, Stream

ATOL = 3e-4  # logits spread by about 3; two orders of fp32 sums differ by some 5e-5 here
NEW_TOKENS = 12

PLANS: dict[str, dict[str, Any]] = {
    "per-projection": {},
    "fused": {"layout": "fused", "rank": 12},
    "asymmetric": {"r_c2d": 5, "r_d2c": 9, "scale": 1.7},
    "fused-asymmetric": {"layout": "fused", "r_c2d": 9, "r_d2c": 5},
    "subset": {"layers": (1, 3)},
    "query-and-value": {"targets": ("q", "v"), "layers": (0, 2, 3)},
    "fused-key-and-value": {"layout": "fused", "targets": ("k", "v"), "rank": 6},
}


@dataclass(frozen=True, eq=False)
class Split:
    """A model, a plan with A and B, M, and the merged model that the split must equal."""

    model: PreTrainedModel
    plan: Plan
    lowrank: LowRank
    matrices: Matrices
    reference: PreTrainedModel


@cache
def split_of(name: str, kind: str = "per-projection", seed: int = 0, std: float = 0.5) -> Split:
    model = model_of(name)
    plan = plan_for(model, **PLANS[kind], name=kind)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan, seed=seed, std=std)
    return Split(model, plan, lowrank, matrices, merged(model, plan, lowrank, matrices))


model_of = cache(build)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: save(name, tmp_path_factory.mktemp(name)))


def serve(name: str, folder: Path, engine: dict[str, Any] | None = None) -> Cloud:
    """Return a cloud with every plan of `PLANS`."""
    splits = [split_of(name, kind) for kind in PLANS]
    return Cloud(folder, [(split.plan, split.lowrank) for split in splits], engine)


@pytest.fixture(scope="module")
def cloud_of(folder_of):
    """One cloud a family for the whole module."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(serve(name, folder_of(name))))


@pytest.fixture
def parts_of(cloud_of):
    """Split, cloud and edge of a family; afterwards nothing may be left in the cloud's cache."""
    with ExitStack() as stack:
        clouds = []

        def parts(name: str, kind: str = "per-projection", std: float = 0.5) -> tuple[Split, Cloud, Any]:
            split = split_of(name, kind, std=std)
            clouds.append(cloud_of(name))
            return split, clouds[-1], stack.enter_context(clouds[-1].edge(split.plan, split.matrices))

        yield parts
    for cloud in clouds:
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Return the logits at every position: ``(len(ids), vocabulary)``."""
    return model(torch.tensor([ids])).logits[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


# --- every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_identical(name: str, parts_of) -> None:
    split, _, edge = parts_of(name)
    expected = [greedy(split.reference, prompt, NEW_TOKENS) for prompt in prompts(3)]
    assert not compare(expected, continuation(split.model)).exact, "M should matter"
    verdict = compare(expected, continuation(edge))
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize("name", FAMILIES)
def test_zero_m_is_the_base_model(name: str, parts_of) -> None:
    split, _, edge = parts_of(name, std=0.0)
    expected = [greedy(split.model, prompt, NEW_TOKENS) for prompt in prompts(2)]
    verdict = compare(expected, continuation(edge))
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_plan_has_the_references_logits(name: str, kind: str, parts_of) -> None:
    split, _, edge = parts_of(name, kind)
    ids = prompts(1)[0]
    found = logits_of(edge, ids)
    assert_close(found, logits_of(split.reference, ids))
    assert (found - logits_of(split.model, ids)).abs().max() > 100 * ATOL


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_chunks_do_not_matter(name: str, parts_of) -> None:
    split, cloud, _ = parts_of(name)
    ids = prompts(1, shortest=5 * WINDOW + 1)[0]
    expected = logits_of(split.reference, ids)
    for chunk in (1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 32, len(ids) - 1):
        with cloud.edge(split.plan, split.matrices, chunk) as edge:
            assert_close(logits_of(edge, ids), expected)


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


@pytest.mark.parametrize("name", FAMILIES)
def test_rejected_drafts_are_cropped(name: str, parts_of) -> None:
    """Window 8, 40 tokens, draft 6, reject 5: each step overwrites the five wrong positions."""
    split, _, edge = parts_of(name)
    right = prompts(1, shortest=40)[0]
    wrong = prompts(1, seed=1, shortest=64)[0]
    expected = logits_of(split.reference, right)
    past = edge.new_cache()
    out = edge(torch.tensor([right[:20]]), past_key_values=past, use_cache=True)
    assert_close(out.logits[0], expected[:20])
    for at in range(20, 40):
        draft = [right[at], *wrong[at : at + 5]]
        out = edge(torch.tensor([draft]), past_key_values=past, use_cache=True)
        assert_close(out.logits[0, 0], expected[at])
        past.crop(-5)
    assert past.get_seq_length() == 40


@pytest.mark.parametrize("name", FAMILIES)
def test_a_deep_crop_and_another_continuation(name: str, parts_of) -> None:
    """The crop is far deeper than the window."""
    split, _, edge = parts_of(name)
    first, second = prompts(2, shortest=40)
    second = first[:5] + second[5:]
    past = edge.new_cache()
    edge(torch.tensor([first]), past_key_values=past, use_cache=True)
    past.crop(-35)
    out = edge(torch.tensor([second[5:]]), past_key_values=past, use_cache=True)
    assert_close(out.logits[0], logits_of(split.reference, second)[5:])


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_are_identical(name: str, parts_of) -> None:
    split, _, edge = parts_of(name)
    ids = torch.tensor(prompts(1))
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 12, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    expected, found = split.reference.generate(ids, **options), edge.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_equals_its_rows(name: str, parts_of) -> None:
    split, _, edge = parts_of(name)
    rows = prompts(3)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # padded on the left
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    expected = [greedy(split.reference, row, 10) for row in rows]
    options = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 10}
    found = edge.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    verdict = compare(expected, lambda prompt, _: found[rows.index(prompt)])
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_with_a_seed_is_the_references(name: str, parts_of) -> None:
    split, _, edge = parts_of(name)
    ids = torch.tensor(prompts(1))

    def sample(model: Any) -> list[int]:
        torch.manual_seed(3)
        options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 50}
        return model.generate(ids, min_new_tokens=24, max_new_tokens=24, **options)[0].tolist()

    assert sample(edge) == sample(split.reference)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_lookup_drafting_gives_the_same_tokens(name: str, parts_of) -> None:
    split, _, edge = parts_of(name)
    prompt = prompts(1)[0] * 2  # repetitive, so that drafts are found (and most are rejected)
    expected = [greedy(split.reference, prompt, NEW_TOKENS)]
    verdict = compare(expected, continuation(edge, prompt_lookup_num_tokens=4))
    assert verdict.exact, str(verdict)


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_other_settings_of_a_family(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder, model, prompt = save(name, tmp_path, **changes), build(name, **changes), prompts(1)[0]
    plan = plan_for(model)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    with Cloud(folder, [(plan, lowrank)]) as cloud, cloud.edge(plan, matrices, chunk_tokens=7) as edge:
        assert_close(logits_of(edge, prompt), logits_of(merged(model, plan, lowrank, matrices), prompt))


# --- a feature that the split ignored would be seen ---------------------------------------------------


@pytest.mark.parametrize(("name", "feature"), CASES, ids=CASE_IDS)
def test_a_split_without_the_feature_is_not_exact(name: str, feature: Feature, tmp_path: Path) -> None:
    """Serve the model with one feature off; the reference keeps it. Proves that the tests above see it."""
    split, ids = split_of(name), prompts(1)[0]
    folder = save(name, tmp_path, without=feature)
    with serve(name, folder) as cloud, cloud.edge(split.plan, split.matrices) as edge:
        assert (logits_of(edge, ids) - logits_of(split.reference, ids)).abs().max() > 30 * ATOL
        if feature.shows_in == "greedy":
            expected = [greedy(split.reference, prompt, NEW_TOKENS) for prompt in prompts(2)]
            assert compare(expected, continuation(edge)).mismatches > 0


# --- sessions together ----------------------------------------------------------------------------------


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


def test_a_grouped_plan_equals_the_reference(folder_of) -> None:
    """Codes of layers 0 and 2 feed all four layers. Nothing can be merged; the hooks are the reference."""
    model = build("llama")
    plan = Plan.model_validate(
        {
            **plan_for(model).model_dump(),
            "exchange_layers": (0, 2),
            "schedule": "grouped",
        }
    )
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    with (
        Cloud(folder_of("llama"), [(plan, lowrank)]) as cloud,
        cloud.edge(plan, matrices) as edge,
        torch.no_grad(),
    ):
        reference = Reference(model, plan, lowrank, matrices)
        expected = [greedy(reference, prompt, NEW_TOKENS) for prompt in prompts(2)]
        verdict = compare(expected, continuation(edge))
        assert verdict.exact, str(verdict)
