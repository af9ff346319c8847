"""Settings, figures, answers, chat and the command line, without a network."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from edge_client import cli
from edge_client.answer import TextStream, answer, printable
from edge_client.chat import Chat
from edge_client.config import EdgeConfig, SettingsError, load_config
from edge_client.personal import PersonalWeights
from edge_client.report import Figures, Meter, full_activation_bytes
from shared.adapter import Adapter
from shared.wire_dtypes import WireDtypes
from tests import families
from tests.unit.edge_fake import FINGERPRINT, split


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path))


@pytest.fixture
def model():
    edge, _ = split(families.build("llama"))
    edge.tokenizer = chat_tokenizer()
    return edge


def chat_tokenizer():
    from edge_client.tokenizer import EdgeTokenizer

    plain = families.tokenizer()
    return EdgeTokenizer(
        tokenizer_object=plain.backend_tokenizer,
        chat_template=plain.chat_template,
        **plain.special_tokens_map,
    )


# --- personal weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_residual_codes_are_codes_times_m(layout, tokens):
    plan = families.plan_for(families.build("llama"), r_c2d=6, r_d2c=4, layout=layout)
    adapter = Adapter.random(plan, FINGERPRINT, seed=1, std=1.0)
    codes = torch.randn(tokens, plan.codes_width, generator=torch.Generator().manual_seed(2))
    found = torch.from_numpy(PersonalWeights(adapter).residual_codes(2, codes.numpy()))
    each = [codes[:, g * 6 : g * 6 + 6] @ adapter.matrices[2][g] for g in range(plan.groups)]
    assert found.shape == (tokens, plan.residual_width) and found.is_contiguous()
    torch.testing.assert_close(found, torch.cat(each, dim=1))


def test_an_adapter_without_a_layer_is_refused():
    plan = families.plan_for(families.build("llama"))
    adapter = Adapter.zeros(plan, FINGERPRINT)
    del adapter.matrices[1]
    with pytest.raises(ValueError, match=r"no M for layers \[1\]"):
        PersonalWeights(adapter)


# --- settings -------------------------------------------------------------------------------------------


def test_flags_win_over_environment_over_file(tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.write_text('cloud = "file:1"\nseed = 1\nmax_new_tokens = 5\n')
    monkeypatch.setenv("PRIVATELORA_EDGE_SEED", "2")
    monkeypatch.setenv("PRIVATELORA_EDGE_MAX_NEW_TOKENS", "6")
    settings = load_config(file, max_new_tokens=7, cloud=None)
    assert (settings.cloud, settings.seed, settings.max_new_tokens) == ("file:1", 2, 7)
    (tmp_path / "edge.toml").write_text('cloud = "default:1"\n')
    assert load_config().cloud == "default:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "colour"),
        ("seed = -1", "seed"),
        ("temperature = 1e-40", "temperature: .*0 or at least 0.001"),
        ("seed = 9223372036854775808", "seed: Input should be less than"),
        ("[tune]\nseed = 9223372036854775808", "tune.seed: Input should be less than"),
        ("seed = ", "mine.toml"),
        ('cloud = "nowhere"', r"cloud: .*HOST:PORT"),
        ('cloud = "here:1,there:65536"', "cloud: .*ports end at 65535: there:65536"),
        ("threads = 1000000", "threads: Input should be less than"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_config(file)


def test_each_kind_of_tensor_may_travel_otherwise(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('wire_dtype = "bfloat16"\nresidual_codes_wire_dtype = "int8"\n')
    settings = load_config(file)
    assert (settings.wire_dtype, settings.hidden_wire_dtype) == ("bfloat16", None)
    assert (settings.codes_wire_dtype, settings.residual_codes_wire_dtype) == (None, "int8")
    assert load_config(file, wire_dtype="int8").wire_dtype == "int8"
    assert load_config(residual_codes_wire_dtype="int4", codes_wire_dtype="int4").codes_wire_dtype == "int4"
    # Hidden states do not take int4, and nobody computes in int8.
    for field in (
        "codes_wire_dtype = 'int2'",
        "hidden_wire_dtype = 'int4'",
        "wire_dtype = 'int4'",
        "dtype = 'int8'",
    ):
        file.write_text(field)
        with pytest.raises(SettingsError, match=field.partition(" ")[0]):
            load_config(file)


def test_a_device_that_is_not_there_is_named_before_anything_is_sent():
    result = CliRunner().invoke(cli.app, ["generate", "--prompt", "Hi", "--device", "cuda:99"])
    assert result.exit_code == 1 and "cannot compute on device 'cuda:99'" in result.stderr


def test_unknown_environment_is_named(monkeypatch):
    monkeypatch.setenv("PRIVATELORA_EDGE_SEDE", "1")
    with pytest.raises(SettingsError, match="PRIVATELORA_EDGE_SEDE"):
        load_config()
    with pytest.raises(SettingsError, match="no settings file"):
        load_config(families.Path("/nonexistent.toml"))


def test_every_setting_says_its_unit():
    for name, field in EdgeConfig.model_fields.items():
        assert field.description, name


# --- answers --------------------------------------------------------------------------------------------


def test_answer_streams_what_it_returns(model):
    written = []
    reply = answer(model, families.prompts(1)[0], EdgeConfig(max_new_tokens=12), written.append)
    assert (
        "".join(written)
        == reply.text
        == printable(model.tokenizer.decode(reply.tokens, skip_special_tokens=True))
    )
    figures = reply.figures
    assert figures.new_tokens == len(reply.tokens)
    assert figures.prompt_tokens == len(families.prompts(1)[0]) and figures.reused_tokens == 0
    assert "decode" in figures.line() and json.dumps(figures.to_json())
    again = answer(model, families.prompts(1)[0], EdgeConfig(max_new_tokens=12))
    assert again.tokens == reply.tokens
    assert again.figures.reused_tokens == figures.prompt_tokens - 1


def test_characters_are_written_whole(model):
    text, written = "añ漢🙂\nz", []
    stream = TextStream(model.tokenizer, written.append, Meter(model))
    stream.put(torch.tensor([[1, 2]]))
    for token in model.tokenizer(text)["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(written) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(written)


def test_answers_cannot_steer_a_terminal():
    assert printable("a\x1b[2Jb\x9bc\r\x07\td\n") == "a[2Jbc\td\n"


def test_a_pad_token_in_the_text_is_part_of_it(model):
    model.generation_config.pad_token_id = 0
    settings = EdgeConfig(temperature=0, max_new_tokens=4, draft_tokens=0)
    prompt = [9, 0, 11, 0, 12]
    found = answer(model, prompt, settings)
    ids = torch.tensor([prompt])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
    assert found.figures.reused_tokens < 5 and found.tokens == whole[0, 5:].tolist()


def test_answer_ends_where_the_context_does(model):
    room = model.limits.max_context_tokens
    model.generation_config.eos_token_id = None
    reply = answer(model, list(range(10, 10 + room - 3)), EdgeConfig(max_new_tokens=50))
    assert (reply.finish, len(reply.tokens)) == ("context", 4)


def test_interrupted_answer_is_kept(model):
    def stop(text):
        raise KeyboardInterrupt

    calls = []

    def write(text):
        calls.append(text)
        if len(calls) == 3:
            stop(text)

    reply = answer(model, families.prompts(1)[0], EdgeConfig(max_new_tokens=12), write)
    assert reply.finish == "interrupted" and len(reply.tokens) >= 1
    assert len(answer(model, families.prompts(1)[0], EdgeConfig(max_new_tokens=4)).tokens) == 4


def test_seed_makes_sampling_repeatable(model):
    settings = EdgeConfig(max_new_tokens=8, temperature=1.0, seed=5)
    one, two = (answer(model, families.prompts(1)[0], settings).tokens for _ in range(2))
    assert one == two


def test_full_activations_as_the_paper_counts_them():
    plan = families.plan_for(families.build("llama"))
    dtypes = WireDtypes.named("float32", hidden="bfloat16")
    assert full_activation_bytes(plan, dtypes) == 2 * plan.hidden_size * 2 * plan.num_layers
    int8 = WireDtypes.named("int8")
    assert full_activation_bytes(plan, int8) == 2 * (plan.hidden_size + 4) * plan.num_layers


# --- chat -----------------------------------------------------------------------------------------------


class Talk:
    def __init__(self, model, agree=True, **settings):
        self.lines, self.questions, self.agree = [], [], agree
        self.chat = Chat(
            model, EdgeConfig(max_new_tokens=4, **settings), lambda t: None, self.lines.append, self.ask
        )

    def ask(self, question):
        self.questions.append(question)
        return self.agree


def test_next_turn_reuses_the_conversation(model):
    talk = Talk(model, system="Be brief.")
    first = talk.chat.turn("Hi")
    second = talk.chat.turn("Why?")
    assert second.figures.reused_tokens >= first.figures.prompt_tokens
    assert [m["role"] for m in talk.chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_full_context_offers_to_drop_the_oldest(model):
    talk = Talk(model)
    talk.chat.turn("a" * 60)
    assert talk.chat.turn("b" * 60) is not None
    assert len(talk.questions) == 1 and "Drop the oldest" in talk.questions[0]
    assert talk.chat.turns == 1 and "b" in talk.chat.messages[0]["content"]
    refusing = Talk(model, agree=False)
    refusing.chat.turn("a" * 60)
    assert refusing.chat.turn("b" * 60) is None and refusing.chat.turns == 1
    assert refusing.chat.turn("c" * 500) is None
    assert Talk(model).chat.turn("c" * 500) is None


def test_commands(model, tmp_path):
    talk = Talk(model)
    talk.chat.turn("Hi")
    talk.chat.turn("Ho")
    assert talk.chat.command("/drop") and talk.chat.turns == 1
    assert talk.chat.command("/drop 5") and talk.chat.turns == 0
    assert talk.chat.command("/reset") and talk.chat.command("/help") and talk.chat.command("/nonsense")
    assert "no such command" in talk.lines[-1]
    for known in ("/drop two", "/adapter"):  # known, but not like this
        assert talk.chat.command(known) and f"{known.split()[0]} takes" in talk.lines[-1]
    assert not talk.chat.command("/quit")


# --- command line ---------------------------------------------------------------------------------------


@pytest.fixture
def run(model, monkeypatch):
    @contextmanager
    def given(settings):
        yield model

    monkeypatch.setattr(cli, "_model", given)
    return lambda *args, **kwargs: CliRunner().invoke(cli.app, list(args), **kwargs)


def test_generate_prints_the_answer_and_then_figures(run):
    result = run("generate", "--prompt", "Hello", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().splitlines()[-1].startswith("[prompt ")


def test_generate_json_and_stdin(run):
    result = run("generate", "--json", "--raw", "--max-new-tokens", "5", input="Hello")
    found = json.loads(result.stdout)
    assert found["new_tokens"] == len(found["tokens"]) and {"text", "finish", "reduction"} <= found.keys()
    assert found["prompt_tokens"] == 5


def test_chat_survives_bytes_that_are_no_text(run):
    result = run("chat", "--max-new-tokens", "3", input=b"caf\xe9\n")
    assert result.exit_code == 0 and "was no utf-8 text, and was not sent" in result.output


def test_a_closed_stdin_is_no_prompt(run, monkeypatch):
    monkeypatch.setattr(cli.sys, "stdin", None)  # as `<&-` leaves it
    with pytest.raises(ValueError, match="no prompt: give --prompt TEXT"):
        cli._stdin()


@pytest.mark.skipif(sys.platform == "win32", reason="starts a shell")
@pytest.mark.parametrize("command", ["edge_client.cli", "cloud_server.cli"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_a_command_started_without_a_standard_stream_has_one(command, closed):
    """Else an event loop's pipe gets its number, and closing that ends the process (SIGABRT)."""
    code = (
        f"import asyncio, sys; from {command} import app, main; import {command} as module\n"
        "def serve():\n"
        "    import uvloop\n"
        "    loop = uvloop.new_event_loop(); loop.run_until_complete(asyncio.sleep(0)); loop.close()\n"
        "    sys.exit(7)\n"
        "module.app = serve; main()\n"
    )
    run = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    assert subprocess.run(run, timeout=600, check=False).returncode == 7


def test_errors_are_one_line(run):
    result = run("generate", "--prompt", "x" * 500)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the context is full") and result.stderr.count("\n") == 1
    assert run("generate", "--prompt", "x", "--temperature", "-1").exit_code == 2
    assert run("generate", "--prompt", "x", "--cloud", "nowhere").exit_code == 2


def test_interrupted_generate_prints_figures_and_says_so_by_its_exit_code(run, model, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", interrupt)
    result = run("generate", "--prompt", "Hello")
    assert result.exit_code == 130 and result.stderr == ""
    assert "tokens | stopped before the first token]" in result.stdout
    found = json.loads(run("generate", "--json", "--prompt", "Hello").stdout)
    assert found["finish"] == "interrupted" and found["new_tokens"] == found["reused_tokens"] == 0


def test_chat_goes_on_after_errors_and_commands(run):
    result = run("chat", "--max-new-tokens", "3", input="Hi\n/adapter /nonexistent\n\n/reset\nHo\n")
    assert result.exit_code == 0, result.output
    assert "error: no adapter '/nonexistent'" in result.output
    assert result.output.count("[prompt ") == 2


@pytest.mark.parametrize("where", ["answer", "figures", "command"])
def test_no_ctrl_c_ends_a_chat(run, monkeypatch, where):
    """One may come while an earlier one is being heeded, or when nothing is under way that it could stop."""
    left = [KeyboardInterrupt]

    def interrupt_once(*args, **kwargs):
        if left:
            raise left.pop()
        return kept(*args, **kwargs)

    owner, name = {"answer": (Meter, "figures"), "figures": (Figures, "line"), "command": (Chat, "drop")}[
        where
    ]
    kept = getattr(owner, name)
    monkeypatch.setattr(owner, name, interrupt_once)
    result = run("chat", "--max-new-tokens", "3", input="Hi\n/drop\nHo\n")
    assert result.exit_code == 0, result.output
    assert not left and "[prompt " in result.output.rpartition("> ")[0]


def test_a_chat_ends_where_nothing_can_be_read(run, monkeypatch):
    def gone(prompt):
        raise OSError(5, "Input/output error")  # a terminal that was closed

    monkeypatch.setattr("builtins.input", gone)
    result = run("chat")
    assert result.exit_code == 1 and result.stderr == "error: Input/output error\n"
    monkeypatch.setattr(cli.sys, "stdin", None)
    assert cli._read_line() is None


def test_ctrl_c_at_a_question_is_no(monkeypatch):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert cli._ask("Drop the oldest?") is False


def test_help_is_there_without_torch():
    code = "import sys; from edge_client import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
    for command in ("generate", "chat", "info", "tune", "plan"):
        assert "--cloud" in CliRunner().invoke(cli.app, [command, "--help"]).output


def test_the_edge_needs_no_cloud_library():
    code = (
        "import sys\nfor name in ('gguf', 'accelerate', 'cloud_server', 'grpc_health', 'grpc_reflection'):\n"
        "    sys.modules[name] = None\n"
        "import edge_client.connect, edge_client.chat, edge_client.info\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=600, check=True)
