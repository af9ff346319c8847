"""Makes mutants of files out of right ones: each function returns a maker for files of one format.

A maker changes what is in the format (JSON inside a safetensors header, lines of TOML, DER inside PEM, the
fields of a GGUF header), and damages a smaller share as bytes. Digests are made to fit in a share of the
cases, or nothing behind them would ever be reached.
"""

import base64
import json
import random
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

from benchmarks.fuzz_bytes import damaged, json_mutant, text_mutant
from shared.fingerprint import Fingerprint, plan_digest
from shared.plan import Plan

Make: TypeAlias = Callable[[random.Random], bytes]


def safetensors(raw: bytes, inner: str = "") -> Make:
    """Return mutants of a safetensors file: of its header, and of the JSON under its key ``inner``."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.25:
            return damaged(rng, raw)
        mutant: Any = dict(header)
        if inner and rng.random() < 0.6:
            facts = json_mutant(rng, json.loads(header["__metadata__"][inner]))
            if rng.random() < 0.5:
                facts = with_right_digests(facts)
            mutant["__metadata__"] = {inner: json.dumps(facts)}
        else:
            mutant = json_mutant(rng, mutant)
        text = json.dumps(mutant).encode()
        tail = data if rng.random() < 0.8 else damaged(rng, data)
        return struct.pack("<Q", len(text) if rng.random() < 0.95 else rng.getrandbits(64)) + text + tail

    return make


def with_right_digests(facts: Any) -> Any:
    """Let an adapter's fingerprint be that of the plan it holds, if it holds one."""
    try:
        plan = Plan.model_validate(facts["plan"])
        branches = {name: bytes.fromhex(text) for name, text in facts["fingerprint"].items()}
        fingerprint = Fingerprint(**{**branches, "plan": plan_digest(plan)})
        return {**facts, "fingerprint": fingerprint.to_hex(), "root": fingerprint.root.hex()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return facts


def toml(settings: dict[str, Any]) -> Make:
    """Return mutants of a TOML file with these settings, tables last."""
    values = [
        "0",
        "-1",
        "1",
        "4096",
        "1e400",
        "nan",
        "inf",
        "-inf",
        '"x"',
        "true",
        "[]",
        "{}",
        "9" * 30,
        "9" * 5000,
    ]
    values += [
        '""',
        "2**3",
        "[[1]]",
        "1979-05-27",
        "'''a'''",
        '"\\u0000"',
        "0.5",
        "1e10",
        "[" * 3000,
        str(1 << 40),
    ]

    def lines(rng: random.Random, table: dict[str, Any]) -> list[str]:
        made, inner = [], []
        for key, value in table.items():
            if isinstance(value, dict):
                inner += [f"[{key}]", *lines(rng, value)]
            elif rng.random() < 0.9:
                shown = rng.choice(values) if rng.random() < 0.15 else json.dumps(value)
                made.append(f"{key if rng.random() < 0.98 else text_mutant(rng, key)} = {shown}")
        return made + inner

    def make(rng: random.Random) -> bytes:
        chosen = rng.sample(list(settings.items()), rng.randint(1, min(6, len(settings))))
        chosen.sort(key=lambda item: isinstance(item[1], dict))
        raw = "\n".join(lines(rng, dict(chosen))).encode("utf-8", "surrogatepass")
        return raw if rng.random() < 0.7 else damaged(rng, raw)

    return make


def json_file(raw: bytes) -> Make:
    """Return mutants of a JSON file."""

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return damaged(rng, raw)
        return json.dumps(json_mutant(rng, json.loads(raw))).encode()

    return make


def pem(raw: bytes) -> Make:
    """Return mutants of a PEM file: of what is inside its armour, mostly."""
    begin, *body, end = raw.strip().splitlines()
    inside = base64.b64decode(b"".join(body))

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return damaged(rng, raw)
        mutant = base64.encodebytes(damaged(rng, inside))
        return begin + b"\n" + mutant + end + b"\n"

    return make


def gguf(raw: bytes) -> Make:
    """Return mutants of a GGUF file: the numbers of its header to extremes, mostly."""

    def make(rng: random.Random) -> bytes:
        data = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(min(len(data), 3000))
            match rng.randrange(4):
                case 0:
                    data[at] = rng.choice((0, 1, 8, 9, 255, rng.randrange(256)))
                case 1:
                    data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 31, 1 << 60, (1 << 64) - 1)))
                case 2:
                    data[at : at + 4] = struct.pack(
                        "<I", rng.choice((0, 7, 9, 10, 77, 1 << 20, (1 << 32) - 1))
                    )
                case _:
                    data = bytearray(damaged(rng, bytes(data)))
                    data = data or bytearray(b"G")
        return bytes(data)

    return make
