"""A data file as typed rows: chats, prompts with completions, or paragraphs of plain text.

Every bad row is found before anything else happens, and told by its line number and what is wrong
with it. No message ever holds any of the file's text: it may end up in a log, and the text is private.
Knows nothing about tokens, templates or tuning.
"""

import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
MAX_FILE_BYTES = 256 * 1024**2  # weeks of tuning; the file is held in memory
MAX_ROW_CHARS = 8 * 1024**2  # more than the longest novels: a row of this size is a mistake
MAX_MESSAGES = 256  # of one chat; each is rendered together with all before it
SHOWN_ROWS = 20

# A key of a data file may be anybody's text, so an unknown one is only named if it is one of these.
USUAL_KEYS = {
    "answer", "chosen", "context", "conversation", "conversations", "from", "id", "input", "instruction",
    "label", "labels", "metadata", "name", "output", "question", "rejected", "response", "source", "system",
    "text", "title", "tool_calls", "tools", "type", "user", "value", "weight",
    "messages", "role", "content", "prompt", "completion",
}  # fmt: skip
CAUSES = {
    "extra_forbidden": "is an unknown key",
    "list_type": "must be a list",
    "literal_error": "must be system, user or assistant",
    "missing": "is missing",
    "model_type": "must be an object",
    "string_type": "must be text",
    "too_long": f"has more than {MAX_MESSAGES:,} messages",
    "tuple_type": "must be a list",
}


class DataError(ValueError):
    """A data file that cannot be used."""


class RowError(ValueError):
    """What is wrong with one row, without its text."""


@dataclass(frozen=True)
class BadRow:
    """One bad row: its line (1 is the first) and the reason."""

    line: int
    reason: str


class BadRowsError(DataError):
    """Rows that cannot be used.

    Parameters
    ----------
    source
        The file's name.
    bad
        All bad rows.
    total
        Rows in the file (count), good and bad.
    """

    def __init__(self, source: str, bad: Sequence[BadRow], total: int) -> None:
        self.bad = tuple(bad)
        lines = [f"  line {row.line}: {row.reason}" for row in self.bad[:SHOWN_ROWS]]
        if len(self.bad) > SHOWN_ROWS:
            lines.append(f"  and {len(self.bad) - SHOWN_ROWS:,} more")
        head = f"{source}: {len(self.bad):,} of {total:,} rows cannot be used; nothing was trained"
        super().__init__("\n".join([head, *lines]))


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"] = Field(description="Who speaks")
    content: str = Field(repr=False, description="What is said (text)")

    @field_validator("content")
    @classmethod
    def _is_said(cls, content: str) -> str:
        return _filled(content)


class Chat(_Strict):
    """A conversation: perhaps a system message, then user and assistant in turn, the assistant last."""

    messages: tuple[Message, ...] = Field(strict=False, max_length=MAX_MESSAGES, description="In order")

    @model_validator(mode="after")
    def _is_a_conversation(self) -> "Chat":
        roles = [message.role for message in self.messages]
        start = 1 if roles[:1] == ["system"] else 0
        for index, role in enumerate(roles[start:]):
            expected = ("user", "assistant")[index % 2]
            if role != expected:
                raise ValueError(f"messages[{start + index}] is the {role}'s, expected the {expected}'s")
        if roles[-1:] != ["assistant"]:
            raise ValueError("the last message must be the assistant's: there is no answer to learn")
        return self


class Completion(_Strict):
    """A prompt and how it goes on. The two are joined as they are, with nothing between them."""

    prompt: str = Field(repr=False, description="What is given (text); may be empty")
    completion: str = Field(repr=False, description="What is to be learned (text)")

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        return _encodable(prompt)

    @field_validator("completion")
    @classmethod
    def _is_written(cls, completion: str) -> str:
        return _filled(completion)


class Text(_Strict):
    """A paragraph of plain text."""

    text: str = Field(repr=False, description="All of it is to be learned (text)")


@dataclass(frozen=True)
class Row:
    """What stands at one line of the file; of a paragraph, its first line."""

    line: int
    body: Chat | Completion | Text = field(repr=False)


def read_rows(path: Path | str) -> list[Row]:
    """Read a data file.

    ``.jsonl``, ``.json`` and ``.ndjson`` hold one JSON object a line: ``{"messages": [...]}`` or
    ``{"prompt": ..., "completion": ...}``. Any other file is plain text; blank lines part its paragraphs.

    Raises
    ------
    BadRowsError
        If any row is bad; it lists all of them.
    DataError
        If the file is missing, empty, too large or no UTF-8 text.
    """
    path = Path(path)
    text = _decoded(path, _content(path))
    bad: list[BadRow] = []
    rows: list[Row] = []
    is_json = path.suffix.lower() in JSON_ENDINGS
    if is_json:
        start = text.lstrip()
        if start.startswith("[") or start.split("\n", 1)[0].rstrip() == "{":
            raise DataError(f"{path} spreads its rows over several lines, or is one list; write one JSON "
                            "object a line (JSONL)")  # fmt: skip
    for line, piece in _json_lines(text) if is_json else _paragraphs(text):
        row = _row(piece, is_json)
        if isinstance(row, str):
            bad.append(BadRow(line, row))
        else:
            rows.append(Row(line, row))
    if bad:
        raise BadRowsError(str(path), bad, len(bad) + len(rows))
    if not rows:
        raise DataError(f"{path} is empty: it holds no rows")
    return rows


def _content(path: Path) -> bytes:
    problem = ""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            problem = f"{path} is a folder; give one file"
        elif not stat.S_ISREG(status.st_mode):
            problem = f"{path} is not a regular file"  # one that can be read again when tuning resumes
        elif status.st_size > MAX_FILE_BYTES:
            problem = f"{path} has {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} accepted; split it"
        else:
            return path.read_bytes()
    except FileNotFoundError:
        problem = f"no data file at {path}"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        problem = f"cannot read {path}: {getattr(error, 'strerror', None) or 'not a file name'}"
    raise DataError(problem)


def _decoded(path: Path, content: bytes) -> str:
    """Return the text, without a byte order mark. The decoder's error holds the whole text: not chained."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, not UTF-8 (its byte 1 says so); save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)  # it counts from after the mark
    else:
        at = content.find(0)
        if at < 0:
            return text
    what = "is zero: this is no text" if content[at] == 0 else "is not UTF-8; save the file as UTF-8"
    raise DataError(f"{path}: byte {at + 1:,} (line {content.count(10, 0, at) + 1:,}) {what}")


def _json_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank. Only a line feed ends a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip(" \t\r"):
            yield number, line


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield first line and text of each run of lines that are not blank."""
    start, lines = 0, list[str]()
    for number, line in enumerate([*text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), ""], 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []


def _row(piece: str, is_json: bool) -> Chat | Completion | Text | str:
    """Return a row, or what is wrong with it."""
    if len(piece) > MAX_ROW_CHARS:
        return f"has {len(piece):,} characters, at most {MAX_ROW_CHARS:,} accepted"
    if not is_json:
        return Text(text=piece)
    try:
        raw = json.loads(piece, object_pairs_hook=_unique_keys)
    except RowError as error:
        return str(error)
    except json.JSONDecodeError as error:
        return f"not valid JSON at column {error.colno:,}"  # the decoder's own words may quote the text
    except ValueError:
        return "not valid JSON: a number is too long"
    except RecursionError:
        return "not valid JSON: nested too deeply"
    if not isinstance(raw, dict):
        return "must be a JSON object"
    if not raw.keys() & {"messages", "prompt", "completion"}:
        usual = sorted(raw.keys() & USUAL_KEYS)
        return 'has neither "messages" nor "prompt" and "completion"' + (
            f" (but {', '.join(map(repr, usual))})" if usual else ""
        )
    try:
        return (Chat if "messages" in raw else Completion).model_validate(raw)
    except ValidationError as error:
        return _cause(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise RowError("has one key twice in one object")
    return made


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is no character") from None
    return text


def _cause(error: ValidationError) -> str:
    """Return what is wrong first, without any text of the row."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = problems[0]
    path = list(first["loc"])
    if first["type"] == "extra_forbidden" and path[-1] not in USUAL_KEYS:
        path[-1] = "(a key not shown)"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    cause = CAUSES.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    return f"{where} {cause}".strip() + more
