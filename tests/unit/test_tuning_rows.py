"""Data files for tuning: what is read, and how bad rows are told without quoting them."""

import json
import os

import pytest

from edge_client.tuning import rows
from edge_client.tuning.rows import BadRowsError, Chat, Completion, DataError, Text, read_rows

SECRET = "Xylophon7"  # in every bad row below; must never come back
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.fixture
def write(tmp_path):
    def written(content, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def lines(*documents):
    return "\n".join(d if isinstance(d, str) else json.dumps(d, ensure_ascii=False) for d in documents) + "\n"


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# --- what is read -------------------------------------------------------------------------------------


def test_chats_and_completions_with_their_lines(write):
    found = read_rows(write(lines(CHAT, "", {"prompt": "", "completion": " yes"}, "  ", CHAT)))
    assert [row.line for row in found] == [1, 3, 5]
    assert isinstance(found[0].body, Chat) and found[0].body.messages[1].content == "Ho"
    assert found[1].body == Completion(prompt="", completion=" yes")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "DATA.NDJSON"])
def test_byte_order_mark_and_windows_line_ends(write, name):
    content = b"\xef\xbb\xbf" + lines(CHAT, {"prompt": "a", "completion": "b"}).replace("\n", "\r\n").encode()
    assert [row.line for row in read_rows(write(content, name))] == [1, 2]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x7f"])
def test_only_a_line_feed_ends_a_line(write, separator):
    row = {"prompt": f"a{separator}b", "completion": f"c{separator}d"}
    (found,) = read_rows(write(lines(row)))
    assert found.body == Completion(**row)
    (found,) = read_rows(write(f"a{separator}b", "data.txt"))
    assert found.body == Text(text=f"a{separator}b")


def test_paragraphs_of_plain_text(write):
    text = "\n\none\r\ntwo  \n \t\n\u00a0\nthree\rfour\n\n\n five"
    found = read_rows(write(text, "notes.md"))
    assert [(row.line, row.body.text) for row in found] == [
        (3, "one\ntwo  "),
        (7, "three\nfour"),
        (11, " five"),
    ]


def test_escapes_and_all_of_unicode(write):
    row = {
        "prompt": "\x00\t\U0001f642 é",
        "completion": "\ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16"),
    }
    (found,) = read_rows(write(json.dumps(row)))
    assert found.body == Completion(**row)


# --- bad files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \r\n\t\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b'"a"\n"b\xff"\n', r"byte 7 \(line 2\) is not UTF-8"),
        (b"\xef\xbb\xbf\n\xff", r"byte 5 \(line 2\) is not UTF-8"),
        (b'"a\xc3', r"byte 3 \(line 1\) is not UTF-8"),
        (b"a\x00b\x00", r"byte 2 \(line 1\) is zero"),
        ("a".encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_file_that_is_no_text_says_where(write, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(content, name))
    assert caught.value.__context__ is None  # a decoder's error would carry the whole text


def test_missing_files_folders_and_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "absent.jsonl", "no data file at"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        ("a\0b", "not a file name"),
    ]:
        with pytest.raises(DataError, match=message):
            read_rows(path)


def test_too_large_a_file_is_not_read(write, monkeypatch):
    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match="has 11 bytes, at most 10"):
        read_rows(write("x" * 11, "data.txt"))


@pytest.mark.parametrize(
    "text", [json.dumps([CHAT]), json.dumps([CHAT], indent=1), json.dumps(CHAT, indent=1)]
)
def test_json_that_is_not_one_object_a_line(write, text):
    with pytest.raises(DataError, match="one JSON object a line"):
        read_rows(write(text, "data.json"))


# --- bad rows -----------------------------------------------------------------------------------------

BAD = {
    "no json": (f'{{"prompt": "{SECRET}', "not valid JSON at column 12"),
    "bad escape": (f'{{"prompt": "\\{SECRET}"}}', "not valid JSON at column"),
    "control character": (f'{{"prompt": "{SECRET}\x01"}}', "not valid JSON at column"),
    "deep": (f'{{"messages": {"[" * 200_000}"{SECRET}"', "not valid JSON: nested too deeply"),
    "long number": (f'{{"prompt": {"9" * 9000}, "completion": "{SECRET}"}}', "a number is too long"),
    "one key twice": (f'{{"prompt": "a", "prompt": "{SECRET}", "completion": "b"}}', "one key twice"),
    "one inner key twice": (
        f'{{"messages": [{{"role": "user", "content": "{SECRET}", "content": "b"}}]}}',
        "one key twice",
    ),
    "text": (json.dumps(SECRET), "must be a JSON object"),
    "list": (f' ["{SECRET}"]', "must be a JSON object"),
    "neither": ({SECRET: 1}, 'has neither "messages" nor "prompt" and "completion"'),
    "other format": ({"instruction": SECRET, "output": SECRET}, "(but 'instruction', 'output')"),
    "both": ({**CHAT, "prompt": SECRET}, "prompt is an unknown key"),
    "unknown key": ({**CHAT, SECRET: SECRET}, "(a key not shown) is an unknown key"),
    "usual key": ({**CHAT, "tools": [SECRET]}, "tools is an unknown key"),
    "unknown inner key": (
        {"messages": [{"role": "user", "content": "a", SECRET: 1}]},
        "messages[0].(a key not shown) is an unknown key",
    ),
    "no completion": ({"prompt": SECRET}, "completion is missing"),
    "no prompt": ({"completion": SECRET}, "prompt is missing"),
    "empty completion": ({"prompt": SECRET, "completion": ""}, "completion is empty"),
    "blank completion": ({"prompt": SECRET, "completion": " \n\u2028"}, "completion is empty"),
    "number": ({"prompt": SECRET, "completion": 5}, "completion must be text"),
    "null": (chat(("user", SECRET), ("assistant", None)), "messages[1].content must be text"),
    "surrogate": (f'{{"prompt": "\\ud800", "completion": "{SECRET}"}}', "prompt holds half a surrogate pair"),
    "surrogate in a chat": (
        f'{{"messages": [{{"role": "user", "content": "{SECRET}\\udfff"}}]}}',
        "messages[0].content holds half",
    ),
    "no list": ({"messages": SECRET}, "messages must be a list"),
    "no objects": ({"messages": [SECRET]}, "messages[0] must be an object"),
    "no messages": ({"messages": []}, "the last message must be the assistant's"),
    "many messages": (chat(*[("user", SECRET)] * 300), "messages has more than 256 messages"),
    "role": (chat(("tool", SECRET), ("assistant", "a")), "role must be system, user or assistant"),
    "role of nothing": (chat((SECRET, "a"), ("assistant", "a")), "messages[0].role must be"),
    "empty answer": (chat(("user", SECRET), ("assistant", " ")), "messages[1].content is empty"),
    "begins with the answer": (chat(("assistant", SECRET)), "messages[0] is the assistant's, expected the"),
    "two questions": (
        chat(("system", "s"), ("user", SECRET), ("user", "b"), ("assistant", "c")),
        "messages[2] is the user's, expected the assistant's",
    ),
    "late system": (
        chat(("user", SECRET), ("system", "b"), ("assistant", "c")),
        "messages[1] is the system's, expected the assistant's",
    ),
    "no answer": (chat(("user", "a"), ("assistant", "b"), ("user", SECRET)), "the last message must be"),
    "only system": (chat(("system", SECRET)), "the last message must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_row_is_told_by_line_and_reason(write, name):
    document, reason = BAD[name]
    with pytest.raises(BadRowsError) as caught:
        read_rows(write(lines(CHAT, "", document, CHAT)))
    (bad,) = caught.value.bad
    assert bad.line == 3 and reason in bad.reason
    assert f"line 3: {bad.reason}" in str(caught.value) and "1 of 3 rows" in str(caught.value)
    assert len(bad.reason) < 200


def test_all_bad_rows_are_found_and_twenty_are_listed(write):
    bad = [document for document, _ in BAD.values()]
    with pytest.raises(BadRowsError) as caught:
        read_rows(write(lines(*bad, CHAT)))
    text = str(caught.value)
    assert [row.line for row in caught.value.bad] == list(range(1, len(bad) + 1))
    assert f"{len(bad)} of {len(bad) + 1} rows" in text and f"and {len(bad) - 20} more" in text
    assert text.count("\n") == 21


def test_no_error_and_no_repr_holds_the_text(write):
    for document, _ in BAD.values():
        with pytest.raises(BadRowsError) as caught:
            read_rows(write(lines(CHAT, document)))
        error = caught.value
        while error is not None:
            assert SECRET not in f"{error}{error!r}{error.args}" and SECRET[1:] not in str(error)
            error = error.__context__
    good = read_rows(write(lines(chat(("user", SECRET), ("assistant", SECRET)))))
    good += read_rows(write(lines({"prompt": SECRET, "completion": SECRET})))
    good += read_rows(write(SECRET, "a.txt"))
    for row in good:
        assert SECRET not in f"{row!r}{row.body!r}{row}"


def test_a_huge_line_is_refused_by_its_length(write):
    long = json.dumps({"prompt": SECRET * 1_000_000, "completion": "a"})
    with pytest.raises(
        BadRowsError, match=r"line 2: has 9,0\d\d,\d\d\d characters, at most 8,388,608"
    ) as caught:
        read_rows(write(lines(CHAT, long)))
    assert len(str(caught.value)) < 500
    with pytest.raises(BadRowsError, match="line 3: has 9,000,000 characters"):
        read_rows(write("a\n\n" + SECRET * 1_000_000, "data.txt"))
