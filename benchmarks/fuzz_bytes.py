"""Mutation of bytes, texts and JSON; see `benchmarks.fuzz_mutation` for messages."""

import json
import random
import struct
from typing import Any

FLOATS = (
    *(float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.0, -1.0, 65504.0, 65536.0),
    *(1e-45, 1e-38, 3.4e38, -3.4e38, 1e30),
)
MOST_ELEMENTS = 5000  # that a list is grown to


def put_float(rng: random.Random, data: bytearray, item: int) -> None:
    """Write a special float somewhere into ``data`` of elements of ``item`` bytes."""
    if len(data) < item:
        return
    value = rng.choice(FLOATS)
    at = rng.randrange(len(data) // item) * item
    if item == 8:
        raw = struct.pack("<d", value)
    elif item == 4:
        raw = struct.pack("<f", value)
    else:  # the upper half is a bfloat16, and some float16 or other
        raw = struct.pack("<f", value)[4 - item :]
    data[at : at + item] = raw


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Return ``raw`` damaged as bytes: flipped, cut, grown, repeated, or something else altogether."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32))
        match rng.randrange(9):
            case 0 | 1 | 2 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 3:
                del data[at:]
            case 4:
                data[at:at] = rng.randbytes(length)
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 16))
            case 7:
                data[at : at + length] = rng.choice((b"\xff", b"\0", b"\x80", b"\x7f")) * length
            case _:
                data = bytearray(rng.choice((b"", b"\0", rng.randbytes(length), bytes(data[::-1]))))
    return bytes(data)


def text_mutant(rng: random.Random, text: str) -> str:
    """Return ``text`` changed as text: JSON as JSON, where it is some."""
    if rng.random() < 0.7:
        try:
            return json.dumps(json_mutant(rng, json.loads(text)), separators=(",", ":"))
        except (ValueError, RecursionError):
            pass
    at = rng.randrange(len(text) + 1)
    strange = rng.choice(
        ("\0", "\n", "ä", "\U0001f600", "../", "/", "%s", "{", "}", '"', " ", "9" * 20, "[" * 200)
    )
    match rng.randrange(5):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + strange + text[at:]
        case 2:
            return text[:at] + text[at + 1 :]
        case 3:
            return text * rng.choice((0, 2, 50))
    return text[at:] + text[:at]


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        4096,
        1 << 31,
        1 << 53,
        1 << 63,
        -(1 << 63),
        10**30,
        0.0,
        0.5,
        -0.5,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "\0",
        "\ud800",
        "q",
        "per_layer",
        "x" * 300,
        [],
        [[]],
        {},
        {"a": 1},
    ),
    *([0] * 300, [[[[[[]]]]]], list(range(64))),
)


def json_mutant(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with something somewhere inside it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.92:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, text_mutant(rng, key)[:200] or "x": rng.choice(VALUES)}
            case _:
                return {**value, key: json_mutant(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return (value * rng.choice((2, 50)))[:MOST_ELEMENTS]
            case 2:
                return [*value, rng.choice(VALUES)]
            case _:
                return [*value[:at], json_mutant(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice(
            (value + 1, value - 1, value * 2, -value, 0, 1, 1 << 16, 1 << 40, float(value), str(value))
        )
    if isinstance(value, str) and rng.random() < 0.5:
        return text_mutant(rng, value)
    return rng.choice(VALUES)
