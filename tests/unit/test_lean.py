"""The lean layer is Hugging Face's layer: in use for every family, equal, and refused where it is not.

The truth is the family's own layer, in its own (eager) attention with a mask made here.
"""

import copy
import logging
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cloud_server.attention import ATTENTION_NAME, Asked
from cloud_server.backbone import Backbone
from cloud_server.layer import PROBE_TOKENS, Layer, Probe
from cloud_server.lean import FusedNorm, Rotary, fused_norm
from shared.checkpoint import open_folder
from shared.families import geometry, layer_types, rope_parameters
from shared.reference import merged
from tests.families import FAMILIES, build, prompts
from tests.features import WINDOW, Config
from tests.inprocess import Cloud
from tests.splits import assert_close, logits_of, lowrank_for, matrices_for, plan_for

TOLERANCE = 1e-5  # of the largest value


class Eager:
    """Attention written out, one head after the other: nothing shared with what is tested."""

    def attend(self, asked: Asked, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, scale, window, softcap = asked
        heads = []
        for head, query in enumerate(q):
            group = head * len(k) // len(q)
            logits = query @ k[group].T * scale
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            heads.append(torch.softmax(logits + mask_of(len(query), window), dim=-1) @ v[group])
        return torch.stack(heads)


def mask_of(tokens: int, window: int | None) -> Tensor:
    """Return ``(tokens, tokens)``: 0 where a position is seen, else -inf."""
    ahead = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (ahead >= 0) & (ahead < (window or tokens))
    return torch.zeros(tokens, tokens).masked_fill(~seen, -math.inf)


def rotary_of(model: Any, tokens: int) -> dict[str, Rotary]:
    like, ids = torch.empty(0), 3 + torch.arange(tokens)[None]
    return {
        kind: Rotary.of(*model.model.rotary_emb(like, ids, *(() if kind == "all" else (kind,))))
        for kind in rope_parameters(model.config)
    }


def key_of(model: Any, number: int) -> str:
    kind = layer_types(model.config)[number]
    return kind if kind in rope_parameters(model.config) else "all"


def module_of(model: Any, number: int) -> Any:
    """Return a copy of one of the model's layers that attends through a batch."""
    module = copy.deepcopy(model.model.layers[number]).requires_grad_(False)
    module.self_attn.config._attn_implementation = ATTENTION_NAME
    return module


def eager(model: Any, number: int, hidden: Tensor) -> Tensor:
    """Return what Hugging Face's own layer makes of ``hidden (tokens, hidden_size)``."""
    module, tokens = copy.deepcopy(model.model.layers[number]), len(hidden)
    module.self_attn.config._attn_implementation = "eager"
    mask = mask_of(tokens, geometry(model.config).windows[number])[None, None]
    cos, sin, _ = rotary_of(model, tokens)[key_of(model, number)]
    return module(hidden[None], attention_mask=mask, position_embeddings=(cos, sin))[0]


def apply(layer: Layer, model: Any, hidden: Tensor, qkv: Tensor | None = None) -> Tensor:
    qkv = layer.base(layer.norm(hidden)) if qkv is None else qkv
    return layer(hidden, qkv, rotary_of(model, len(hidden))[layer.rotary_key], Eager())


def probe_of(model: Any) -> Probe:
    return Probe(rotary_of(model, PROBE_TOKENS))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


# --- every family --------------------------------------------------------------------------------------

# Settings that change a layer's structure and that the families of tests/families.py do not have.
VARIANTS: dict[str, tuple[str, Config]] = {
    "llama-mlp_bias": ("llama", {"mlp_bias": True}),
    "llama-no_grouping": ("llama", {"num_key_value_heads": 6}),
    "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2-no_cap": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma3-bias": ("gemma3_text", {"attention_bias": True}),
    "phi3-full_rotary": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "phi3-dropout": ("phi3", {"resid_pdrop": 0.5}),
}
MODELS = {name: (name, Config()) for name in FAMILIES} | VARIANTS


@cache
def model_of(name: str) -> Any:
    family, changes = MODELS[name]
    return build(family, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_every_family_runs_lean(name: str, dtype: torch.dtype, folder_of) -> None:
    model = model_of(name)
    plan = plan_for(model)
    plans = {plan.name: (plan, lowrank_for(plan, model))}
    backbone = Backbone(open_folder(folder_of(name)), plans, dtype=dtype)
    assert len(backbone.layers) == 4
    assert all(layer.lean is not None for layer in backbone.layers.values())


@pytest.mark.parametrize("tokens", [1, 5, 3 * WINDOW])
@pytest.mark.parametrize("number", [0, 1])  # families with two kinds of attention alternate them
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_equals_hugging_faces_layer(name: str, number: int, tokens: int) -> None:
    model, key = model_of(name), key_of(model_of(name), number)
    hidden = random(tokens, model.config.hidden_size)
    assert probe_of(model).agrees(module_of(model, number), key)
    lean = Layer(module_of(model, number), key, lean=True)
    given = hidden.clone()
    assert_equal(apply(lean, model, hidden), eager(model, number, hidden))
    assert torch.equal(hidden, given)

    # With products that come from elsewhere, as they do once a residual is added.
    handed = Layer(module_of(model, number), key, lean=False)
    qkv = random(tokens, sum(lean.base_product.widths), seed=1)
    given = qkv.clone()
    assert_equal(apply(lean, model, hidden, qkv), apply(handed, model, hidden, qkv))
    assert torch.equal(qkv, given)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_gradients_are_hugging_faces(name: str) -> None:
    model, key = model_of(name), key_of(model_of(name), 0)
    widths = Layer(module_of(model, 0), key, lean=True).base_product.widths
    gradients = []
    for lean in (True, False):
        hidden = random(6, model.config.hidden_size).requires_grad_()
        qkv = random(6, sum(widths), seed=1).requires_grad_()
        out = apply(Layer(module_of(model, 0), key, lean=lean), model, hidden, qkv)
        gradients.append(torch.autograd.grad(out, (hidden, qkv), random(*out.shape, seed=2)))
    for found, expected in zip(*gradients, strict=True):
        assert_equal(found, expected)


@torch.no_grad()
def test_what_it_asks_of_attention_is_what_the_module_asks() -> None:
    """A scale that no configuration tells is still the right one."""
    model, hidden = build("llama"), random(6, 48)
    model.model.layers[0].self_attn.scaling = 0.77
    assert probe_of(model).agrees(module_of(model, 0), "all")
    assert_equal(apply(Layer(module_of(model, 0), "all", lean=True), model, hidden), eager(model, 0, hidden))


@torch.no_grad()
def test_layers_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    difference = Probe._difference
    monkeypatch.setattr(
        Probe, "_difference", lambda self, module, key: tried.append(key) or difference(self, module, key)
    )
    model = model_of("gemma3_text")
    probe = probe_of(model)
    assert all(probe.agrees(module_of(model, n), key_of(model, n)) for n in range(4))
    assert tried == ["sliding_attention", "full_attention"]


# --- norms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 576, 8192])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@torch.no_grad()
def test_a_norm_is_hugging_faces_up_to_one_rounding(kind: Any, size: int, dtype: torch.dtype) -> None:
    norm = kind(size, eps=1e-6)
    norm.weight.copy_(random(size))
    norm, fused = norm.to(dtype), fused_norm(norm.to(dtype))
    assert isinstance(fused, FusedNorm)
    for scale in (1e-3, 1.0, 300.0):  # squares of the last leave float16
        hidden = (scale * random(7, size, seed=1)).to(dtype)
        expected, one = norm(hidden), torch.finfo(dtype).eps
        torch.testing.assert_close(fused(hidden), expected, rtol=max(2 * one, 2e-6), atol=1e-6)
        if dtype != torch.float32:
            assert (fused(hidden) == expected).float().mean() > 0.99, "it rounds where the family rounds"


@torch.no_grad()
def test_other_norms_stay_as_they_are() -> None:
    class Centred(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    for norm in (Centred(48), nn.LayerNorm(48), nn.Identity()):
        assert fused_norm(norm) is norm


# --- what is not known runs in Hugging Face's own code -------------------------------------------------


def scaled(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return 1.001 * forward(*args, **kwargs)


def unrotated(forward: Callable[..., Any], position_embeddings: Any, **kwargs: Any) -> Any:
    cos, sin = position_embeddings
    return forward(position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)


def scale_mlp(module: Any) -> None:
    module.mlp.forward = partial(scaled, module.mlp.forward)


def skip_the_rotary_embedding(module: Any) -> None:
    module.self_attn.forward = partial(unrotated, module.self_attn.forward)


def change_the_projection(module: Any) -> None:
    module.self_attn.o_proj.forward = partial(scaled, module.self_attn.o_proj.forward)


def put_something_behind_the_projection(module: Any) -> None:
    module.self_attn.o_proj = nn.Sequential(module.self_attn.o_proj, nn.Tanh())


def add_a_part(module: Any) -> None:
    module.self_attn.gate = nn.Linear(4, 4)


def add_a_parameter(module: Any) -> None:
    module.layer_scalar = nn.Parameter(torch.ones(1), requires_grad=False)


def add_a_buffer(module: Any) -> None:
    module.mlp.register_buffer("scale", torch.ones(1))


def norm_the_whole_query(module: Any) -> None:
    """As OLMo 2 does, whose norms have the names of Qwen 3's."""
    module.self_attn.q_norm, module.self_attn.k_norm = LlamaRMSNorm(48), LlamaRMSNorm(16)


CHANGES = [
    scale_mlp,
    skip_the_rotary_embedding,
    change_the_projection,
    put_something_behind_the_projection,
    add_a_part,
    add_a_parameter,
    add_a_buffer,
    norm_the_whole_query,
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_layer_falls_back(change: Callable[[Any], None], caplog: pytest.LogCaptureFixture) -> None:
    model, probe, hidden = model_of("llama"), probe_of(model_of("llama")), random(6, 48)
    assert probe.agrees(module_of(model, 0), "all")
    changed = module_of(model, 1)
    change(changed)
    with caplog.at_level(logging.INFO, "cloud_server.layer"):
        assert not probe.agrees(changed, "all")
    assert "LlamaDecoderLayer runs in Hugging Face's own code" in caplog.text
    assert probe.agrees(module_of(model, 2), "all"), "the others are as they were"

    cos, sin, _ = rotary_of(model, 6)["all"]
    expected = changed(hidden[None], position_embeddings=(cos, sin), batch=Eager())[0]
    assert_equal(apply(Layer(changed, "all", lean=False), model, hidden), expected)


def test_a_family_with_other_code_is_served_by_it(folder_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone as a whole: every layer falls back, and logits are those of the changed model."""
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.5 * plain(self, x))
    model, ids = build("llama"), prompts(1)[0]
    plan = plan_for(model)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    with Cloud(folder_of("llama"), [(plan, lowrank)]) as cloud, cloud.edge(plan, matrices) as edge:
        assert all(layer.lean is None for layer in cloud.backbone.layers.values())
        assert_close(logits_of(edge, ids), logits_of(merged(model, plan, lowrank, matrices), ids))
