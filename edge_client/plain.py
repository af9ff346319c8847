"""Text of others made fit for a terminal, which obeys control characters."""

import unicodedata

MAX_LINE_CHARS = 2000


def printable(text: str) -> str:
    """Return text without control characters: a model's answer must not steer a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def one_line(text: str) -> str:
    """Return text without control characters on one line: a cloud's message must not look like several."""
    return printable(" ".join(text[:MAX_LINE_CHARS].split()))
