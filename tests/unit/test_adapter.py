"""The adapter file: what is saved comes back, and nothing else is accepted."""

import json
import os
import stat
import struct

import pytest
import tiny_checkpoint as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shared import adapter as adapter_module
from shared.adapter import METADATA_KEY, Adapter, AdapterError, tensor_shapes
from shared.fingerprint import Fingerprint, plan_digest
from shared.tensor_file import read_header


def fingerprint(plan):
    return Fingerprint(plan_digest(plan), *(bytes([i]) * 32 for i in range(3)))


def make(seed=0, **changes):
    plan = tiny.plan(**({"r_c2d": 4, "r_d2c": 3} | changes))
    return Adapter.random(plan, fingerprint(plan), seed, 0.05, name="mine")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.safetensors"


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_what_is_saved_comes_back(path, layout):
    saved = make(layout=layout)
    saved.training = {"steps": 3, "loss": [1.5, 1.25]}
    saved.save(path)
    loaded = Adapter.load(path)
    assert (loaded.plan, loaded.fingerprint, loaded.name) == (saved.plan, saved.fingerprint, "mine")
    assert (loaded.created, loaded.training) == (saved.created, saved.training)
    assert loaded.matrices.keys() == saved.matrices.keys()
    assert all(torch.equal(loaded.matrices[layer], m) for layer, m in saved.matrices.items())
    assert saved.matrices[0].shape == (3 if layout == "per_projection" else 1, 4, 3)


def test_zeros_and_random():
    plan = tiny.plan()
    zeros = Adapter.zeros(plan, fingerprint(plan))
    assert set(zeros.matrices) == {0, 1, 2} and not any(m.any() for m in zeros.matrices.values())
    one, same, other = make(1), make(1), make(2)
    assert torch.equal(one.matrices[1], same.matrices[1])
    assert not torch.equal(one.matrices[1], other.matrices[1])
    assert not torch.equal(one.matrices[0], one.matrices[1])
    wide = Adapter.random(tiny.plan(rank=128), fingerprint(plan), 0, 0.5)
    assert abs(wide.matrices[0].std().item() - 0.5) < 0.01


def test_grouped_plans_hold_one_m_per_adapted_layer(path):
    plan = tiny.grouped_plan()
    Adapter.random(plan, fingerprint(plan), 0, 1.0).save(path)
    assert list(Adapter.load(path).matrices) == [0, 1, 2]


def test_layers_that_share_have_one_m_in_the_file(path):
    plan = tiny.plan(exchange_layers=(0,), share_residual_codes=2, r_c2d=3, r_d2c=5)
    made = Adapter.random(plan, fingerprint(plan), 0, 1.0)
    assert sorted(tensor_shapes(plan)) == ["layers.0.M", "layers.2.M"]
    made.save(path)
    found = Adapter.load(path)
    assert found.plan == plan and list(found.matrices) == [0, 2]
    assert all(torch.equal(found.matrices[layer], made.matrices[layer]) for layer in (0, 2))
    made.matrices[1] = made.matrices[0]
    with pytest.raises(AdapterError, match=r"given for layers \[0, 1, 2\], .* has one for \(0, 2\)"):
        made.save(path)


def test_only_the_owner_can_read_it_and_saving_replaces_in_one_step(path, monkeypatch):
    old = os.umask(0)
    try:
        make(1).save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        make(2).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_m_does_not_appear_in_a_repr():
    assert "tensor" not in repr(make())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a.matrices.pop(1), "the plan adapts"),
        (lambda a: a.matrices.update({7: a.matrices[0]}), "the plan adapts"),
        (lambda a: a.matrices.update({0: torch.zeros(3, 3, 4)}), "expected float32"),
        (lambda a: a.matrices.update({0: a.matrices[0].half()}), "expected float32"),
        (lambda a: a.matrices[0].fill_(float("nan")), "training diverged"),
        (lambda a: setattr(a, "name", "a\nb"), "name"),
        (lambda a: setattr(a, "created", "yesterday"), "created"),
        (lambda a: setattr(a, "training", {"log": "x" * 300_000}), "shorten"),
        (lambda a: setattr(a, "training", {"m": torch.zeros(1)}), "training"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(path, spoil, message):
    adapter = make()
    spoil(adapter)
    with pytest.raises(AdapterError, match=message):
        adapter.save(path)
    assert not path.exists()


def rewrite(path, tensors=None, metadata=None, **changes):
    """Save a good adapter, then write it again with other tensors or metadata."""
    make().save(path)
    facts = json.loads(read_header(path).metadata[METADATA_KEY]) | changes
    text = metadata if metadata is not None else {METADATA_KEY: json.dumps(facts)}
    save_file({**load_file(path), **(tensors or {})}, path, metadata=text)
    return facts


GOOD = "layers.0.M"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.9.M": torch.zeros(3, 4, 3)}, "unknown tensors 'layers.9.M'"),
        ({"layers.00.M": torch.zeros(3, 4, 3)}, "unknown tensors"),
        ({GOOD: torch.zeros(3, 3, 4)}, r"shape \(3, 3, 4\), expected \(3, 4, 3\)"),
        ({GOOD: torch.zeros(36)}, r"expected \(3, 4, 3\)"),
        ({GOOD: torch.zeros(3, 4, 3).half()}, "F16, expected F32"),
        ({GOOD: torch.zeros(3, 4, 3)}, "damaged: what it holds does not match"),
        ({GOOD: torch.full((3, 4, 3), float("nan"))}, "NaN or Inf"),
        ({GOOD: torch.full((3, 4, 3), float("-inf"))}, "NaN or Inf"),
    ],
)
def test_wrong_tensors(path, tensors, message):
    rewrite(path, tensors)
    with pytest.raises(AdapterError, match=message):
        Adapter.load(path)


def test_a_missing_tensor(path):
    make().save(path)
    metadata = dict(read_header(path).metadata)
    tensors = load_file(path)
    del tensors[GOOD]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(AdapterError, match=r"missing tensors 'layers\.0\.M'"):
        Adapter.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version.*newer"),
        ({"name": ""}, "name"),
        ({"name": "x" * 200}, "name"),
        ({"created": "2026"}, "created"),
        ({"surprise": 1}, "surprise"),
        ({"fingerprint": {}}, "fingerprint"),
        ({"root": "0" * 64}, "contradict"),
        ({"root": "zz"}, "root"),
        ({"plan": {}}, "plan"),
        ({"plan": None}, "plan"),
    ],
)
def test_wrong_metadata(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(AdapterError, match=message):
        Adapter.load(path)


def test_a_plan_other_than_the_fingerprints_is_refused(path):
    rewrite(path, plan=tiny.plan(r_c2d=4, r_d2c=3, scale=2.0).model_dump(mode="json"))
    with pytest.raises(AdapterError, match="plan and fingerprint contradict"):
        Adapter.load(path)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"format": "pt"}, {METADATA_KEY: "{"}, {METADATA_KEY: "[" * 50_000}, {METADATA_KEY: "x" * 300_000}],
)
def test_other_metadata(path, metadata):
    rewrite(path, metadata=metadata)
    with pytest.raises(AdapterError):
        Adapter.load(path)


def test_a_plan_of_giant_ranks_allocates_nothing(path):
    plan = tiny.plan(r_c2d=8192, r_d2c=8192).model_dump(mode="json")
    rewrite(path, plan=plan)
    with pytest.raises(AdapterError):
        Adapter.load(path)


def test_a_file_above_the_cap_is_not_read(path, monkeypatch):
    make().save(path)
    monkeypatch.setattr(adapter_module, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(adapter_module, "read_header", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(AdapterError, match="at most 100"):
        Adapter.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", struct.pack("<Q", 1 << 63) + b"{}", struct.pack("<Q", 3 << 20) + bytes(4 << 20)],
)
def test_not_even_safetensors(path, content):
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="not an adapter"):
        Adapter.load(path)


def test_missing_files_and_folders(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(AdapterError):
            Adapter.load(place)


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_harmless(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "mine.safetensors"
    make().save(path)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "grow"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "grow":
        content += data.draw(st.binary(min_size=1, max_size=64))
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    if kind != "flip":
        with pytest.raises(AdapterError):
            Adapter.load(path)
        return
    try:
        loaded = Adapter.load(path)
    except AdapterError:
        return
    # Only a flip in the name or the date can pass.
    assert all(torch.equal(loaded.matrices[layer], m) for layer, m in make().matrices.items())
    assert (loaded.plan, loaded.fingerprint) == (make().plan, make().fingerprint)
