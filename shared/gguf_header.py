"""The header of a GGUF file, walked through before a parser that trusts it is let at it.

The gguf package follows the lengths that a file states without looking where the file ends: an array that
claims 2**60 numbers keeps it busy, and growing, until the machine has no memory left; and transformers
builds whatever sizes the file claims. Here every length is compared with what is left of the file, and every
size with the tensors that are there. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

MAX_ENTRIES = 1 << 20  # of key/value pairs or tensors that a header may announce
MAX_DEPTH = 3  # of arrays inside arrays; none in use has any
MAX_DIMS = 4  # what GGML has
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Sizes that a model is built from; none is larger than the longest side of its tensors.
SIZES = (
    *("embedding_length", "feed_forward_length", "vocab_size", "rope.dimension_count"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
)
LAYERS, MAX_LAYERS = "block_count", 4096


class GgufError(ValueError):
    """A file that is not a well-formed GGUF file."""


def check(path: Path) -> None:
    """Refuse a file whose header contradicts the file.

    Raises
    ------
    GgufError
        Saying what is wrong, without the path.
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(24)
        if len(head) < 24 or head[:4] != b"GGUF":
            raise GgufError("it does not begin like a GGUF file")
        version, tensors, pairs = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported (2 or 3, little-endian)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            # A tensor entry takes at least 24 bytes, a key/value pair at least 13.
            if max(tensors, pairs) > MAX_ENTRIES or 24 + 24 * tensors + 13 * pairs > len(raw):
                raise GgufError(f"its header announces {tensors} tensors in {len(raw)} bytes (truncated?)")
            _check_sizes(*_Walk(raw, 24).header(pairs, tensors), tensors)


class _Walk:
    """A place in the file that only moves on, and never beyond its end."""

    def __init__(self, raw: mmap.mmap, at: int) -> None:
        self.raw, self.at = raw, at

    def header(self, pairs: int, tensors: int) -> tuple[dict[str, Any], int]:
        """Walk through everything; return the single numbers by key, and the longest side of a tensor."""
        numbers: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.text()
            value = self.value(self.number("I"))
            if value is not None:
                numbers[key] = value
        longest = 0
        for _ in range(tensors):
            self.text()
            dimensions = self.number("I")
            if dimensions > MAX_DIMS:
                raise GgufError(f"a tensor has {dimensions} dimensions, at most {MAX_DIMS} accepted")
            longest = max(longest, *(self.number("Q") for _ in range(dimensions)), 0)
            self.number("I")
            if self.number("Q") > len(self.raw):
                raise GgufError("a tensor lies beyond its end (truncated?)")
        if longest > len(self.raw) * 8:
            raise GgufError("a tensor is larger than the file")
        return numbers, longest

    def take(self, count: int) -> int:
        """Move on by ``count`` bytes; return where they begin."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.raw):
            raise GgufError("its header ends beyond the file (truncated?)")
        return start

    def number(self, kind: str) -> Any:
        """Return the next number."""
        layout = struct.Struct("<" + kind)
        return layout.unpack_from(self.raw, self.take(layout.size))[0]

    def text(self) -> str:
        """Return the next text, as far as it is for looking at."""
        length = self.number("Q")
        start = self.take(length)
        return self.raw[start : start + min(length, 256)].decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Walk over a value; return it if it is a number."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            self.take(self.number("Q"))
        elif kind == ARRAY and depth < MAX_DEPTH:
            kind, count = self.number("I"), self.number("Q")
            if kind in SCALARS:
                self.take(count * struct.calcsize(SCALARS[kind]))
            else:
                for _ in range(count):  # each takes bytes, so the end of the file is the end of this
                    self.value(kind, depth + 1)
        else:
            raise GgufError(f"it holds a value of type {kind}, which is none")
        return None


def _check_sizes(numbers: dict[str, Any], longest: int, tensors: int) -> None:
    """Refuse sizes that a model would be built with and that no tensor has."""
    for key, value in numbers.items():
        _, _, name = key.partition(".")
        if name in SIZES and not (isinstance(value, int) and 0 <= value <= longest):
            raise GgufError(f"{key[:80]} is {value}; its tensors have at most {longest} rows or columns")
        if name == LAYERS and not (isinstance(value, int) and 0 < value <= min(tensors, MAX_LAYERS)):
            raise GgufError(f"{key[:80]} is {value}; there are {tensors} tensors")
