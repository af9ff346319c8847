"""Tokens: shown once, kept as digests, known and revoked while a server runs."""

import json
import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloud_server import cli, tokens
from cloud_server.tokens import TokenBook, TokenFileError, add, entries, revoke


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "tokens.json"


def test_a_token_is_random_and_is_not_in_the_file(path):
    one, two = add(path, "laptop"), add(path, "jetson")
    assert one != two
    for token in (one, two):
        assert token.startswith("plora_") and len(token) == len("plora_") + 43  # 256 bits, base64url
    text = path.read_text()
    assert one not in text and one[6:] not in text and set(json.loads(text)["tokens"]) == {"laptop", "jetson"}


def test_the_file_is_its_owners_alone_and_whole_at_any_time(path, monkeypatch):
    add(path, "laptop")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        add(path, "jetson")
    assert path.read_bytes() == before and {p.name for p in path.parent.iterdir()} <= {
        path.name,
        f".{path.name}.lock",
    }


def test_a_book_knows_who_shows_a_token(path):
    one, two = add(path, "laptop"), add(path, "jetson")
    book = TokenBook(path)
    assert book.identity(one) == ("laptop", tokens.digest(one))
    assert book.identity(two) == ("jetson", tokens.digest(two))
    for wrong in (
        "",
        "plora_",
        one[:-1],
        one + "A",
        one.swapcase(),
        "laptop",
        tokens.digest(one).hex(),
        "\udcff",
    ):
        assert book.identity(wrong) is None


def test_one_digest_is_compared_in_constant_time_however_many_there_are(path, monkeypatch):
    token = add(path, "a")
    for name in "bcd":
        add(path, name)
    book, compared = TokenBook(path), []
    real = tokens.hmac.compare_digest
    monkeypatch.setattr(tokens.hmac, "compare_digest", lambda x, y: compared.append((x, y)) or real(x, y))
    for shown in (token, token[:-1], ""):
        compared.clear()
        assert (book.identity(shown) is not None) is (shown == token)
        assert [(len(x), y) for x, y in compared] == [(32, tokens.digest(shown))]


def test_digests_are_found_by_what_nobody_outside_can_compute(path):
    token = add(path, "a")
    one, other = TokenBook(path), TokenBook(path)
    assert not one._by_digest.keys() & other._by_digest.keys(), "the order of a lookup could be learned"
    assert tokens.digest(token) not in one._by_digest and one.identity(token) == other.identity(token)


def test_changes_are_seen_without_a_restart(path):
    old = add(path, "laptop")
    book = TokenBook(path)
    other = add(path, "jetson")
    assert book.identity(other) is not None
    revoke(path, "laptop")
    assert book.identity(old) is None and not book.holds("laptop", tokens.digest(old))
    new = add(path, "laptop")  # the name again, but another token
    assert book.identity(new) is not None and book.identity(old) is None
    assert book.holds("laptop", tokens.digest(new)) and not book.holds("laptop", tokens.digest(old))
    assert not book.holds("nobody", b"")


def test_a_damaged_file_shuts_nobody_out_and_a_missing_one_everybody(path, caplog):
    token = add(path, "laptop")
    book, whole = TokenBook(path), path.read_bytes()
    path.write_bytes(whole[:-10])
    for _ in range(3):
        assert book.identity(token) is not None
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1, "said once"
    path.write_bytes(whole)
    assert book.identity(token) is not None
    path.unlink()
    assert book.identity(token) is None
    path.write_bytes(whole)
    assert book.identity(token) is not None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(path, mode):
    add(path, "laptop")
    path.chmod(mode)
    with pytest.raises(TokenFileError, match="chmod 600"):
        TokenBook(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "tokens": {}}',
        '{"tokens": {}, "more": 1}',
        '{"tokens": {"a": {"sha256": "00", "created": ""}}}',
        '{"tokens": {"a b": {"sha256": "%s", "created": ""}}}' % ("0" * 64),
        "\xff",
    ],
)
def test_what_is_no_token_file_is_refused(path, text):
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    for read in (TokenBook, entries, lambda p: add(p, "x"), lambda p: revoke(p, "x")):
        with pytest.raises(TokenFileError, match="no token file"):
            read(path)


@pytest.mark.parametrize("name", ["", " ", "a b", "-rf", "ä", "a\n", "a" * 65, "../x", "a\tb"])
def test_a_name_that_cannot_be_one(path, name):
    with pytest.raises(TokenFileError, match="cannot be a name"):
        add(path, name)


def run(*words, **environment):
    return CliRunner().invoke(cli.app, ["token", *words], env=environment)


def test_the_command_shows_a_token_once(path):
    made = run("add", "laptop", "--tokens", str(path))
    token = made.stdout.strip()
    assert made.exit_code == 0 and TokenBook(path).identity(token)[0] == "laptop"  # stdout is the token alone
    listed = run("list", PRIVATELORA_CLOUD_TOKENS=str(path))
    assert listed.exit_code == 0 and listed.stdout.startswith("laptop\t20")
    assert token not in listed.output and tokens.digest(token).hex() not in listed.output
    again = run("add", "laptop", "--tokens", str(path))
    assert again.exit_code == 1 and "has a token" in again.stderr and token not in again.output
    assert run("revoke", "laptop", "--tokens", str(path)).exit_code == 0
    assert TokenBook(path).identity(token) is None
    gone = run("revoke", "laptop", "--tokens", str(path))
    assert gone.exit_code == 1 and gone.stderr.startswith("error: 'laptop' has no token in")


def test_the_command_writes_a_token_for_its_owner_only(path, tmp_path):
    out = tmp_path / "laptop.token"
    made = run("add", "laptop", "--tokens", str(path), "--out", str(out))
    token = out.read_text().strip()
    assert made.stderr == f"wrote the token of laptop to {out}\n" and not made.stdout
    assert made.exit_code == 0 and token not in made.output and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert TokenBook(path).identity(token)[0] == "laptop"
    over = run("add", "jetson", "--tokens", str(path), "--out", str(out))
    assert f"{out} exists already: remove it" in over.stderr and "or give another --out" in over.stderr
    assert over.exit_code == 1 and "Errno" not in over.stderr and out.read_text().strip() == token
    assert set(entries(path)) == {"laptop"}, "a token was made that nobody has seen"
    other = tmp_path / "other.token"
    assert run("add", "laptop", "--tokens", str(path), "--out", str(other)).exit_code == 1
    assert not other.exists()


def test_what_the_page_says_of_a_token_that_leaks_works_as_written(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    block = page.split("*A token leaks:*")[1].split("```sh\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    assert run("add", "laptop", "--tokens", "tokens.json", "--out", "laptop.token").exit_code == 0
    leaked = Path("laptop.token").read_text()
    for program, *words in (line.split() for line in block.splitlines() if line.strip()):
        if program == "rm":
            Path(*words).unlink()
        else:
            assert (program, words[0]) == ("privatelora-cloud", "token") and run(*words[1:]).exit_code == 0
    fresh = Path("laptop.token").read_text()
    assert fresh != leaked and TokenBook(Path("tokens.json")).identity(fresh.strip())[0] == "laptop"


def test_there_is_no_token_file_by_default(tmp_path):
    assert run("list").exit_code == 2
    missing = run("list", "--tokens", str(tmp_path / "none"))
    assert missing.exit_code == 1 and "token add" in missing.stderr


def test_a_pipe_in_the_token_files_place_stops_nobody(tmp_path):
    """To open one would wait for somebody to write into it, with everybody who is served."""
    file = tmp_path / "tokens.json"
    token = tokens.add(file, "me")
    book = tokens.TokenBook(file)
    file.unlink()
    os.mkfifo(file)
    assert book.identity(token) is not None  # what was known before stays valid
    with pytest.raises(tokens.TokenFileError, match="is no file but a pipe or device"):
        tokens.TokenBook(file)
