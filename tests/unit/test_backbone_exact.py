"""The split equals the single-process reference, for every family: tokens and logits, without a network.

Logits are compared at every position, so that a mistake shows where it is made and not only where it
turns a token. What runs is the real backbone, engine, session and edge model (`tests/inprocess.py`).
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.spans import Span
from shared.exactness import compare, continuation, greedy
from shared.plan import Plan
from shared.reference import Reference, merged
from tests.families import (
    CASE_IDS,
    CASES,
    FAMILIES,
    build,
    plan_for,
    prompts,
    save,
)
from tests.features import WINDOW, Config, Feature
from tests.inprocess import Cloud
from tests.splits import (
    ATOL,
    NEW_TOKENS,
    PLANS,
    assert_close,
    logits_of,
    lowrank_for,
    matrices_for,
    serve,
    split_of,
)

# Settings that models of these families have and that the models above do not; each is served too.
ROPE = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS: dict[str, tuple[str, Config]] = {
    "llama-one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "llama-no_grouping": ("llama", {"num_key_value_heads": 6}),
    "llama-mlp_bias": ("llama", {"mlp_bias": True}),
    "llama-linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE}}),
    "mistral-no_window": ("mistral", {"sliding_window": None}),
    "qwen2-no_window": ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    "qwen2-upper_layers_slide": ("qwen2", {"max_window_layers": 2, "layer_types": None}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "gemma2-no_caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3-all_slide": ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
    "gemma3-none_slides": ("gemma3_text", {"layer_types": ["full_attention"] * 4}),
    "gemma3-bias": ("gemma3_text", {"attention_bias": True}),
    "phi3-no_window": ("phi3", {"sliding_window": None}),
}

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


@pytest.mark.parametrize("owners", [(), (0, 2), (0, 1, 2)], ids=str)
def test_a_grouped_plan_equals_the_reference(owners: tuple[int, ...], folder_of) -> None:
    """Codes of layers 0 and 2 feed all four, some with an M of their own. The hooks are the reference."""
    model = build("llama")
    plan = Plan.model_validate(
        {
            **plan_for(model, r_c2d=5, r_d2c=9).model_dump(),
            "exchange_layers": (0, 2),
            "schedule": "grouped",
            "owner_layers": owners,
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


def test_shared_residual_codes_stay_until_the_last_layer_that_adds_them(folder_of) -> None:
    """In chunks, in slices, in one batch with a plan that shares nothing, and where they come up front."""
    model, ids = build("llama"), prompts(1, shortest=30)[0]
    shared = plan_for(model, exchange_layers=(0,), share_residual_codes=3, layout="fused", name="shared")
    alone = plan_for(model, name="alone")
    plans = [(plan, lowrank_for(plan, model)) for plan in (shared, alone)]
    matrices, others = matrices_for(shared), matrices_for(alone)
    reference = Reference(model, shared, plans[0][1], matrices)
    expected = logits_of(reference, ids)
    reference.remove()
    with (
        Cloud(folder_of("llama"), plans, {"slice_s": 1e-9, "short_step_tokens": 1}) as cloud,
        cloud.edge(shared, matrices) as edge,
        torch.inference_mode(),
    ):
        h0, spans = edge._embed(ids), [Span(0, 0, len(ids), len(ids))]
        streams = [cloud.open(shared, matrices, chunk_tokens=7), cloud.open(alone, others)]

        async def together() -> list[Tensor]:
            return list(await asyncio.gather(*(stream.step_async(h0, spans) for stream in streams)))

        def logits(hidden: Tensor) -> Tensor:
            return edge.lm_head(edge.norm(hidden))

        both = cloud.call(together())
        assert_close(logits(both[0]), expected)
        assert_close(logits(both[1]), logits_of(merged(model, alone, plans[1][1], others), ids))
        whole, replay = cloud.open(shared, matrices), cloud.open(shared, matrices)
        assert_close(logits(whole.step(h0, spans)), expected)
        known = whole.answers[1]
        assert known.keys() == {0, 3}
        assert_close(logits(cloud.call(replay.step_async(h0, spans, known=known))), expected)
        assert not replay.answers
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0
