"""What a person reads when the operating system says no."""

import errno
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloud_server import cli as cloud_cli
from edge_client import cli as edge_cli
from shared.adapter import Adapter, AdapterError
from shared.cache import replacing
from shared.complaint import in_words
from shared.disk import DiskFullError


def test_what_was_said_in_words_stays() -> None:
    assert in_words(ValueError("a plan needs a name")) == "a plan needs a name"
    assert in_words(DiskFullError("no room on the disk")) == "no room on the disk"
    assert in_words(OSError("cannot listen")) == "cannot listen"
    assert in_words(OSError(errno.EADDRINUSE, "cannot listen on a:1")) == "cannot listen on a:1"


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    acts = (file.mkdir, lambda: (file / "a" / "b").mkdir(parents=True), (file / "a").touch)
    for act in acts:
        with pytest.raises(OSError) as caught:
            act()
        assert in_words(caught.value).startswith(f"{file} is a file, and a folder is needed there")


def test_other_things_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        tmp_path.read_bytes()
    assert in_words(caught.value).startswith(f"{tmp_path} is a folder, and a file is needed there")
    with pytest.raises(OSError) as caught:
        (tmp_path / "none").read_bytes()
    assert in_words(caught.value) == f"there is no {tmp_path / 'none'}"
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path))
    assert in_words(refused).startswith(f"this user may not use {tmp_path}")
    assert in_words(OSError(errno.EIO, "Input/output error", b"/x")) == "cannot use /x: input/output error"


def test_the_file_is_named_that_was_to_be_replaced(tmp_path: Path) -> None:
    """Not the draft, which nobody knows, and which is gone by then."""
    (tmp_path / "known").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / "known") as file:
        file.write(b"x")
    assert in_words(caught.value).startswith(f"{tmp_path / 'known'} is a folder, and a file is needed there")


@pytest.mark.parametrize("path", [None, "/x"])
def test_too_many_open_files(path: str | None) -> None:
    words = in_words(OSError(errno.EMFILE, "Too many open files", path))
    assert "raise the limit" in words and "ulimit -n" in words


NO_MEMORY = (
    MemoryError(),
    MemoryError("Cannot allocate memory (os error 12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("unable to mmap 113248704 bytes from file </x>: Cannot allocate memory (12)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_want_of_memory_is_one_line_on_either_side(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is found: while libraries are loaded, or in the middle of a command."""

    def fail(*_: object, **__: object) -> None:
        raise error

    assert "not enough memory" in in_words(error)
    monkeypatch.setattr(edge_cli, "_settings", fail)
    monkeypatch.setattr(cloud_cli, "_run", fail)
    for app, command in ((edge_cli.app, ["info"]), (cloud_cli.app, ["serve"])):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 1 and "error: there is not enough memory" in " ".join(said.output.split())


def test_an_import_that_fails_for_another_reason_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(edge_cli, "_settings", fail)
    assert isinstance(CliRunner().invoke(edge_cli.app, ["info"]).exception, ImportError)


def test_a_config_folder_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config"
    file.touch()
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(file))
    for command in (["adapter", "list"], ["adapter", "show", "me"], ["adapter", "use", "me"]):
        said = CliRunner().invoke(edge_cli.app, command)
        words = " ".join(said.output.split())
        assert said.exit_code == 1 and f"{file} is a file, and a folder is needed there" in words, command


def test_a_cloud_whose_cache_folder_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = CliRunner().invoke(
        cloud_cli.app,
        ["serve", "--listen", f"127.0.0.1:{port}", "--cache-dir", str(file), "--metrics", "off"],
    )
    assert said.exit_code == 1 and f"{file} is a file, and a folder is needed there" in said.output
    assert "Errno" not in said.output


@pytest.mark.parametrize(
    "command",
    [
        *(["token", "add", "me", "--tokens", "FILE/tokens.json"], ["token", "list", "--tokens", "FILE/x"]),
        *(
            ["token", "revoke", "me", "--tokens", "FILE/x"],
            ["token", "add", "me", "--tokens", "x", "--out", "FILE/x"],
        ),
        *(["cert", "dev", "--out", "FILE"], ["cert", "dev", "--out", "FILE/certs"]),
    ],
)
def test_a_file_where_a_cloud_needs_a_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    said = CliRunner().invoke(cloud_cli.app, [word.replace("FILE", str(file)) for word in command])
    words = " ".join(said.output.split())
    assert said.exit_code == 1 and f"{file} is a file, and a folder is needed there" in words, words
    assert "Errno" not in words and "Not a directory" not in words


@pytest.mark.parametrize("act", [["add", "me"], ["list"], ["revoke", "me"]])
def test_a_folder_where_a_token_file_is_needed(act: list[str], tmp_path: Path) -> None:
    said = CliRunner().invoke(cloud_cli.app, ["token", *act, "--tokens", str(tmp_path)])
    words = " ".join(said.output.split())
    assert said.exit_code == 1 and f"{tmp_path} is a folder, and a file is needed there" in words, words


def test_an_adapter_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(tmp_path))
    path = tmp_path / "adapters" / "me.safetensors"
    path.parent.mkdir()
    path.touch()
    look = Path.lstat

    def refused(self: Path) -> object:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(self)

    monkeypatch.setattr(Path, "lstat", refused)
    said = CliRunner().invoke(edge_cli.app, ["adapter", "list", "--json"])
    assert said.exit_code == 0 and f"this user may not use {path}" in said.output
    assert "Errno" not in said.output


@pytest.mark.parametrize(
    ("side", "line", "words"),
    [
        ("cloud", "lissten = ''", "lissten: unknown setting; was listen meant?"),
        ("cloud", "bogus = 1", "bogus: unknown setting; --help lists those there are"),
        ("cloud", "listen = '*:1'", "listen: to listen everywhere, write 0.0.0.0:1"),
        ("edge", "wire_dtyp = 'bf16'", "wire_dtyp: unknown setting; was wire_dtype meant?"),
        ("edge", "bogus = 1", "bogus: unknown setting; --help lists those there are"),
    ],
)
def test_an_unknown_setting_is_said_to_be_one(side: str, line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(line)
    app, command = (cloud_cli.app, ["serve"]) if side == "cloud" else (edge_cli.app, ["info"])
    said = CliRunner().invoke(app, [*command, "--config", str(file)])
    assert said.exit_code and words in " ".join(said.output.split()), said.output


def test_a_text_file_is_no_adapter(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("some words of somebody")
    with pytest.raises(AdapterError, match="notes.txt is no safetensors file, or a damaged one") as refused:
        Adapter.load(file)
    assert "somebody" not in str(refused.value)
