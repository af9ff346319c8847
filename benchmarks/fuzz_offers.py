"""What a cloud states and serves, mutated, against the edge: offers, templates, tokenizers, sizes.

Kept as files like those of `benchmarks.fuzz_files`, so that they are run and replayed in the same way.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from benchmarks.fuzz_bytes import damaged, text_mutant
from benchmarks.fuzz_files import Kind
from benchmarks.fuzz_makers import json_file, safetensors
from benchmarks.fuzz_mutation import Mutator, corpus_of
from edge_client import part_settings, part_tensors
from edge_client.offer import CloudOffer, OfferError
from edge_client.template import ChatTemplate, TemplateError
from edge_client.tokenizer import TokenizerError, load_tokenizer
from edge_client.trust import TrustError, check_known
from shared import edge_parts
from shared.edge_parts import EdgePart, EdgePartsError, digested_parts
from shared.fingerprint import Fingerprint, edge_digest, plan_digest
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan, PlanError

MANIFEST = (
    EdgePart("config.json", None, 700, bytes(32)),
    EdgePart("tokenizer.json", None, 5000, b"\1" * 32),
    EdgePart("edge.safetensors", None, 70_000, b"\2" * 32),
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello. <b>"},
]
TEMPLATES = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m.content | trim + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- set ns = namespace(last=-1, text='') %}"
    "{%- macro show(x, n=2) -%}{{ x | upper }}{{ n }}{%- endmacro %}"
    "{%- for m in messages if m.role in ['user', 'assistant'] -%}{%- set ns.last = loop.index0 %}"
    "{%- if m.content is string %}{{ show(m.content, loop.length) }}{% else %}{% continue %}{% endif %}"
    "{%- if loop.index > 3 %}{% break %}{% endif %}{%- endfor -%}{{ ns.last * 2 + 1 }}",
    "{% set d = {'a': [1, 2.5, 'x'], 'b': messages[0]} %}{{ d | tojson(indent=2) }}"
    "{{ messages[1:] | length }}{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'eq', 'user') | list }}"
    "{% for k, v in d.items() %}{{ k ~ ':' ~ v }}{% endfor %}{{ 'a,b'.split(',')[0].replace('a', 'bb') }}"
    "{{ range(3) | list }}"
    "{{ raise_exception('no') if messages | length > 9 else strftime_now('%Y') | length }}",
)
PIECES = (
    *(
        "{% break %}",
        "{% continue %}",
        "{{ messages }}",
        "{{ 9" + "9" * 5000 + " }}",
        "{{ '" + "a" * 3000 + "' }}",
    ),
    *(
        "{% for a in range(10000) %}",
        "{% endfor %}",
        "{{ range(10**9) }}",
        "{{ x.y.z }}",
        "{{ [" * 60,
        "{{ -" * 60,
    ),
    *(
        "{% macro r(x) %}{{ r(x) }}{% endmacro %}{{ r(1) }}",
        "{% set messages = messages + messages %}",
        "{{ 1 / 0 }}",
    ),
    *(
        "{{ 'a' * 99999999 }}",
        "{{ messages | tojson(indent=8) }}",
        "{{ (1,) < ('a',) }}",
        "{{ {[]: 1} }}",
        "{{ 1e999 }}",
    ),
    *(
        "{{ ''.join(messages) }}",
        "{{ 'x'.split('') }}",
        "{{ messages[1.5] }}",
        "{{ messages['a':] }}",
        "{{ namespace(1) }}",
    ),
    *(
        "{{ 'a' in 5 }}",
        "{{ none | length }}",
        "{{ 3 | items }}",
        "{{ 'x' | indent('y') }}",
        "{{ strftime_now(5) }}",
    ),
    *(
        "{{ messages | map('upper') | first }}",
        "{{ loop }}",
        "{{ 'a' | int('b') }}",
        "{{ x | join(attribute=5) }}",
    ),
    *(
        "{% generation %}a{% endgeneration %}",
        "{{ 7 // 0.0 }}",
        "{{ 2 % 0 }}",
        "{{ '%s' % 1 }}",
        "{{ namespace }}",
    ),
    *(
        "{{ range }}",
        "{{ 'ab'.find(1) }}",
        "{{ 'ab'.startswith(('a', 1)) }}",
        "{{ messages is eq messages }}",
    ),
)


def kinds(folder: Path, model: Path) -> dict[str, Kind]:
    """Return all kinds; as `benchmarks.fuzz_files.kinds`."""
    served = folder / "served"
    if not served.is_dir():
        served.mkdir(parents=True)
        for part in edge_parts.build(resolve(str(model), progress=False), folder / "cache"):
            assert part.path is not None
            shutil.copyfile(part.path, served / part.name)

    def as_part(name: str) -> Callable[[Path], object]:
        def read(path: Path) -> None:
            place = path.parent / "parts"
            if not place.is_dir():
                shutil.copytree(served, place)
            shutil.copyfile(path, place / name)
            try:
                config, sizes = part_settings.read_config(place)
                part_settings.read_generation_config(place, config)
                part_tensors.read_tensors(place, sizes)
                if name.startswith("token"):
                    tokenizer = load_tokenizer(place, sizes.vocab_size, 256)
                    tokenizer.decode(tokenizer("Hello wörld", add_special_tokens=False)["input_ids"][:50])
            finally:
                shutil.copyfile(served / name, place / name)

        return read

    errors = (EdgePartsError, TokenizerError, TemplateError)
    raw = {path.name: path.read_bytes() for path in served.iterdir()}
    pins = json.dumps({"c:1": {"edge": "00", "layers": "11", "plans": {"tiny": "22"}}}).encode()
    return {
        "describe": Kind(_offers(), _read_offer, (OfferError, DecodeError)),
        "template": Kind(_templates, _read_template, (TemplateError,)),
        "pins": Kind(json_file(pins), _read_pins, (TrustError,)),
        "part-config": Kind(json_file(raw["config.json"]), as_part("config.json"), errors),
        "part-generation": Kind(
            json_file(raw["generation_config.json"]), as_part("generation_config.json"), errors
        ),
        "part-tensors": Kind(safetensors(raw["edge.safetensors"]), as_part("edge.safetensors"), errors),
        "part-tokenizer": Kind(json_file(raw["tokenizer.json"]), as_part("tokenizer.json"), errors),
        "part-settings": Kind(
            json_file(raw["tokenizer_config.json"]), as_part("tokenizer_config.json"), errors
        ),
    }


def offer_of(offered: Sequence[Plan]) -> pb.DescribeResponse:
    """Return what a cloud with these plans states."""
    response = pb.DescribeResponse(
        protocol_version=1, server_version="1.2.3", compute_dtype=pb.DTYPE_FLOAT32, kv_bytes_total=1 << 20
    )
    response.limits.CopyFrom(
        pb.Limits(max_context_tokens=256, max_step_tokens=64, max_rows=8, max_steps_in_flight=3)
    )
    for part in MANIFEST:
        response.edge_parts.add(name=part.name, size_bytes=part.size, sha256=part.sha256)
    for plan in offered:
        response.plans.add(plan_json=plan.canonical_json())
    _seal(response)
    return response


def _seal(response: pb.DescribeResponse) -> None:
    """Make the fingerprints of an offer right, so that what is wrong elsewhere is looked at."""
    manifest = [EdgePart(p.name, None, p.size_bytes, p.sha256) for p in response.edge_parts]
    for offer in response.plans:
        try:
            plan = Plan.parse(offer.plan_json)
            edge = edge_digest(digested_parts(plan, manifest))
        except (PlanError, EdgePartsError, ValueError):
            continue
        found = Fingerprint(plan=plan_digest(plan), lowrank=bytes(32), layers=bytes(32), edge=edge)
        offer.fingerprint.CopyFrom(pb.Fingerprint(root=found.root, **found.branches()))


def plans() -> list[Plan]:
    """Return small plans, one that adapts every layer and one that does not."""
    facts = {"backbone": "b", "num_layers": 4, "hidden_size": 16, "rank": 2}
    return [Plan.subset(name="one", **facts), Plan.subset((0, 2), name="two", **facts)]  # type: ignore[arg-type]


def _offers() -> Callable[[random.Random], bytes]:
    honest = offer_of(plans())
    corpus = corpus_of([honest])

    def make(rng: random.Random) -> bytes:
        raw = Mutator(rng, corpus)(honest)
        if rng.random() < 0.1:  # as large as a plan may be
            plan = json.loads(honest.plans[0].plan_json)
            layers = list(range(rng.choice((4096, 2000))))
            plan |= {
                "num_layers": 4096,
                "exchange_layers": layers,
                "adapted_layers": layers,
                "schedule": "grouped",
            }
            large = pb.DescribeResponse()
            large.CopyFrom(honest)
            large.plans[0].plan_json = json.dumps(plan, separators=(",", ":"))
            raw = large.SerializeToString()
        if rng.random() < 0.5:
            try:
                response = pb.DescribeResponse.FromString(raw)
            except DecodeError:
                return raw
            _seal(response)
            raw = response.SerializeToString()
        return raw

    return make


def _read_offer(path: Path) -> None:
    offer = CloudOffer.check("c:1", pb.DescribeResponse.FromString(path.read_bytes()))
    plan, _ = offer.plan(None)
    assert plan.name in offer.plans


def _templates(rng: random.Random) -> bytes:
    source = rng.choice(TEMPLATES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(source) + 1)
        match rng.randrange(5):
            case 0 | 1:
                source = source[:at] + rng.choice(PIECES) + source[at:]
            case 2:
                other = rng.choice(TEMPLATES)
                start = rng.randrange(len(other))
                source = source[:at] + other[start : start + rng.randrange(60)] + source[at:]
            case 3:
                source = text_mutant(rng, source)
            case _:
                source = source[:at] + source[at + rng.randrange(20) :]
    raw = source.encode("utf-8", "replace")
    return raw if rng.random() < 0.9 else damaged(rng, raw)


def _read_template(path: Path) -> None:
    template = ChatTemplate(path.read_text("utf-8", "replace"))
    text = template.render(CHAT, add_generation_prompt=True, bos_token="<s>", tools=None)
    assert isinstance(text, str)


def _read_pins(path: Path) -> None:
    place = path.parent / "settings"
    place.mkdir(exist_ok=True)
    shutil.copyfile(path, place / "known_clouds.json")
    offer = CloudOffer.check("c:1", offer_of(plans()))
    check_known(offer, *offer.plan(None), config_dir=place)
