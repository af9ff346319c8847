"""The small models of tests/families.py are sensitive: every feature that is switched off is seen."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import families as supported
from shared.exactness import TIE_GAP, Greedy, compare, continuation, greedy
from tests.families import CASE_IDS, CASES, FAMILIES, WINDOW, Feature, build, prompts, save

NEW_TOKENS = 12
PROMPTS = prompts(2)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Greedy]]:
    return {name: [greedy(build(name), prompt, NEW_TOKENS) for prompt in PROMPTS] for name in FAMILIES}


def test_every_supported_family_has_a_model() -> None:
    assert FAMILIES.keys() == supported.FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_varied_and_far_from_ties(name: str, expected: dict[str, list[Greedy]]) -> None:
    for output in expected[name]:
        assert len(output.prompt) > 2 * WINDOW
        assert len(set(output.tokens)) >= NEW_TOKENS // 2
        assert min(output.gaps) > 2 * TIE_GAP


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_equals_itself(name: str, expected: dict[str, list[Greedy]]) -> None:
    assert compare(expected[name], continuation(build(name))).exact


@pytest.mark.parametrize(("name", "feature"), CASES, ids=CASE_IDS)
def test_a_feature_that_is_off_is_seen(
    name: str, feature: Feature, expected: dict[str, list[Greedy]]
) -> None:
    stripped = build(name, without=feature)
    if feature.shows_in == "greedy":
        verdict = compare(expected[name], continuation(stripped))
        assert verdict.mismatches == len(PROMPTS), "every prompt should show it"
        return

    def sample(model: torch.nn.Module) -> list[int]:
        torch.manual_seed(1)
        tokens = model.generate(  # type: ignore[operator]
            torch.tensor(PROMPTS[:1]), do_sample=True, min_new_tokens=48, max_new_tokens=48
        )
        return tokens[0].tolist()

    assert sample(build(name)) != sample(stripped)


def test_cases_cover_what_the_families_have() -> None:
    for name, family in FAMILIES.items():
        names = {feature.name for feature in family.features}
        config = build(name).config
        assert "gqa_order" in names
        assert config.num_attention_heads > config.num_key_value_heads > 1
        assert ("window" in names) == bool(getattr(config, "sliding_window", None))
        assert ("layer_types" in names) == (len(set(getattr(config, "layer_types", None) or [0])) > 1)
        weights = build(name).state_dict()
        assert ("bias" in names) == any(key.endswith("_proj.bias") for key in weights)
        assert ("q_norm" in names) == any("q_norm" in key for key in weights)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_is_the_same_model(name: str, tmp_path) -> None:
    folder = save(name, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(loaded(ids).logits, build(name)(ids).logits)
    geometry = supported.geometry(loaded.config)
    assert any(window == WINDOW for window in geometry.windows) or name == "llama"

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "Grüße, 世界 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<bos>user: hi<eos><bos>assistant: "


def test_equal_seeds_give_equal_bits() -> None:
    first, second = build("llama").state_dict(), build("llama").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
