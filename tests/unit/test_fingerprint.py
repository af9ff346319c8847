"""Fingerprints name what differs, and depend on nothing else; edge parts are always the same bytes."""

import hashlib
import shutil
from dataclasses import replace

import pytest
import tiny_checkpoint as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared import cache, edge_parts, merkle
from shared.checkpoint import ModelError, open_folder
from shared.edge_parts import EdgePart, EdgePartsError, build, check_manifest, check_tensors_file
from shared.fingerprint import Fingerprint, FingerprintError, edge_digest, for_model, tensor_digest
from shared.lowrank import ensure
from shared.merkle import MerkleError, merkle_root, tensor_digests

DIGESTS = st.dictionaries(st.text(max_size=8), st.binary(min_size=32, max_size=32), max_size=9)


def fingerprint(folder, cache_dir, plan=None):
    plan = plan or tiny.plan()
    checkpoint = open_folder(folder, "tiny")
    _, path = ensure(plan, checkpoint, cache_dir)
    return for_model(plan, checkpoint, path, build(checkpoint, cache_dir, plans=[(plan, path)]), cache_dir)


@pytest.fixture
def base(tmp_path):
    return fingerprint(tiny.write(tmp_path / "base"), tmp_path / "cache")


def test_equal_models_have_equal_fingerprints(tmp_path, base):
    again = fingerprint(tiny.write(tmp_path / "again"), tmp_path / "another-cache")
    assert base.differs_from(again) == [] and base.root == again.root and len(base.root) == 32


def test_sharding_and_prefix_do_not_matter(tmp_path, base):
    sharded = fingerprint(tiny.write_sharded(tmp_path / "s", tiny.weights()), tmp_path / "cache")
    bare = fingerprint(tiny.write(tmp_path / "p", tiny.weights(prefix="")), tmp_path / "cache")
    assert base == sharded == bare


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.layers.2.mlp.down_proj.weight", ["backbone"]),
        ("model.embed_tokens.weight", ["edge parts"]),
        ("model.norm.weight", ["edge parts"]),
    ],
)
def test_one_changed_weight_is_named(tmp_path, base, name, parts):
    tensors = tiny.weights()
    tensors[name].view(-1)[3] += 1e-3
    assert base.differs_from(fingerprint(tiny.write(tmp_path / "m", tensors), tmp_path / "cache")) == parts


def test_stored_dtype_tokenizer_and_plan_are_covered(tmp_path, base):
    half = fingerprint(tiny.write(tmp_path / "half", tiny.weights(torch.float16)), tmp_path / "cache")
    assert base.differs_from(half) == ["backbone", "edge parts"]
    folder = tiny.write(tmp_path / "tokens")
    (folder / "tokenizer.json").write_text("{}")
    assert base.differs_from(fingerprint(folder, tmp_path / "cache")) == ["edge parts"]
    scaled = fingerprint(tiny.write(tmp_path / "plan"), tmp_path / "cache", tiny.plan(scale=2.0))
    assert base.differs_from(scaled) == ["plan"]
    ranked = fingerprint(tiny.write(tmp_path / "rank"), tmp_path / "cache", tiny.plan(rank=3))
    assert base.differs_from(ranked) == ["plan", "A/B"]


def test_files_that_are_no_edge_part_do_not_matter(tmp_path, base):
    folder = tiny.write(tmp_path / "m")
    (folder / "notes.txt").write_text("changed")
    assert fingerprint(folder, tmp_path / "cache") == base


def test_digests_are_remembered_and_read_again_when_the_file_changes(tmp_path, monkeypatch):
    checkpoint = open_folder(tiny.write(tmp_path / "m"))
    first = tensor_digests(checkpoint.tensors, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(merkle, "pieces", lambda info: pytest.fail("hashed again"))
        assert tensor_digests(checkpoint.tensors, tmp_path / "cache") == first
        # The same tensor under another name is another leaf.
        with pytest.raises(pytest.fail.Exception):
            tensor_digests({"x": checkpoint.tensors["model.norm.weight"]}, tmp_path / "cache")
    tensors = tiny.weights()
    tensors["model.norm.weight"] += 1
    tiny.write(tmp_path / "m", tensors)
    second = tensor_digests(open_folder(tmp_path / "m").tensors, tmp_path / "cache")
    assert [name for name in first if first[name] != second[name]] == ["model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_memory_and_file_give_the_same_leaf(tmp_path, dtype):
    tensors = tiny.weights(dtype)
    found = tensor_digests(open_folder(tiny.write(tmp_path / "m", tensors)).tensors, tmp_path / "cache")
    assert found == {name: tensor_digest(name, tensor) for name, tensor in tensors.items()}


def test_a_leaf_covers_name_dtype_and_shape():
    zeros = torch.zeros(4, 4)
    leaves = {
        tensor_digest("a", zeros),
        tensor_digest("b", zeros),
        tensor_digest("a", zeros.reshape(2, 8)),
        tensor_digest("a", zeros.reshape(16)),
        tensor_digest("a", torch.zeros(4, 8, dtype=torch.float16)),
        tensor_digest("a", torch.zeros(4, 8, dtype=torch.bfloat16)),
    }
    assert len(leaves) == 6
    assert tensor_digest("a", torch.ones(4, 6).T) == tensor_digest(
        "a", torch.ones(6, 4)
    )  # values, not strides
    with pytest.raises(MerkleError, match="int64"):
        tensor_digest("a", torch.zeros(1, dtype=torch.int64))


@given(DIGESTS)
def test_merkle_root_ignores_order(leaves):
    assert merkle_root(leaves.items()) == merkle_root(reversed(leaves.items()))


@given(DIGESTS.filter(bool), st.data())
def test_merkle_root_covers_every_leaf(leaves, data):
    name = data.draw(st.sampled_from(sorted(leaves)))
    changed = leaves | {name: bytes(31 - i if i == 31 else b ^ 1 for i, b in enumerate(leaves[name]))}
    dropped = {other: digest for other, digest in leaves.items() if other != name}
    root = merkle_root(leaves.items())
    assert root != merkle_root(changed.items()) and root != merkle_root(dropped.items())


def test_repeated_leaves_are_refused():
    with pytest.raises(MerkleError, match="same name"):
        merkle_root([("a", bytes(32)), ("a", bytes(32))])


def test_fingerprint_values():
    one = Fingerprint(*(bytes([i]) * 32 for i in range(4)))
    assert one.differs_from(one) == []
    words = {"plan": "plan", "lowrank": "A/B", "layers": "backbone", "edge": "edge parts"}
    for field, word in words.items():
        other = replace(one, **{field: b"x" * 32})
        assert one.differs_from(other) == [word] and one.root != other.root
    assert one.differs_from(Fingerprint(*[b"x" * 32] * 4)) == list(words.values())
    with pytest.raises(FingerprintError, match="lowrank must be 32 bytes"):
        replace(one, lowrank=b"short")


def test_digests_stay_what_they_are():
    """Pins and adapters hold these: a change here must be a new version, on purpose."""
    tensor, part = tensor_digest("a", torch.arange(4.0)), EdgePart("config.json", None, 3, bytes(32))
    assert tensor.hex() == "1140eb77369057adb163c65496d27812ce1d80da438bac2360760ae3f439a335"
    assert edge_digest([part]).hex() == "882cf0a157628e141ea448d2d7a7683a78353625b0bd5edcf4e7caea6138d1b1"


# --- edge parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_edge_parts_hold_what_an_edge_needs(tmp_path, tied):
    tensors = tiny.weights(torch.bfloat16, tied=tied)
    checkpoint = open_folder(tiny.write(tmp_path / "m", tensors, tie_word_embeddings=tied))
    manifest = build(checkpoint, tmp_path / "cache")
    assert [part.name for part in manifest] == ["config.json", "tokenizer.json", "edge.safetensors"]
    for part in manifest:
        content = part.path.read_bytes()
        assert part.size == len(content) and part.sha256 == hashlib.sha256(content).digest()
    held = load_file(manifest[-1].path)
    names = {"embed_tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    names |= {} if tied else {"lm_head.weight": "lm_head.weight"}
    assert held.keys() == names.keys()
    assert all(torch.equal(held[local], tensors[name]) for local, name in names.items())
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN}
    check_tensors_file(manifest[-1].path, tied_head=tied, **sizes)
    with pytest.raises(EdgePartsError, match="must hold exactly"):
        check_tensors_file(manifest[-1].path, tied_head=not tied, **sizes)
    with pytest.raises(EdgePartsError, match="expected"):
        check_tensors_file(manifest[-1].path, tied_head=tied, vocab_size=33, hidden_size=tiny.HIDDEN)


def test_edge_parts_are_the_same_bytes_however_stored(tmp_path):
    one = build(open_folder(tiny.write(tmp_path / "one")), tmp_path / "a")
    other = build(open_folder(tiny.write_sharded(tmp_path / "two", tiny.weights(prefix=""))), tmp_path / "b")
    assert [replace(part, path=None) for part in one] == [replace(part, path=None) for part in other]
    assert one[-1].path.read_bytes() == other[-1].path.read_bytes()


def test_edge_parts_are_built_once_and_follow_changes(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path / "m")
    first = build(open_folder(folder), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(edge_parts, "copy_tensors", lambda *_: pytest.fail("written again"))
        assert build(open_folder(folder), tmp_path / "cache") == first
    served = first[0].path.read_bytes()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert first[0].path.read_bytes() == served  # what is being served stays what was digested
    assert build(open_folder(folder), tmp_path / "cache")[0].sha256 != first[0].sha256
    shutil.rmtree(cache.cache_folder(tmp_path / "cache"))
    assert build(open_folder(folder), tmp_path / "cache")[-1].sha256 == first[-1].sha256


def test_a_tied_head_with_other_values_is_refused(tmp_path):
    tensors = tiny.weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert len(build(open_folder(tiny.write(tmp_path / "same", tensors)), tmp_path / "cache")) == 3
    tensors["lm_head.weight"][5, 5] += 1
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        build(open_folder(tiny.write(tmp_path / "other", tensors)), tmp_path / "cache")


def good_manifest():
    return [
        EdgePart(name, None, 10, bytes(32)) for name in ("edge.safetensors", "config.json", "tokenizer.json")
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: [*m, EdgePart("../../.bashrc", None, 1, bytes(32))], "unknown edge part"),
        (lambda m: [*m, EdgePart("modeling_evil.py", None, 1, bytes(32))], "unknown edge part"),
        (lambda m: [*m, m[0]], "named twice"),
        (lambda m: m[1:], "edge.safetensors is missing"),
        (lambda m: [m[0], m[2]], "config.json is missing"),
        (lambda m: [replace(m[0], size=1 << 50), *m[1:]], "expected 1 to"),
        (lambda m: [replace(m[0], size=0), *m[1:]], "expected 1 to"),
        (lambda m: [m[0], replace(m[1], size=5 << 20), m[2]], "expected 1 to"),
        (lambda m: [replace(m[0], sha256=b""), *m[1:]], "32 bytes"),
    ],
)
def test_hostile_manifests(spoil, message):
    check_manifest(good_manifest())
    with pytest.raises(EdgePartsError, match=message):
        check_manifest(spoil(good_manifest()))


def test_edge_digest_covers_name_size_and_digest():
    manifest = good_manifest()
    digest = edge_digest(manifest)
    assert digest == edge_digest(manifest[::-1])
    for change in ({"name": "chat_template.jinja"}, {"size": 11}, {"sha256": b"x" * 32}):
        assert digest != edge_digest([replace(manifest[0], **change), *manifest[1:]])


def test_plans_of_equal_factors_have_a_part_each(tmp_path):
    checkpoint = open_folder(tiny.write(tmp_path / "m"), "tiny")
    plans = [tiny.plan(), tiny.plan(name="other")]
    served = [(plan, ensure(plan, checkpoint, tmp_path / "cache")[1]) for plan in plans]
    for plan, path in served:
        manifest = build(checkpoint, tmp_path / "cache", plans=[(plan, path)])
        assert [part.name for part in manifest if part.path.is_file()][-1] == f"codes-{plan.name}.safetensors"
    both = build(checkpoint, tmp_path / "cache", plans=served)
    assert [p.name for p in edge_parts.parts_of(plans[0], both)][-1] == "codes-tiny.safetensors"
    assert both[-1].sha256 == both[-2].sha256 and edge_parts.digested_parts(plans[1], both) == both[:-2]
