"""Lookups must find what a search of every place finds, and never leave a text or pass its end."""

from collections import Counter

import numpy as np
import pytest

from edge_client import datastore
from edge_client.datastore import Datastore, DatastoreError, History
from edge_client.lookup import LONGEST_MATCH, SEPARATOR, in_session, vote
from tests.families import tokenizer


def tokens_of(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def agreement(text: list[int], end: int, context: list[int]) -> int:
    """Tokens up to and including ``end`` that are the context's last ones."""
    length = 0
    while length < min(end + 1, len(context), LONGEST_MATCH) and (
        text[end - length] == context[-1 - length] != SEPARATOR
    ):
        length += 1
    return length


def searched(text: list[int], context: list[int], shortest: int) -> tuple[int, list[int]]:
    """Find the longest agreement at any place that something follows, looking at each place."""
    lengths = {
        end: agreement(text, end, context) for end in range(len(text) - 1) if text[end + 1] != SEPARATOR
    }
    longest = max(lengths.values(), default=0)
    return longest, [end for end, length in lengths.items() if length == longest >= shortest]


def voted(text: list[int], ends: list[int], limit: int) -> list[int]:
    found = []
    while len(found) < limit:
        following = [(text[end + 1], end) for end in ends if end + 1 < len(text) and text[end + 1] >= 0]
        if not following:
            break
        counts = Counter(token for token, _ in following)
        latest = {token: end for token, end in following}
        best = max(counts, key=lambda token: (counts[token], latest[token]))
        found.append(best)
        ends = [end + 1 for token, end in following if token == best]
    return found


@pytest.mark.parametrize("vocabulary", [2, 4, 30])
def test_in_session_finds_what_follows_the_longest_match(vocabulary):
    rng = np.random.default_rng(vocabulary)
    found = 0
    for length in (1, 2, 3, 10, 40, 200):
        for _ in range(20):
            text = rng.integers(0, vocabulary, length).tolist()
            match = in_session(tokens_of(text), 6)
            longest, ends = searched(text, text, 1)
            if not longest:
                assert match is None
                continue
            once = voted(text, ends, 6)
            loop = (once * 6)[:6]  # where the text ends, a copy reads what it has just written
            assert (match.length, match.tokens.tolist()) == (longest, loop)
            found += 1
    assert found > 30


def test_a_loop_is_continued():
    assert in_session(tokens_of([9, 1, 2, 3, 1, 2, 3, 1]), 7).tokens.tolist() == [2, 3, 1, 2, 3, 1, 2]


@pytest.mark.parametrize("vocabulary", [2, 4, 12])
def test_documents_and_history_find_what_follows_most_often(vocabulary):
    rng = np.random.default_rng(vocabulary)
    found = {"documents": 0, "history": 0}
    for _ in range(60):
        texts = [rng.integers(0, vocabulary, size).tolist() for size in rng.integers(0, 60, 4)]
        joined = [token for text in texts for token in [*text, SEPARATOR]]
        context = rng.integers(0, vocabulary, int(rng.integers(1, 12))).tolist()
        history = History()
        for text in texts:
            history.add(tokens_of(text))
        for source, shortest in ((Datastore(texts), 2), (history, 1)):
            match = source.find(tokens_of(context), 5)
            longest, ends = searched(joined, context, shortest)
            if not ends or longest < shortest:
                assert match is None
                continue
            assert match.length == longest
            assert match.tokens.tolist() == voted(joined, ends, 5)
            assert SEPARATOR not in match.tokens
            found[match.source] += 1
    assert min(found.values()) > 10


def test_an_empty_datastore_finds_nothing():
    for texts in ([], [[]], [[5]], [[], [5]]):
        assert Datastore(texts).find(tokens_of([5, 5]), 4) is None
    assert History().find(tokens_of([5]), 4) is None


def test_votes_of_a_very_frequent_match_are_a_sample():
    text = tokens_of([1, 2] * 5000)
    assert vote(text, np.arange(0, 9998, 2), 3).tolist() == [2, 1, 2]


def test_history_forgets_the_oldest():
    history = History(max_tokens=8)
    history.add(tokens_of([1, 2, 3, 4]))
    history.add(tokens_of([5, 6, 7]))
    assert history.find(tokens_of([1]), 2) is None
    assert history.find(tokens_of([3]), 2).tokens.tolist() == [4]
    assert history.find(tokens_of([5]), 4).tokens.tolist() == [6, 7]


def test_files_become_documents(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("the red fox\n", encoding="utf-8")
    two.write_text("äöü", encoding="utf-8")
    words = tokenizer()
    store = Datastore.read([one, two], words)
    context = tokens_of(words("a red", add_special_tokens=False)["input_ids"])
    assert words.decode(store.find(context, 4).tokens.tolist()) == " fox"


def test_files_that_cannot_be_drafted_from_are_named(tmp_path, monkeypatch):
    binary, text = tmp_path / "photo.jpg", tmp_path / "a.txt"
    binary.write_bytes(b"\xff\xd8\xff")
    text.write_text("0123456789")
    for files, message in (
        ([tmp_path / "none.txt"], "none.txt: no such file"),
        ([tmp_path], "it is no file; name the files in it"),
        ([text, binary], "photo.jpg: it is no UTF-8"),
    ):
        with pytest.raises(DatastoreError, match=message):
            Datastore.read(files, tokenizer())
    monkeypatch.setattr(datastore, "MAX_TEXT_BYTES", 15)
    assert Datastore.read([text], tokenizer()).tokens.size
    with pytest.raises(DatastoreError, match="more than"):
        Datastore.read([text, text], tokenizer())
