"""The edge trusts no cloud: offers, parts, configuration and tokenizer files, and pins."""

import dataclasses
import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from edge_client import part_settings, part_tensors, parts, trust
from edge_client.offer import CloudOffer, OfferError
from edge_client.shell import build_shell
from edge_client.template import TemplateError
from edge_client.tokenizer import TokenizerError, load_tokenizer
from shared import PROTOCOL_VERSION
from shared.adapter import Adapter, AdapterError
from shared.edge_parts import EdgePart, EdgePartsError, build, check_manifest
from shared.fingerprint import Fingerprint, edge_digest, plan_digest
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests import families


class Source:
    """Serves files of a folder, as a connection would; ``spoil`` changes the pieces of a part."""

    def __init__(self, manifest, spoil=None):
        self.paths = [part.path for part in manifest]
        self.spoil = spoil or (lambda name, pieces: pieces)
        self.asked = []

    def fetch_part(self, index, offset=0):
        data = self.paths[index].read_bytes()
        self.asked.append((self.paths[index].name, offset))
        pieces = [data[i : i + 5000] for i in range(offset, len(data), 5000)]
        yield from self.spoil(self.paths[index].name, pieces)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = families.save("gemma2", tmp_path_factory.mktemp("model"))
    return build(resolve(str(folder), progress=False), tmp_path_factory.mktemp("cloud"))


def everything(folder):
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name
    )


# --- fetching -----------------------------------------------------------------------------------------


def test_parts_are_fetched_once_and_give_the_model(manifest, tmp_path):
    source = Source(manifest)
    folder = parts.fetch(source, manifest, tmp_path, progress=False)
    assert folder == tmp_path / "edge" / edge_digest(manifest).hex()
    assert everything(folder) == sorted(part.name for part in manifest)
    again = Source(manifest)
    assert parts.fetch(again, manifest, tmp_path, progress=False) == folder and again.asked == []

    config, sizes = part_settings.read_config(folder)
    shell = build_shell(config, part_tensors.read_tensors(folder, sizes), "cpu", torch.float32)
    whole = families.build("gemma2")
    ids = torch.arange(4, 40)[None]
    assert torch.equal(shell.embed_tokens(ids), whole.model.embed_tokens(ids))
    assert shell.softcap == whole.config.final_logit_softcapping
    assert part_settings.read_generation_config(folder, config).eos_token_id == whole.config.eos_token_id
    tokenizer, reference = load_tokenizer(folder, sizes.vocab_size, 512), families.tokenizer()
    for text in ("Hello\n wörld <eos>", "", "x" * 300):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == reference.apply_chat_template(
        chat, return_dict=False
    )
    assert tokenizer.apply_chat_template([chat, chat], tokenize=False) == ["<bos>user: Hi<eos>"] * 2
    open_end = [*chat, {"role": "assistant", "content": "I"}]
    assert tokenizer.apply_chat_template(open_end, tokenize=False, continue_final_message=True).endswith(
        ": I"
    )


def test_broken_transfer_is_continued(manifest, tmp_path):
    def stop_early(name, pieces):
        if name == "edge.safetensors":
            yield from pieces[:3]
            raise ConnectionError("lost")
        yield from pieces

    with pytest.raises(ConnectionError):
        parts.fetch(Source(manifest, stop_early), manifest, tmp_path, progress=False)
    source = Source(manifest)
    parts.fetch(source, manifest, tmp_path, progress=False)
    assert ("edge.safetensors", 15000) in source.asked


def test_damaged_remains_and_damaged_cache_are_fetched_again(manifest, tmp_path):
    folder = parts.fetch(Source(manifest), manifest, tmp_path, progress=False)
    good = (folder / "edge.safetensors").read_bytes()
    (folder / "edge.safetensors").rename(folder / "edge.safetensors.partial")
    (folder / "edge.safetensors.partial").write_bytes(b"\0" * 7000)
    (folder / "config.json").write_text("{}")
    source = Source(manifest)
    parts.fetch(source, manifest, tmp_path, progress=False)
    assert (folder / "edge.safetensors").read_bytes() == good
    assert [offset for name, offset in source.asked if name == "edge.safetensors"] == [7000, 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda name, pieces: [b"\1" * len(p) for p in pieces], "other bytes"),
        (lambda name, pieces: [*pieces[:-1], pieces[-1] * 2], "more than|other"),
        (lambda name, pieces: pieces[:-1], "bytes early"),
        (lambda name, pieces: (b"\0" * 5000 for _ in iter(int, 1)), "more than|other"),
    ],
)  # fmt: skip
def test_wrong_bytes_are_refused_and_stay_in_the_folder(manifest, tmp_path, spoil, message):
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(EdgePartsError, match=message):
        parts.fetch(Source(manifest, spoil), manifest, tmp_path / "cache", progress=False)
    allowed = {part.name for part in manifest} | {f"{part.name}.partial" for part in manifest}
    assert {name.split("/")[-1] for name in everything(tmp_path)} <= allowed
    assert not list(outside.iterdir())


def test_links_in_the_cache_are_not_followed(manifest, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "edge" / edge_digest(manifest).hex()
    folder.mkdir(parents=True)
    (folder / "config.json.partial").symlink_to(victim)
    (folder / "tokenizer.json").symlink_to(victim)
    parts.fetch(Source(manifest), manifest, tmp_path, progress=False)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "a/b", "pytorch_model.bin", "modeling.py", "config.json\0", ""]
)
def test_names_are_from_a_list(manifest, name):
    with pytest.raises(EdgePartsError, match="unknown edge part"):
        check_manifest([*manifest, EdgePart(name, None, 10, b"0" * 32)])


# --- configuration ------------------------------------------------------------------------------------


def config_with(folder, manifest, **changes):
    source = next(part.path for part in manifest if part.name == "config.json")
    (folder / "config.json").write_text(json.dumps({**json.loads(source.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}},
        {"trust_remote_code": True},
        {"model_type": "mamba"},
        {"model_type": ["llama"]},
        {"vocab_size": 1 << 60},
        {"hidden_size": -4},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "many"},
        {"layer_types": ["full_attention"] * 10**5},
        {"rms_norm_eps": float("nan")},
        {"eos_token_id": list(range(1000))},
        {"tie_word_embeddings": "yes"},
        {"final_logit_softcapping": 1e300},
        {"num_attention_heads": 7, "num_key_value_heads": 3},
    ],
)
def test_hostile_configurations_are_refused(manifest, tmp_path, changes):
    with pytest.raises(EdgePartsError):
        part_settings.read_config(config_with(tmp_path, manifest, **changes))


def test_bombs_in_unneeded_keys_are_not_read(manifest, tmp_path):
    config, _ = part_settings.read_config(
        config_with(
            tmp_path, manifest, num_labels=10**12, _attn_implementation="org/kernel", rope_scaling={"a": 1}
        )
    )
    assert config.num_labels == 2


def test_shapes_are_compared_before_tensors_are_read(manifest, tmp_path):
    source = next(part.path for part in manifest if part.name == "edge.safetensors")
    _, sizes = part_settings.read_config(config_with(tmp_path, manifest))
    tensors = load_file(source)
    bad = {
        "missing": {k: v for k, v in tensors.items() if "norm" not in k},
        "unknown": {**tensors, "layers.0.weight": torch.zeros(2)},
        "wrong": {**tensors, "norm.weight": torch.zeros(3)},
        "integer": {**tensors, "norm.weight": torch.zeros(sizes.hidden_size, dtype=torch.int32)},
    }
    for content in bad.values():
        save_file(content, tmp_path / "edge.safetensors")
        with pytest.raises(EdgePartsError):
            part_tensors.read_tensors(tmp_path, sizes)
    header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    (tmp_path / "edge.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(EdgePartsError):
        part_tensors.read_tensors(tmp_path, sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(value):
    whole = families.build("llama")
    tensors = {"embed_tokens.weight": whole.model.embed_tokens.weight, "norm.weight": torch.ones(48)}
    tensors["norm.weight"][7] = value
    with pytest.raises(ValueError, match="norm.weight holds NaN or infinity"):
        build_shell(whole.config, tensors, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [
        (torch.float32, torch.float16, 65520.0),  # the least that float16 rounds to infinity
        (torch.bfloat16, torch.float16, -1e30),
        (torch.float32, torch.bfloat16, torch.finfo(torch.float32).max),
        (torch.float64, torch.float32, 1e39),
    ],
)
def test_weights_must_be_finite_in_what_this_side_computes_in(stored, dtype, value):
    whole = families.build("llama")
    embed = whole.model.embed_tokens.weight.detach().to(stored)
    tensors = {"embed_tokens.weight": embed, "norm.weight": torch.ones(48, dtype=stored)}
    build_shell(whole.config, tensors, "cpu", dtype)
    tensors["norm.weight"][7] = value
    build_shell(whole.config, tensors, "cpu", torch.float64)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(EdgePartsError, match=f"norm.weight holds numbers that {kind} cannot; choose another"):
        build_shell(whole.config, tensors, "cpu", dtype)


@pytest.mark.parametrize(
    "changes", [{"temperature": -1}, {"top_p": "x"}, {"eos_token_id": [-5]}, {"auto_map": {"a": 1}}]
)
def test_hostile_generation_configs_are_refused(manifest, tmp_path, changes):
    config, _ = part_settings.read_config(config_with(tmp_path, manifest))
    (tmp_path / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(EdgePartsError):
        part_settings.read_generation_config(tmp_path, config)


def test_unlisted_generation_settings_are_ignored(manifest, tmp_path):
    config, _ = part_settings.read_config(config_with(tmp_path, manifest))
    given = {
        "num_beams": 10**9,
        "custom_generate": "org/evil",
        "do_sample": True,
        "temperature": 0.6,
        "eos_token_id": [2, 3],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    found = part_settings.read_generation_config(tmp_path, config)
    assert found.temperature == 0.6 and found.eos_token_id == [2, 3] and found.num_beams != 10**9
    assert getattr(found, "custom_generate", None) is None


# --- tokenizer ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(tmp_path):
    families.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_class_named_by_a_file_is_never_loaded(tokenizer_folder):
    edit(tokenizer_folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    assert type(load_tokenizer(tokenizer_folder, families.VOCAB, 64)).__name__ == "EdgeTokenizer"
    edit(tokenizer_folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(TokenizerError, match="names code to run"):
        load_tokenizer(tokenizer_folder, families.VOCAB, 64)


def replacing(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10_000}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+" * 1000},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"added_tokens": [{"id": 9, "content": "x" * 100_000, "special": True}]},
        {"model": {"type": "BPE", "vocab": {"a" * 9999: 0}, "merges": []}},
        {"model": {"type": "Nonsense"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 20_000}},
        {"normalizer": {"type": "Prepend", "prepend": "b" * 10_000}},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "a" * 16)] * 8}},
        {"normalizer": {"type": "Sequence", "normalizers": [replacing({"Regex": ""}, "a")] * 30}},
        {"decoder": {"type": "Evil"}},
    ],
)  # fmt: skip
def test_hostile_tokenizers_are_refused(tokenizer_folder, changes):
    edit(tokenizer_folder / "tokenizer.json", **changes)
    with pytest.raises(TokenizerError):
        load_tokenizer(tokenizer_folder, families.VOCAB, 64)


def test_replacements_of_usual_tokenizers_are_accepted(tokenizer_folder):
    quotes = [replacing({"String": "``"}, '"'), replacing({"String": " "}, "\u2581")] * 20
    edit(tokenizer_folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": quotes})
    assert load_tokenizer(tokenizer_folder, families.VOCAB, 64)("a``b")["input_ids"]


def test_a_pattern_that_runs_away_is_a_clear_error(tokenizer_folder):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(tokenizer_folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load_tokenizer(tokenizer_folder, families.VOCAB, 64)
    with pytest.raises(TokenizerError, match="failed over the text"):
        tokenizer("a" * 40 + "!")


def test_what_is_no_text_is_a_clear_error(tokenizer_folder):
    with pytest.raises(TokenizerError, match="no text"):
        load_tokenizer(tokenizer_folder, families.VOCAB, 64)("caf\udce9")


def test_ids_beyond_the_embedding_are_refused(tokenizer_folder):
    with pytest.raises(TokenizerError, match="only 100 rows"):
        load_tokenizer(tokenizer_folder, 100, 64)


def test_a_huge_id_is_refused_before_the_tokenizer_is_built(tokenizer_folder, monkeypatch):
    """To copy one counts up to its highest id: half a minute at 2**31, found by fuzzing."""
    raw = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab[max(vocab, key=vocab.__getitem__)] = 2**31
    edit(tokenizer_folder / "tokenizer.json", model=raw["model"])
    monkeypatch.setattr("edge_client.tokenizer.EdgeTokenizer", lambda **_: pytest.fail("it was built"))
    with pytest.raises(TokenizerError, match="token id 2147483648"):
        load_tokenizer(tokenizer_folder, families.VOCAB, 64)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_hostile_template_is_refused_on_loading(tokenizer_folder, where):
    source = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    if where.endswith("jinja"):
        (tokenizer_folder / where).write_text(source)
    else:
        (tokenizer_folder / "chat_template.jinja").unlink(missing_ok=True)
        edit(tokenizer_folder / where, chat_template=source)
    with pytest.raises(TemplateError, match="too many steps"):
        load_tokenizer(tokenizer_folder, families.VOCAB, 64)


# --- offers and pins ----------------------------------------------------------------------------------


def response(manifest, name="test", layers=b"\2" * 32, **options):
    plan = families.plan_for(families.build("llama"), name=name, **options)
    print_ = Fingerprint(plan_digest(plan), b"\1" * 32, layers, edge_digest(manifest))
    return pb.DescribeResponse(
        protocol_version=PROTOCOL_VERSION,
        server_version="1",
        plans=[
            pb.PlanOffer(
                plan_json=plan.canonical_json(),
                fingerprint=pb.Fingerprint(root=print_.root, **print_.branches()),
            )
        ],
        edge_parts=[pb.EdgePart(name=p.name, size_bytes=p.size, sha256=p.sha256) for p in manifest],
        limits=pb.Limits(max_context_tokens=64, max_step_tokens=32, max_rows=4, max_steps_in_flight=2),
        compute_dtype=pb.DTYPE_FLOAT32,
    )


def spoiled(message, change):
    change(message)
    return message


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "protocol_version", 99),
        lambda m: setattr(m, "compute_dtype", 0),
        lambda m: m.ClearField("plans"),
        lambda m: m.plans.extend([m.plans[0]] * 3),
        lambda m: m.plans.extend([m.plans[0]] * 100),
        lambda m: setattr(m.limits, "max_rows", 0),
        lambda m: setattr(m.plans[0].fingerprint, "root", b"\0" * 32),
        lambda m: setattr(m.plans[0].fingerprint, "plan", b"short"),
        lambda m: setattr(m.plans[0], "plan_json", "[" * 100_000),
        lambda m: setattr(m.edge_parts[0], "sha256", b"\0" * 32),
        lambda m: setattr(m.edge_parts[0], "name", "../x"),
        lambda m: setattr(m.edge_parts[0], "size_bytes", 1 << 60),
    ],
)
def test_contradictory_offers_are_refused(manifest, change):
    with pytest.raises(OfferError):
        CloudOffer.check("cloud:1", spoiled(response(manifest), change))


def test_adapters_are_compared_by_part(manifest):
    offer = CloudOffer.check("cloud:1", response(manifest))
    plan, print_ = offer.plan(None)
    assert offer.adapter_for(None, None).plan == plan
    own = Adapter.zeros(plan, print_)
    assert offer.adapter_for(plan, own) is own
    with pytest.raises(OfferError, match="offers no plan 'x'; it offers: test"):
        offer.plan("x")
    with pytest.raises(AdapterError, match="backbone and edge parts differ"):
        offer.adapter_for(
            None, Adapter.zeros(plan, dataclasses.replace(print_, layers=b"x" * 32, edge=b"y" * 32))
        )
    other = families.plan_for(families.build("llama"), rank=4)
    with pytest.raises(AdapterError, match="does not offer"):
        offer.adapter_for(None, Adapter.zeros(other, print_))
    with pytest.raises(AdapterError, match="exactly one plan"):
        offer.adapter_for(other, own)


def test_a_plans_name_may_lack_its_rank_where_one_plan_is_meant(manifest):
    message = response(manifest, name="one-trip-r64")
    assert CloudOffer.check("cloud:1", message).plan("one-trip")[0].name == "one-trip-r64"
    for more in ("one-trip-shared-r64", "one-trip-r64-2", "one-trip-rest"):
        message.plans.extend(response(manifest, name=more).plans)
    offer = CloudOffer.check("cloud:1", message)
    assert offer.plan("one-trip")[0].name == "one-trip-r64"
    assert offer.plan("one-trip-shared")[0].name == "one-trip-shared-r64"
    for none in ("one", "one-trip-r", "one.trip", "-r64", ""):
        with pytest.raises(OfferError, match="offers no plan"):
            offer.plan(none)
    message.plans.extend(response(manifest, name="one-trip-r16").plans)
    with pytest.raises(OfferError, match="offers no plan 'one-trip'; it offers: .*one-trip-r16"):
        CloudOffer.check("cloud:1", message).plan("one-trip")
    message.plans.extend(response(manifest, name="one-trip").plans)
    assert CloudOffer.check("cloud:1", message).plan("one-trip")[0].name == "one-trip"


def test_first_use_pins_and_a_change_is_refused(manifest, tmp_path):
    def check(message, **options):
        offer = CloudOffer.check("cloud:1", message)
        return trust.check_known(offer, *offer.plan(None), config_dir=tmp_path, **options)

    assert check(response(manifest)) is True
    assert check(response(manifest)) is False
    assert check(response(manifest, name="second")) is False, "another plan of the same model"
    for changed, what in (
        (response(manifest, layers=b"\7" * 32), "the decoder layers"),
        (response(manifest, layers=b"\7" * 32, name="renamed"), "the decoder layers"),
        (response([p for p in manifest if p.name != "tokenizer_config.json"]), "embeddings"),
        (response(manifest, rank=4), "the plan or its A/B"),
    ):
        with pytest.raises(trust.TrustError, match=what):
            check(changed)
    with pytest.raises(trust.TrustError, match="not the one given"):
        check(response(manifest), expected="ab" * 32)
    new = response(manifest, layers=b"\7" * 32)
    assert check(new, expected=new.plans[0].fingerprint.root.hex().upper()) is False
    assert check(new) is False
    assert check(response(manifest), accept_new=True) is False
    assert check(response(manifest)) is False
    (tmp_path / "known_clouds.json").write_text("[]")
    with pytest.raises(trust.TrustError, match="damaged"):
        check(response(manifest))


def test_the_whole_file_is_hashed(manifest):
    for part in manifest:
        assert hashlib.sha256(part.path.read_bytes()).digest() == part.sha256
