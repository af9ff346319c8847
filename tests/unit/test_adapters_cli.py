"""Adapters as things a person handles: listed, shown, used, removed, and what `--adapter` means."""

import json
import os
import stat

import pytest
import tiny_checkpoint as tiny
from typer.testing import CliRunner

from edge_client import cli
from edge_client.adapters import AdapterStore, StoreError, resolve_adapter
from edge_client.config import load_config
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter, AdapterError
from shared.fingerprint import Fingerprint, plan_digest

HOSTILE = [
    *("", ".", "..", "../me", "/etc/passwd", "a/b", "a\\b", ".hidden", "-rf", "a\0b", "a\nb", "a b", "é"),
    *(
        "none",
        "NONE",
        "me.safetensors",
        "me.SafeTensors",
        "x" * 65,
        "\x1b[2J",
        "~",
        "~root",
        "me\n",
        "%2e%2e",
    ),
]
COLUMNS = {"COLUMNS": "200"}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("PRIVATELORA_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return AdapterStore()


def adapter(name="mine", **training):
    plan = tiny.plan()
    fingerprint = Fingerprint(plan_digest(plan), *(bytes([i]) * 32 for i in range(3)))
    made = Adapter.random(plan, fingerprint, 0, 0.05, name=name)
    made.created, made.training = "2024-05-06T07:08:09Z", training or None
    return made


def put(store, saved_as, **options):
    adapter(**options).save(store.path_to_save(saved_as))


def run(*args, **options):
    return CliRunner().invoke(cli.app, ["adapter", *args], env=COLUMNS, **options)


def test_a_narrow_terminal_cuts_no_fingerprint_short(store):
    put(store, "me")
    facts = json.loads(run("list", "--json").stdout)
    shown = CliRunner().invoke(cli.app, ["adapter", "list"], env={"COLUMNS": "80"}).stdout
    assert facts[0]["fingerprint"][:12] in shown and "\u2026" not in shown


def test_a_narrow_terminal_cuts_no_name_in_two(store):
    put(store, "x" * 40)
    facts = json.loads(run("list", "--json").stdout)[0]
    shown = CliRunner().invoke(cli.app, ["adapter", "list"], env={"COLUMNS": "50"}).stdout
    for kept in (facts["name"], facts["backbone"], facts["plan"], facts["created"][:10]):
        assert kept in shown


# --- names and files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_lead_nowhere(store, tmp_path, name):
    put(store, "me")
    (tmp_path / "data" / "me.safetensors").write_bytes(b"outside the store")
    before = sorted(tmp_path.rglob("*"))
    for act in (store.path, store.path_to_save, store.entry, store.use, store.remove):
        with pytest.raises(StoreError, match="cannot be an adapter's name"):
            act(name)
    if name.lower() != "none" and name not in ("", ".", "..", "~", "~root", "/etc/passwd"):
        with pytest.raises(StoreError, match="no adapter"):
            store.resolve(name)
    for command in ("show", "use"):
        result = run(command, "--", name)
        assert result.exit_code == 1 and "\x1b" not in result.output, result.output
    assert run("remove", "--yes", "--", name).exit_code == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_people_give(store):
    for name in ("me", "Me-2.1_final", "7b", "a" * 64, "nonesuch"):
        assert store.path(name).parent == store.folder


def test_the_folder_is_the_owners(store, tmp_path):
    put(store, "me")
    assert store.folder == tmp_path / "data" / "adapters"
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert AdapterStore(tmp_path / "other").folder == tmp_path / "other" / "adapters"


# --- list and show ----------------------------------------------------------------------------------------


def test_an_empty_list_says_what_makes_one(store):
    result = run("list")
    assert result.exit_code == 0 and "no adapters in" in result.output and "tune" in result.output
    assert json.loads(run("list", "--json").output) == []


def test_list_shows_each_with_what_it_is_for(store):
    put(store, "work")
    put(store, "home")
    store.use("home")
    lines = run("list").output.splitlines()
    (home,) = [line for line in lines if " home " in line]
    (work,) = [line for line in lines if " work " in line]
    assert "*" in home and "*" not in work
    root = adapter().fingerprint.root.hex()
    for part in ("2024-05-06 07:08", "tiny", root[:12], "KiB"):
        assert part in work
    assert root[:13] not in work
    home, work = json.loads(run("list", "--json").output)
    assert (home["name"], home["in_use"], work["in_use"]) == ("home", True, False)
    assert work == {
        "name": "work",
        "in_use": False,
        "path": str(store.path("work")),
        "size_bytes": store.path("work").stat().st_size,
        "created": "2024-05-06T07:08:09Z",
        "backbone": "tiny",
        "plan": "tiny",
        "fingerprint": root,
    }


def test_what_is_no_adapter_is_listed_with_the_reason(store, tmp_path):
    put(store, "good")
    outside = tmp_path / "outside.safetensors"
    adapter().save(outside)
    (store.folder / "linked.safetensors").symlink_to(outside)
    (store.folder / "dangling.safetensors").symlink_to(tmp_path / "absent")
    (store.folder / "folder.safetensors").mkdir()
    os.mkfifo(store.folder / "pipe.safetensors")
    (store.folder / "empty.safetensors").touch()
    cut = store.path("good").read_bytes()
    (store.folder / "cut.safetensors").write_bytes(cut[:-1])
    (store.folder / "altered.safetensors").write_bytes(cut[:-1] + bytes([cut[-1] ^ 1]))
    (store.folder / "\x1b[2Jno name.safetensors").write_bytes(cut)
    (store.folder / ".good.safetensors.tmp").touch()
    (store.folder / "notes.txt").touch()
    found = {entry["name"]: entry.get("problem", "") for entry in json.loads(run("list", "--json").output)}
    reasons = {
        "good": "",
        "linked": "symbolic link",
        "dangling": "symbolic link",
        "folder": "s a directory",
        "pipe": "not a regular file",
        "empty": "has 0 bytes",
        "cut": "truncated",
        "altered": "does not match its digest",
        "\x1b[2Jno name": "rename the file",
    }
    assert found.keys() == reasons.keys()
    assert not [name for name, reason in reasons.items() if reason not in found[name]]
    result = run("list")
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert result.output.count("unusable") == 8 and "cut: " in result.output
    for name in list(reasons)[1:-1]:
        for command in ("show", "use"):
            broken = run(command, name)
            assert broken.exit_code == 1 and "cannot be used: " in broken.stderr
            assert broken.stderr.count("\n") == 1
    with pytest.raises(StoreError, match="symbolic link"):
        store.resolve("linked")


def test_show_tells_all_but_m(store):
    put(
        store,
        "me",
        name="my \x9b writing",
        steps=3,
        loss={"best": 1.5},
        note="\x1b[31mred",
        **{"a\x1bb": [1]},
    )
    result = run("show", "me")
    assert result.exit_code == 0 and not {"\x1b", "\x9b"} & set(result.output)
    made = adapter()
    for part in (
        *("2024-05-06T07:08:09Z", "3 layers, width 16", "4 down, 4 up", "tuning, steps", "best", "1.5"),
        *(
            f"{sum(m.numel() for m in made.matrices.values())} parameters",
            str(store.path("me")),
            made.fingerprint.root.hex(),
            made.fingerprint.edge.hex(),
        ),
    ):
        assert part in result.output, part
    facts = json.loads(run("show", "me", "--json").output)
    assert facts["training"]["loss"] == {"best": 1.5} and facts["name_in_file"] == "my \x9b writing"
    assert facts["plan"]["num_layers"] == 3 and facts["fingerprint"]["root"] == made.fingerprint.root.hex()
    assert "matrices" not in facts and not facts["in_use"]
    put(store, "plain")
    assert run("show", "plain").exit_code == 0
    assert json.loads(run("show", "plain", "--json").output)["training"] is None


def test_what_is_not_there_says_what_is(store):
    assert "which is empty" in run("show", "me").stderr
    for at in range(25):
        put(store, f"a{at:02}")
    result = run("show", "me")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "there is: a00, a01" in result.stderr and "and 5 more" in result.stderr


# --- use and remove -------------------------------------------------------------------------------------


def test_use_lasts_and_can_be_undone(store):
    put(store, "me")
    assert store.in_use() is None and resolve_adapter() is None
    assert run("use", "me").output == "in use: me\n"
    assert AdapterStore().in_use() == "me" and resolve_adapter() == store.path("me")
    assert run("show", "me").output.count("in use") == 1
    assert run("use", "--none").output == "in use: the base model\n"
    assert AdapterStore().in_use() is None and run("use", "--none").exit_code == 0
    assert run("use").exit_code == 2 and run("use", "me", "--none").exit_code == 2
    assert run("use", "absent").exit_code == 1 and store.in_use() is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"adapter": 5}', '{"adapter": "../x"}', "[" * 100_000, "\xff"]
)
def test_a_damaged_memory_is_named_and_mended(store, tmp_path, text):
    put(store, "me")
    memory = tmp_path / "config" / "adapter_in_use.json"
    memory.parent.mkdir()
    memory.write_text(text)
    with pytest.raises(StoreError, match="is damaged"):
        resolve_adapter()
    listed = run("list")
    assert listed.exit_code == 0 and " me " in listed.stdout and "is damaged" in listed.stderr
    assert run("show", "me").exit_code == 0
    assert run("use", "me").exit_code == 0 and store.in_use() == "me"


def test_remove_asks_and_forgets_what_was_in_use(store):
    put(store, "me")
    put(store, "other")
    store.use("me")
    for answer in ("n\n", "\n", "what\n", ""):
        result = run("remove", "me", input=answer)
        assert result.exit_code == 1 and "kept" in result.output and store.path("me").exists()
    assert "the base model is in use now" in run("remove", "me", input="y\n").output
    assert store.names() == ["other"] and store.in_use() is None
    store.use("other")
    put(store, "me")
    assert run("remove", "me", "--yes").output == "deleted me\n"
    assert store.in_use() == "other"
    assert run("remove", "me", "--yes").exit_code == 1


def test_remove_deletes_the_link_and_never_what_it_leads_to(store, tmp_path):
    put(store, "me")
    outside = tmp_path / "outside"
    outside.write_text("precious")
    store.path("link").symlink_to(outside)
    store.path("folders").symlink_to(tmp_path, target_is_directory=True)
    store.path("folder").mkdir()
    assert store.remove("link") is False and store.remove("folders") is False
    with pytest.raises(StoreError, match="is a folder"):
        store.remove("folder")
    assert outside.read_text() == "precious" and store.names() == ["folder", "me"]
    store.path("broken").write_text("no adapter")
    assert run("remove", "broken", "--yes").exit_code == 0


def test_what_is_in_use_but_gone_is_an_error_not_the_base_model(store):
    put(store, "me")
    store.use("me")
    store.path("me").unlink()
    with pytest.raises(StoreError, match=r"'me', which is in use, is no longer in .*use --none"):
        resolve_adapter()
    assert resolve_adapter("none") is None
    assert "in use, but no longer there" in run("list").stderr


# --- what --adapter means ---------------------------------------------------------------------------------


def test_a_name_a_file_or_none(store, tmp_path, monkeypatch):
    put(store, "me")
    put(store, "other")
    store.use("other")
    file = tmp_path / "file.safetensors"
    adapter().save(file)
    assert resolve_adapter("me") == store.path("me") and resolve_adapter(None) == store.path("other")
    assert resolve_adapter(file) == file and str(resolve_adapter("file.safetensors")) == "file.safetensors"
    assert resolve_adapter("none") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_adapter("~/file.safetensors") == file
    (tmp_path / "me").write_text("a file of the same name")
    assert resolve_adapter("me") == store.path("me") and resolve_adapter(tmp_path / "me") == tmp_path / "me"
    for value, what in [
        ("absent", "is no file"),
        (tmp_path, "is a folder"),
        ("me.safetensors", "is no file"),
    ]:
        with pytest.raises(StoreError, match=rf"{what}.*there is: me, other"):
            resolve_adapter(value)


@pytest.mark.parametrize(
    ("flag", "setting", "expected"),
    [(None, None, "used"), ("other", None, "other"), ("none", None, None), (None, "other", "other"),
     (None, "none", None), ("used", "other", "used")],
)  # fmt: skip
def test_generate_and_chat_load_what_is_meant(store, monkeypatch, flag, setting, expected):
    put(store, "used")
    put(store, "other")
    store.use("used")
    if setting is not None:
        monkeypatch.setenv("PRIVATELORA_EDGE_ADAPTER", setting)
    asked = []

    def from_cloud(target, adapter, *args, **options):
        asked.append(adapter)
        raise AdapterError("does not fit")

    monkeypatch.setattr(PrivateLoraForCausalLM, "from_cloud", from_cloud)
    for command in (["generate", "--prompt", "x"], ["chat"]):
        result = CliRunner().invoke(cli.app, [*command, *(["--adapter", flag] if flag else [])])
        assert result.exit_code == 1 and "does not fit" in result.stderr
        assert ("is the one in use" in result.stderr) == (flag is None and setting is None)
    assert asked == [store.path(expected) if expected else None] * 2


def test_a_wrong_adapter_is_refused_before_anything_is_sent(store, monkeypatch):
    monkeypatch.setattr(
        PrivateLoraForCausalLM, "from_cloud", lambda *args, **options: pytest.fail("connected")
    )
    result = CliRunner().invoke(cli.app, ["generate", "--prompt", "x", "--adapter", "absent"])
    assert result.exit_code == 1 and "no adapter 'absent'" in result.stderr
    assert load_config(adapter="me").adapter is not None


def test_help_names_every_command():
    output = CliRunner().invoke(cli.app, ["adapter", "--help"]).output
    assert all(command in output for command in ("list", "show", "use", "remove"))
    assert "NAME|FILE" in CliRunner().invoke(cli.app, ["generate", "--help"], env=COLUMNS).output
