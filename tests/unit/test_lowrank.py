"""A and B: shapes for every plan, the properties each initialiser promises, and the file."""

import pytest
import tiny_checkpoint as tiny
import torch
from safetensors.torch import load_file, save_file

from shared import lowrank
from shared.checkpoint import open_folder
from shared.lowrank import LowRank, LowRankError, ensure, make

ALL = pytest.mark.parametrize("initialiser", ["gaussian", "orthonormal", "svd"])
LAYOUTS = pytest.mark.parametrize("layout", ["per_projection", "fused"])
WIDTH = tiny.HIDDEN + 2 * tiny.KV


@pytest.fixture
def checkpoint(tmp_path):
    return open_folder(tiny.write(tmp_path / "tiny"))


def w(checkpoint, layer, target):
    name = f"model.layers.{layer}.self_attn.{target}_proj.weight"
    return checkpoint.load([name], torch.float64)[name].T  # (hidden, d_out)


@ALL
@LAYOUTS
@pytest.mark.parametrize("ranks", [(4, 4), (5, 3), (2, 6)])
def test_shapes(checkpoint, initialiser, layout, ranks):
    plan = tiny.plan(initialiser=initialiser, layout=layout, r_c2d=ranks[0], r_d2c=ranks[1])
    made = make(plan, checkpoint.geometry, checkpoint)
    groups = 3 if layout == "per_projection" else 1
    assert set(made.a) == set(made.b) == {0, 1, 2}
    for layer in made.a:
        assert (
            made.a[layer].shape == (tiny.HIDDEN, groups * ranks[0]) and made.a[layer].dtype == torch.float32
        )
        assert made.b[layer].shape == (ranks[1], WIDTH) and made.b[layer].dtype == torch.float32


@ALL
def test_targets_and_layers_of_the_plan_only(checkpoint, initialiser):
    plan = tiny.plan(layers=(1,), initialiser=initialiser, targets=("q", "v"))
    made = make(plan, checkpoint.geometry, checkpoint)
    assert list(made.a) == list(made.b) == [1]
    assert made.a[1].shape == (tiny.HIDDEN, 8) and made.b[1].shape == (4, tiny.HIDDEN + tiny.KV)


def test_orthonormal(checkpoint):
    made = make(tiny.plan(initialiser="orthonormal", r_c2d=6, r_d2c=5), checkpoint.geometry)
    for layer in range(tiny.LAYERS):
        for a in made.a[layer].double().split(6, dim=1):
            torch.testing.assert_close(a.T @ a, torch.eye(6).double(), atol=1e-6, rtol=0)
        for b in made.b[layer].double().split([tiny.HIDDEN, tiny.KV, tiny.KV], dim=1):
            torch.testing.assert_close(b @ b.T, torch.eye(5).double(), atol=1e-6, rtol=0)
    assert not torch.equal(made.a[0], made.a[1])
    assert not torch.equal(made.a[0][:, :6], made.a[0][:, 6:12])


def test_gaussian_has_the_papers_spread(checkpoint):
    made = make(tiny.plan(initialiser="gaussian", rank=128), checkpoint.geometry)
    values = torch.cat([t.flatten() for t in (*made.a.values(), *made.b.values())])
    assert abs(values.std().item() - 0.02) < 0.001 and abs(values.mean().item()) < 0.001


@LAYOUTS
def test_svd_gives_the_best_approximation_of_w(checkpoint, layout):
    rank = 4
    made = make(tiny.plan(initialiser="svd", rank=rank, layout=layout), checkpoint.geometry, checkpoint)
    parts = [w(checkpoint, 1, t) for t in "qkv"]
    widths = [part.shape[1] for part in parts]
    blocks = parts if layout == "per_projection" else [torch.cat(parts, dim=1)]
    encoders = made.a[1].double().split(rank, dim=1)
    decoders = made.b[1].double().split(widths if layout == "per_projection" else [WIDTH], dim=1)
    for block, a, b in zip(blocks, encoders, decoders, strict=True):
        s = torch.linalg.svdvals(block)
        # Eckart-Young: no rank-r matrix is closer than the tail of the spectrum.
        torch.testing.assert_close(torch.dist(block, a @ b), s[rank:].norm(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.T @ a, torch.eye(rank).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close((b @ b.T).diagonal().sqrt(), s[:rank], atol=1e-5, rtol=1e-5)


def test_svd_signs_do_not_depend_on_the_solver():
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _ = lowrank.svd(matrix, 4)
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_svd_with_unequal_ranks_takes_the_first_of_each(checkpoint):
    both = make(tiny.plan(initialiser="svd", r_c2d=6, r_d2c=6), checkpoint.geometry, checkpoint)
    some = make(tiny.plan(initialiser="svd", r_c2d=6, r_d2c=2), checkpoint.geometry, checkpoint)
    torch.testing.assert_close(some.a[0], both.a[0])
    torch.testing.assert_close(some.b[0], both.b[0][:2])


def test_grouped_plans_take_a_from_the_exchange_and_b_from_the_adapted_layer(checkpoint):
    plan = tiny.grouped_plan(initialiser="svd")
    grouped = make(plan, checkpoint.geometry, checkpoint)
    each = make(tiny.plan(initialiser="svd"), checkpoint.geometry, checkpoint)
    assert list(grouped.a) == [0, 2] and list(grouped.b) == [0, 1, 2]
    assert all(torch.equal(grouped.a[layer], each.a[layer]) for layer in (0, 2))
    assert all(torch.equal(grouped.b[layer], each.b[layer]) for layer in (0, 1, 2))


def test_fused_qkv_weights_are_split(tmp_path):
    tensors = tiny.weights()
    fused = dict(tensors)
    for layer in range(tiny.LAYERS):
        start = f"model.layers.{layer}.self_attn."
        fused[f"{start}qkv_proj.weight"] = torch.cat([fused.pop(f"{start}{t}_proj.weight") for t in "qkv"])
    one = open_folder(tiny.write(tmp_path / "separate", tensors))
    other = open_folder(tiny.write(tmp_path / "fused", fused))
    plan = tiny.plan(initialiser="svd")
    a, b = make(plan, one.geometry, one), make(plan, other.geometry, other)
    assert all(torch.equal(a.a[layer], b.a[layer]) and torch.equal(a.b[layer], b.b[layer]) for layer in a.a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initialiser": "orthonormal", "r_c2d": tiny.HIDDEN + 1}, "r_c2d = 17.*at most 16"),
        ({"initialiser": "orthonormal", "r_d2c": tiny.KV + 1}, "r_d2c = 9.*at most 8"),
        ({"initialiser": "svd", "r_c2d": tiny.KV + 1}, "r_c2d = 9.*at most 8"),
        ({"initialiser": "svd", "layout": "fused", "r_d2c": tiny.HIDDEN + 1}, "r_d2c = 17.*at most 16"),
        ({"num_layers": 4}, "is for 4 layers"),
        ({"hidden_size": 32}, "of width 32"),
    ],
)
def test_impossible_plans(checkpoint, changes, message):
    with pytest.raises(LowRankError, match=message):
        make(tiny.plan(**changes), checkpoint.geometry, checkpoint)


def test_a_rank_above_the_width_is_possible_with_gaussian(checkpoint):
    assert make(tiny.plan(initialiser="gaussian", rank=40), checkpoint.geometry).b[0].shape[0] == 40


def test_ensure_makes_the_file_once(checkpoint, tmp_path, monkeypatch):
    plan = tiny.plan(initialiser="svd")
    first, path = ensure(plan, checkpoint, tmp_path / "cache")
    monkeypatch.setattr(lowrank, "make", lambda *_, **__: pytest.fail("made again"))
    second, same = ensure(plan, checkpoint, tmp_path / "cache")
    assert path == same and all(torch.equal(first.a[layer], second.a[layer]) for layer in first.a)


def test_ensure_keeps_plans_and_backbones_apart(tmp_path):
    one = open_folder(tiny.write(tmp_path / "a" / "m"))
    tensors = tiny.weights()
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    other = open_folder(tiny.write(tmp_path / "b" / "m", tensors))
    made = [(tiny.plan(), one), (tiny.plan(scale=2.0), one), (tiny.plan(), other)]
    assert len({ensure(plan, checkpoint, tmp_path / "cache")[1] for plan, checkpoint in made}) == 3


@pytest.mark.parametrize("kind", ["missing", "extra", "shape", "dtype", "nan", "inf", "truncated", "empty"])
def test_a_damaged_file_is_refused_never_remade(checkpoint, tmp_path, kind):
    plan = tiny.plan()
    _, path = ensure(plan, checkpoint, tmp_path / "cache")
    tensors = load_file(path)
    name = "layers.1.B"
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["layers.9.B"] = torch.zeros(1)
    elif kind == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif kind == "dtype":
        tensors[name] = tensors[name].half()
    elif kind in ("nan", "inf"):
        tensors[name][0, 0] = float(kind)
    save_file(tensors, path)
    if kind in ("truncated", "empty"):
        path.write_bytes(path.read_bytes()[:-1] if kind == "truncated" else b"")
    before = path.read_bytes()
    with pytest.raises(LowRankError, match=str(path.name)):
        ensure(plan, checkpoint, tmp_path / "cache")
    assert path.read_bytes() == before


def test_save_and_load_are_inverse(checkpoint, tmp_path):
    plan = tiny.grouped_plan(r_c2d=5, r_d2c=3)
    made = make(plan, checkpoint.geometry)
    made.save(tmp_path / "ab.safetensors")
    loaded = LowRank.load(tmp_path / "ab.safetensors", plan, checkpoint.geometry)
    assert all(torch.equal(made.a[layer], loaded.a[layer]) for layer in plan.exchange_layers)
    assert all(torch.equal(made.b[layer], loaded.b[layer]) for layer in plan.adapted_layers)
