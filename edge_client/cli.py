"""``privatelora-edge``: talk to a language model whose layers run in a cloud that is never sent your text."""

import os

# Before torch: spinning OpenMP threads would steal the cores that gRPC needs between exchanges.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else it tells a person of every connection that ends

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_client.adapter_cli import app as adapter_app
from edge_client.doctor_cli import doctor
from edge_client.flags import (
    AcceptNew,
    AdapterName,
    AllowRedirect,
    AsJson,
    CacheDir,
    ClientCert,
    ClientKey,
    Cloud,
    CodesWireDtype,
    ConfigFile,
    Debug,
    Device,
    DraftFrom,
    DraftTokens,
    Dtype,
    FingerprintHex,
    HiddenWireDtype,
    MaxNewTokens,
    PlanName,
    ResidualCodesWireDtype,
    Seed,
    System,
    Temperature,
    Tls,
    TlsCa,
    TokenFile,
    TopP,
    WireDtype,
    one_line_errors,
)
from edge_client.plain import printable
from edge_client.plan_cli import plan
from edge_client.rank_cli import rank
from edge_client.tune_cli import tune
from shared.complaint import in_words
from shared.help_text import Commands
from shared.standard_streams import fill_standard_streams
from shared.version import ShowVersion

if TYPE_CHECKING:
    from edge_client.chat import Chat
    from edge_client.config import EdgeConfig
    from edge_client.model import PrivateLoraForCausalLM

app = typer.Typer(
    cls=Commands,
    help="Use a language model whose layers run in a cloud. Your text, its tokens and your personal weights "
    "stay on this machine; hidden states and low-rank codes cross the wire. These can be decoded: a cloud "
    "that wants to can read your text from them (see the project's threat model).\n\n"
    "Settings come from flags, then PRIVATELORA_EDGE_* variables, then a TOML file: that of --config, or "
    "edge.toml in the user's configuration folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main_callback(version: ShowVersion = False) -> None:
    """Take the options that stand before a command."""


@app.command()
def info(
    cloud: Cloud = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Show what a cloud offers: plans, fingerprints, limits, memory, versions. Sends nothing private."""
    flags = _flags(locals())
    with one_line_errors(debug):
        settings = _settings(config, flags)
        from edge_client.info import describe, show

        facts = describe(settings)
        if as_json:
            print(json.dumps(facts))
        else:
            show(facts)


@app.command()
def generate(
    cloud: Cloud = None,
    allow_redirect: AllowRedirect = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="What to ask; read from stdin if not given."),
    ] = None,
    adapter: AdapterName = None,
    plan: PlanName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    draft_tokens: DraftTokens = None,
    draft_from: DraftFrom = None,
    system: System = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", "--no-chat-template", help="Continue the text as it is, without chat format."),
    ] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the answer only, no figures.")] = False,
    wire_dtype: WireDtype = None,
    hidden_wire_dtype: HiddenWireDtype = None,
    codes_wire_dtype: CodesWireDtype = None,
    residual_codes_wire_dtype: ResidualCodesWireDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    fingerprint: FingerprintHex = None,
    accept_new_fingerprint: AcceptNew = None,
    cache_dir: CacheDir = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Answer one prompt. The answer is streamed; a line of figures ends it."""
    flags = _flags(locals())
    with one_line_errors(debug):
        settings = _settings(config, flags)
        text = prompt if prompt is not None else _stdin()
        with _model(settings) as model:
            from edge_client.answer import answer

            write = (lambda piece: None) if as_json else _write
            reply = answer(model, _tokens(model, text, settings, raw), settings, write)
            if as_json:
                document = {"text": reply.text, "tokens": reply.tokens, "finish": reply.finish}
                print(json.dumps({**document, **reply.figures.to_json()}))
            else:
                _write("\n" if quiet else f"\n\n[{reply.figures.line()}]\n")
        if reply.finish == "interrupted":
            raise typer.Exit(130)


@app.command()
def chat(
    cloud: Cloud = None,
    allow_redirect: AllowRedirect = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    adapter: AdapterName = None,
    plan: PlanName = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    draft_tokens: DraftTokens = None,
    draft_from: DraftFrom = None,
    system: System = None,
    wire_dtype: WireDtype = None,
    hidden_wire_dtype: HiddenWireDtype = None,
    codes_wire_dtype: CodesWireDtype = None,
    residual_codes_wire_dtype: ResidualCodesWireDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    fingerprint: FingerprintHex = None,
    accept_new_fingerprint: AcceptNew = None,
    cache_dir: CacheDir = None,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Hold a conversation. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat."""
    flags = _flags(locals())
    with one_line_errors(debug):
        settings = _settings(config, flags)
        with _model(settings) as model:
            from edge_client.chat import Chat

            talk = Chat(model, settings, _write, lambda line: _write(line + "\n"), _ask)
            _write(f"connected to {settings.cloud}; /help lists the commands\n")
            while _goes_on(talk, debug):
                pass


# After the commands above, so that help lists them first. Imports torch only when a command needs it.
app.command()(tune)
app.command()(plan)
app.command()(rank)
app.command()(doctor)
app.add_typer(adapter_app, name="adapter")


def _goes_on(talk: "Chat", debug: bool) -> bool:
    """Take one line of a conversation and do what it says; return whether more are wanted.

    No Ctrl-C ends the conversation: not a second one while the first is heeded, nor one between answers.
    """
    try:
        line = _read_line()  # what goes wrong here would go wrong again, so it ends the conversation
        if line is None:
            return False
        try:
            if line.startswith("/"):
                return talk.command(line.strip())
            if line.strip() and (reply := talk.turn(line)) is not None:
                _write(f"\n[{reply.figures.line()}]\n")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if debug:
                raise
            _write(f"\nerror: {printable(in_words(error))}\n")
    except KeyboardInterrupt:
        _write("\n")
    return True


def _flags(given: dict[str, Any]) -> dict[str, Any]:
    others = ("prompt", "raw", "as_json", "quiet", "config", "debug")
    return {name: value for name, value in given.items() if name not in others}


def _settings(file: Path | None, flags: dict[str, Any]) -> "EdgeConfig":
    from edge_client.config import load_config

    return load_config(file, **flags)


@contextmanager
def _model(settings: "EdgeConfig") -> Iterator["PrivateLoraForCausalLM"]:
    from edge_client.adapters import resolve_adapter
    from edge_client.opened import opened
    from shared.adapter import AdapterError

    adapter = resolve_adapter(settings.adapter)
    try:
        model = opened(settings, adapter)
    except AdapterError as error:
        if settings.adapter is not None or adapter is None:
            raise
        raise AdapterError(
            f"{error}; this adapter is the one in use: --adapter NAME takes another, none the base model"
        ) from None
    with model:
        yield model


def _tokens(model: "PrivateLoraForCausalLM", text: str, settings: "EdgeConfig", raw: bool) -> list[int]:
    assert model.tokenizer is not None
    if raw:
        ids: list[int] = model.tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty; give some text to continue")
        return ids
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    messages = [*system, {"role": "user", "content": text}]
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():  # None: it was closed before this program began
        raise ValueError("no prompt: give --prompt TEXT, or pipe the text in")
    return sys.stdin.read()


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _read_line() -> str | None:
    """Return a line, None at the end of input; Ctrl-C at the prompt only clears it."""
    while sys.stdin is not None:  # None: it was closed before this program began
        try:
            return input("> ")
        except EOFError:
            _write("\n")
            return None
        except KeyboardInterrupt:
            _write("\n(Ctrl-D or /quit ends the chat)\n")
        except UnicodeDecodeError as error:  # pasted from elsewhere; the conversation is worth more
            _write(f"\nthat was no {error.encoding} text, and was not sent\n")
    return None


def _ask(question: str) -> bool:
    try:
        return input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")
    except (EOFError, KeyboardInterrupt):
        _write("\n")
        return False


def main() -> None:
    """Console entry point."""
    fill_standard_streams()
    app()


if __name__ == "__main__":
    main()
