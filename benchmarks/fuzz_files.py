"""Mutated files of every kind that either side reads: each is taken, or refused with an error of ours."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open

from benchmarks.fuzz_bytes import damaged, text_mutant
from benchmarks.fuzz_makers import Make, gguf, json_file, pem, safetensors, toml
from cloud_server import dev_certs, tokens
from cloud_server.config import reading
from cloud_server.config.cloud import CloudConfig
from cloud_server.tls import NotYetError, TlsError, TlsFiles
from edge_client import config as edge_config
from edge_client.credentials import Credentials
from edge_client.tuning.checkpoint import CheckpointError, Identity, State, load_checkpoint, save_checkpoint
from edge_client.tuning.config import TuneConfig
from shared import gguf_header
from shared.adapter import METADATA_KEY, Adapter, AdapterError
from shared.checkpoint import ModelError
from shared.families import UnsupportedModelError
from shared.fingerprint import Fingerprint, plan_digest
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan, PlanError
from shared.tensor_file import TensorFileError, read_header

TINY = Plan.subset(name="tiny", backbone="tiny", num_layers=3, hidden_size=16, rank=2)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    ``make`` gives a mutant; ``read`` reads the file at a path, and may raise ``errors`` only: exactly these,
    not what is derived from them.
    """

    make: Make
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]


def gguf_model(folder: Path) -> bytes:
    """Return a small GGUF file."""
    import gguf as writer_of  # an extra of the cloud's

    path = folder / "tiny.gguf"
    writer = writer_of.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(16)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<a>", *(chr(65 + i) for i in range(15))])
    writer.add_token_types([1] * 16)
    writer.add_token_merges(["A B"])
    names = [
        "token_embd.weight",
        *(f"blk.0.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "attn_output")),
    ]
    names += [f"blk.0.{n}.weight" for n in ("ffn_gate", "ffn_up", "ffn_down")]
    for name in names:
        rows = 8 if name.split(".")[2:3] in (["attn_k"], ["attn_v"]) else 16
        writer.add_tensor(name, torch.ones(rows, 16).numpy())
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor(name, torch.ones(16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def fingerprint() -> Fingerprint:
    """Return a fingerprint that fits the tiny plan."""
    return Fingerprint(plan=plan_digest(TINY), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


def kinds(folder: Path, model: Path) -> dict[str, Kind]:
    """Return all kinds; ``folder`` is for what they begin with, ``model`` a model to take apart."""
    folder.mkdir(parents=True, exist_ok=True)
    Adapter.random(TINY, fingerprint(), 0, 0.1, name="mine").save(folder / "a.safetensors")
    _save_run(folder / "run" / "state.safetensors")
    tokens.add(folder / "tokens.json", "laptop")
    tokens.add(folder / "tokens.json", "jetson")
    dev_certs.make(folder / "certs", ["localhost"], [], 30)
    certificates = {
        name: (folder / "certs" / name).read_bytes() for name in ("server.pem", "server.key", "ca.pem")
    }
    cloud: dict[str, Any] = CloudConfig(model=str(model)).model_dump(mode="json", exclude_none=True)
    edge: dict[str, Any] = edge_config.EdgeConfig().model_dump(mode="json", exclude_none=True)
    certs = folder / "certs"

    def model_with(name: str) -> Callable[[Path], object]:
        return lambda path: _read_model(model, name, path)

    book = folder / "tokens.json"
    return {
        "adapter": Kind(
            safetensors((folder / "a.safetensors").read_bytes(), METADATA_KEY), Adapter.load, (AdapterError,)
        ),
        "run": Kind(
            safetensors((folder / "run" / "state.safetensors").read_bytes(), "privatelora_tuning"),
            load_checkpoint,
            (CheckpointError,),
        ),
        "plan": Kind(
            lambda rng: text_mutant(rng, TINY.canonical_json()).encode("utf-8", "replace"),
            lambda path: Plan.parse(path.read_text("utf-8", "replace")),
            (PlanError,),
        ),
        "header": Kind(
            safetensors((model / "model.safetensors").read_bytes()), _read_all, (TensorFileError,)
        ),
        "weights": Kind(
            safetensors((model / "model.safetensors").read_bytes()),
            model_with("model.safetensors"),
            (ModelError, UnsupportedModelError),
        ),
        "config": Kind(
            json_file((model / "config.json").read_bytes()),
            model_with("config.json"),
            (ModelError, UnsupportedModelError),
        ),
        "gguf": Kind(gguf(gguf_model(folder)), gguf_header.check, (gguf_header.GgufError,)),
        "cloud-toml": Kind(toml(cloud), _read_cloud_toml, (ValidationError, reading.ConfigError)),
        "edge-toml": Kind(toml(edge), edge_config.load_config, (edge_config.SettingsError,)),
        "tokens": Kind(json_file(book.read_bytes()), _read_tokens, (tokens.TokenFileError,)),
        "token": Kind(
            lambda rng: damaged(rng, b"plora_0123456789012345678901234567890123456789012\n"),
            _read_token,
            (edge_config.SettingsError,),
        ),
        "server-cert": Kind(
            pem(certificates["server.pem"]),
            lambda path: TlsFiles(path, certs / "server.key", certs / "ca.pem"),
            (TlsError, NotYetError),
        ),
        "server-key": Kind(
            pem(certificates["server.key"]),
            lambda path: TlsFiles(certs / "server.pem", path, None),
            (TlsError,),
        ),
        "own-ca": Kind(pem(certificates["ca.pem"]), lambda path: _read_ca(certs, path), (ValueError,)),
        "client-ca": Kind(
            pem(certificates["ca.pem"]),
            lambda path: TlsFiles(certs / "server.pem", certs / "server.key", path),
            (TlsError,),
        ),
    }


def _save_run(path: Path) -> None:
    matrices = {layer: torch.zeros(TINY.groups, TINY.r_c2d, TINY.r_d2c) for layer in TINY.owners}
    identity = Identity(
        name="mine", data="data.jsonl", cloud="c:1", data_digest="0" * 64, config=TuneConfig(), plan=TINY,
        fingerprint="0" * 64, wire_dtype="float32", dtype="float32", device="cpu", threads=1,
    )  # fmt: skip
    state = State.begin(matrices)
    state.train_losses, state.validation_losses = [(1, 0.5)], [(1, 0.25)]
    save_checkpoint(path, identity, state)


def _read_all(path: Path) -> None:
    """Read a header, and then the tensors as those do who have read it."""
    header = read_header(path)
    with safe_open(path, framework="pt") as reader:
        for name in header.tensors:
            reader.get_tensor(name)


def _read_model(model: Path, name: str, path: Path) -> None:
    """Open a model one of whose files is the one at ``path``, and load its tensors."""
    folder = path.parent / "model"
    if not folder.is_dir():
        folder.mkdir()
        for file in model.iterdir():
            os.link(file, folder / file.name)
    (folder / name).unlink(missing_ok=True)
    os.link(path, folder / name)
    try:
        checkpoint = resolve(str(folder), progress=False)
        checkpoint.load(checkpoint.tensors)
    finally:
        (folder / name).unlink()
        os.link(model / name, folder / name)


def _read_cloud_toml(path: Path) -> None:
    settings = reading.load_config(path)
    pb.Limits(  # what is stated of it must fit the message
        max_context_tokens=settings.max_context_tokens or 0,
        max_step_tokens=settings.max_step_tokens,
        max_rows=settings.max_rows,
        max_steps_in_flight=settings.max_steps_in_flight,
        grace_period_ms=int(settings.grace_period_s * 1000),
    )


def _read_ca(certs: Path, path: Path) -> None:
    place = path.parent / "ca"
    place.mkdir(exist_ok=True)
    (place / "ca.pem").write_bytes(path.read_bytes())
    (place / "ca.key").write_bytes((certs / "ca.key").read_bytes())
    dev_certs.make(place, ["localhost"], [], 1)


def _read_tokens(path: Path) -> None:
    tokens.entries(path)
    path.chmod(0o600)
    book = tokens.TokenBook(path)
    book.identity("plora_x")
    book.refresh()


def _read_token(path: Path) -> None:
    path.chmod(0o600)
    Credentials.of(edge_config.EdgeConfig(token_file=path, tls=True))
