"""What fuzzing has found, each once more: inputs that were not answered as they should be."""

import base64
import json
import struct

import grpc
import pytest
from pydantic import ValidationError

from cloud_server import dev_certs
from cloud_server.config import reading
from cloud_server.handshake import Offer, agreed, fingerprint_message
from cloud_server.refusal import Refusal
from cloud_server.tls import TlsError, TlsFiles
from edge_client import config as edge_config
from edge_client import trust
from edge_client.template import ChatTemplate, TemplateError
from edge_client.tokenizer import TokenizerError, load_tokenizer
from edge_client.tuning.checkpoint import CheckpointError, load_checkpoint
from shared import PROTOCOL_VERSION
from shared.checkpoint import ModelError, open_folder
from shared.families import UnsupportedModelError
from shared.fingerprint import Fingerprint, plan_digest
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.tensor_file import TensorFileError, read_header
from tests.unit import tiny_checkpoint
from tests.unit.session_talk import PLAN

PRINT = Fingerprint(plan=plan_digest(PLAN), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


@pytest.mark.parametrize("branch", ["lowrank", "layers", "edge"])
@pytest.mark.parametrize("digest", [b"", b"\1" * 31, b"\1" * 5000])
def test_a_fingerprint_whose_branches_are_no_digests(branch: str, digest: bytes) -> None:
    """It was answered with UNKNOWN."""
    message = fingerprint_message(PRINT)
    setattr(message, branch, digest)
    request = pb.Open(protocol_version=PROTOCOL_VERSION, fingerprint=message)
    with pytest.raises(Refusal, match=f"branch {branch} must be 32 bytes") as refusal:
        agreed({PRINT.plan: Offer(PLAN, PRINT)}, request)
    assert refusal.value.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.timeout(180)
def test_the_largest_plans_that_a_cloud_may_offer() -> None:
    """Checking one took seconds, and a cloud may offer 64."""
    layers = tuple(range(4096))
    for exchange in (layers, layers[::2], layers[:1]):
        facts = {"name": "p", "backbone": "b", "num_layers": 4096, "hidden_size": 8}
        plan = Plan.subset(layers, exchange_layers=exchange, **facts)  # type: ignore[arg-type]
        for _ in range(60):
            again = Plan.parse(plan.canonical_json())
            assert again.fed_by(exchange[-1])[-1] == 4095 and again.owner_of(4095) == 4095
    sparse = Plan.subset((1, 2, 5, 6, 9), exchange_layers=(1, 5), share_residual_codes=2, **facts)  # type: ignore[arg-type]
    assert [sparse.source_of(layer) for layer in (1, 2, 5, 6, 9)] == [1, 1, 5, 5, 5]
    assert sparse.owners == (1, 5, 9) and [sparse.owner_of(n) for n in (1, 2, 5, 6, 9)] == [1, 1, 5, 5, 9]


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "a{% continue %}b",
        "{% if messages %}{% break %}{% endif %}",
        "{% macro m() %}{% break %}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_that_leaves_a_loop_where_there_is_none(source: str) -> None:
    """The signal to the loop around it came out of the rendering."""
    with pytest.raises(TemplateError, match="outside of a loop"):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("plans", [[1], "ab", 5, None, True])
def test_pins_whose_plans_are_none(tmp_path, plans) -> None:
    from benchmarks.fuzz_offers import offer_of
    from benchmarks.fuzz_offers import plans as some_plans
    from edge_client.offer import CloudOffer

    (tmp_path / "known_clouds.json").write_text(json.dumps({"c:1": {"plans": plans}}))
    offer = CloudOffer.check("c:1", offer_of(some_plans()))
    with pytest.raises(trust.TrustError, match="is damaged"):
        trust.check_known(offer, *offer.plan(None), config_dir=tmp_path)


def test_pins_nested_too_deeply(tmp_path) -> None:
    (tmp_path / "known_clouds.json").write_text("[" * 100_000)
    with pytest.raises(trust.TrustError, match="is damaged"):
        trust._read(tmp_path / "known_clouds.json")


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a = " + "[" * 5000, "model = \xff", "model", "a = " + "9" * 5000]
)
def test_settings_that_are_no_toml(tmp_path, text: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(reading.ConfigError, match="settings.toml"):
        reading.load_config(path)
    with pytest.raises(edge_config.SettingsError, match="settings.toml"):
        edge_config.load_config(path)


@pytest.mark.parametrize(
    "line",
    [
        *("grace_period_s = inf", "grace_period_s = nan", "grace_period_s = 1e10", "write_timeout_s = inf"),
        *("claim_idle_s = 1e10", "queue = {max_wait_s = inf}", "queue = {max_wait_s = 1e10}"),
        *("max_steps_in_flight = 4294967296", "max_rows = 4294967296", "kv_bytes = 99999999999999999999"),
        *("max_context_tokens = 99999999999", "tuning = {min_share = nan}", "per_identity = {burst_s = inf}"),
    ],
)
def test_settings_that_no_timer_or_message_could_hold(tmp_path, line: str) -> None:
    """Describe was answered with UNKNOWN by a cloud with such a grace period."""
    path = tmp_path / "settings.toml"
    path.write_text(line)
    with pytest.raises(ValidationError):
        reading.load_config(path)


def test_an_edge_that_would_wait_for_ever(tmp_path) -> None:
    for line in ("step_timeout_s = inf", "connect_timeout_s = 1e300", "temperature = nan"):
        (tmp_path / "settings.toml").write_text(line)
        with pytest.raises(edge_config.SettingsError):
            edge_config.load_config(tmp_path / "settings.toml")


@pytest.mark.parametrize(
    "header", [b"[]", b"5", b'{"__metadata__": []}', b"[" * 100_000, b'{"__metadata__": 5}']
)
def test_a_tuning_run_whose_header_is_of_another_shape(tmp_path, header: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_every_damaged_byte_of_a_certificate_is_answered_in_words(tmp_path) -> None:
    """Some are noticed only when the certificate is asked for its key: at a renewal, in a handshake."""
    dev_certs.make(tmp_path, ["localhost"], [], 30)
    begin, *body, end = (tmp_path / "server.pem").read_bytes().strip().splitlines()
    inside, bad = base64.b64decode(b"".join(body)), tmp_path / "bad.pem"
    refused = 0
    for at in range(len(inside)):
        for flip in (0x01, 0x80):
            damaged = inside[:at] + bytes([inside[at] ^ flip]) + inside[at + 1 :]
            bad.write_bytes(b"\n".join([begin, base64.encodebytes(damaged).strip(), end, b""]))
            try:
                TlsFiles(bad, tmp_path / "server.key", None)
            except TlsError:
                refused += 1
    assert refused > len(inside) / 2


def test_tensor_names_that_are_no_text(tmp_path) -> None:
    text = b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(TensorFileError, match="no text"):
        read_header(path)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_special_token_that_is_no_text(tmp_path, file: str) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"bos_token": "\ud800"}))
    with pytest.raises(TokenizerError, match="no text"):
        load_tokenizer(tmp_path, 10, 10)


@pytest.mark.parametrize("metadata", ['{"format": "\\ud800"}', '{"\\udc00": "pt"}'])
def test_weights_whose_metadata_is_no_text(tmp_path, metadata: str) -> None:
    """It came out as safetensors' own error when the first tensor was read."""
    folder = tiny_checkpoint.write(tmp_path / "model")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = b'{"__metadata__": ' + metadata.encode() + b"," + raw[9 : 8 + length]
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    with pytest.raises(ModelError, match="no text"):
        open_folder(folder)
    with pytest.raises(TensorFileError, match="no text"):
        read_header(path)


def test_weights_that_change_after_they_were_opened(tmp_path) -> None:
    checkpoint = open_folder(tiny_checkpoint.write(tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(ModelError, match="cannot be read"):
        checkpoint.load(checkpoint.tensors)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [[], {}, 5, ["linear"]])
def test_a_rotary_scheme_that_is_no_name(tmp_path, key: str, kind: object) -> None:
    """A list cannot be looked up among names: TypeError."""
    for called in ("type", "rope_type"):
        folder = tiny_checkpoint.write(tmp_path / called, **{key: {called: kind, "factor": 2.0}})
        with pytest.raises(UnsupportedModelError, match="must be a name"):
            open_folder(folder)


@pytest.mark.parametrize("added", [5, 1.5, True, "x", {"a": 1}])
def test_added_tokens_that_are_no_list(tmp_path, added: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(TokenizerError, match="added_tokens must be a list"):
        load_tokenizer(tmp_path, 10, 10)
