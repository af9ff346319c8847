"""``privatelora-cloud``: host the decoder layers of a model for private edges."""

import os

# Before torch: spinning OpenMP threads would steal the cores that gRPC needs between exchanges.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines are not in the log's format

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloud_server import logs
from cloud_server.cert_cli import app as cert_app
from cloud_server.health_cli import health
from cloud_server.token_cli import app as token_app
from shared.complaint import in_words, is_want_of_memory, setting_in_words
from shared.help_text import Commands
from shared.standard_streams import fill_standard_streams
from shared.version import ShowVersion

if TYPE_CHECKING:
    from cloud_server.service import Service

log = logging.getLogger(__name__)
app = typer.Typer(
    cls=Commands,
    help="Host the frozen decoder layers of a language model. Edges keep their text, tokens and weights M.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main_callback(version: ShowVersion = False) -> None:
    """Host the frozen decoder layers of a language model."""


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Packaged model name (smollm2-135m-instruct, the default), Hugging Face folder, GGUF file, "
            "or hub id."
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT to listen on; 127.0.0.1:50051 by default, port 0 picks a free one."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 (the default), bfloat16, float16 or float64: what to compute in."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu (the default), cuda or mps: what to compute on.")
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="Share the layers among this many processes (ranks) of this machine, each with some of the "
            "attention heads and, on cuda, a GPU of its own; 1 by default. Under torchrun leave it out."
        ),
    ] = None,
    kv_bytes: Annotated[
        int | None, typer.Option(help="Memory for keys and values of all sessions (bytes); 1 GiB by default.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the offered plan (elements); 64 by default.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="per_projection (the default): an A, M and B each for q, k and v; fused: one for all."
        ),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            help="A plan to offer: per-layer (the default), one-trip, one-trip-shared or one-trip-lean (for "
            "slow links), or JSON such as "
            '\'{"name": "r16", "r_c2d": 16, "r_d2c": 16}\'. Repeatable; the first is the edges\' default.'
        ),
    ] = None,
    max_context_tokens: Annotated[
        int | None, typer.Option(help="Longest conversation (tokens); the model's own limit by default.")
    ] = None,
    max_step_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in one step; 512 by default.")
    ] = None,
    grace_period_s: Annotated[
        float | None, typer.Option(help="How long a lost session may come back (seconds); 60 by default.")
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(help="After SIGTERM, how long steps may take to finish (seconds); 5 by default."),
    ] = None,
    successor: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where edges are sent when this server stops; nowhere by default."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="Serve TLS with this certificate (PEM, chain included); replace it at any time."),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate (PEM).")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="Let in only clients with a certificate of these CAs (PEM): mTLS.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Let in only callers with a token of this file; see `token add`.")
    ] = None,
    allow_plaintext: Annotated[
        bool | None,
        typer.Option("--allow-plaintext", help="Listen beyond loopback without TLS; all can read along."),
    ] = None,
    allow_anonymous: Annotated[
        bool | None,
        typer.Option("--allow-anonymous", help="Listen beyond loopback without tokens and client CA."),
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            "--health",
            help="HOST:PORT that answers gRPC health checks alone, in clear, for probes; none by default.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads; all cores by default.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder for models and A/B files.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings and more.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT where Prometheus is answered, or off; 127.0.0.1:9464 by default, if that is free."
        ),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text (the default), or json: one object a line.")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="debug, info (the default), warning or error.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Serve a model. Settings come from flags, then PRIVATELORA_CLOUD_* variables, then the TOML file."""
    from pydantic import ValidationError

    from cloud_server.config.cloud import CloudConfig
    from cloud_server.config.plans import PlanConfig, plan_config
    from cloud_server.config.reading import load_config

    try:
        plans = tuple(plan_config(text) for text in plan) if plan else None
        if rank is not None or layout is not None:
            if plans:
                raise ValueError("give either --plan or --rank/--layout")
            fields = {"r_c2d": rank or 64, "r_d2c": rank or 64, "layout": layout or "per_projection"}
            name = f"per-layer-r{rank or 64}" + ("-fused" if layout == "fused" else "")
            plans = (PlanConfig.model_validate({"name": name, **fields}),)
        settings = load_config(
            config,
            model=model,
            listen=listen,
            dtype=dtype,
            device=device,
            tensor_parallel=tensor_parallel,
            kv_bytes=kv_bytes,
            plans=plans,
            max_context_tokens=max_context_tokens,
            max_step_tokens=max_step_tokens,
            grace_period_s=grace_period_s,
            drain_timeout_s=drain_timeout_s,
            successor=successor,
            tls_cert=tls_cert,
            tls_key=tls_key,
            client_ca=client_ca,
            tokens=tokens,
            allow_plaintext=allow_plaintext,
            allow_anonymous=allow_anonymous,
            health=probes,
            threads=threads,
            cache_dir=cache_dir,
            log_level=log_level,
            log_format=log_format,
            metrics=metrics,
        )
        logs.set_up(settings.log_level, settings.log_format)
        _run(settings)
    except ValidationError as error:
        if debug:
            raise
        for problem in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in problem["loc"])
            words = setting_in_words(
                problem["type"], problem["loc"], problem["msg"], CloudConfig.model_fields
            )
            print(f"error: {f'setting {where}: ' if where else ''}{words}", file=sys.stderr)
        raise typer.Exit(2) from None
    except ModuleNotFoundError as error:
        if debug:
            raise
        print(
            f"error: {error}; is only the edge's side installed here? pip install '.[cloud]' adds this one",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    except typer.Exit:  # a RuntimeError, but no error
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if debug or (isinstance(error, ImportError) and not is_want_of_memory(error)):
            raise
        logs.failed(in_words(error))
        raise typer.Exit(1) from None


app.command()(health)
app.add_typer(token_app, name="token")  # after serve, so that help lists it first
app.add_typer(cert_app, name="cert")


def _run(settings: "CloudConfig") -> None:
    from cloud_server.parallel_children import place_of

    place = place_of(settings)
    if place.rank > 0:  # torchrun started this one to follow another
        from cloud_server.parallel_start import follow_or_fail

        raise typer.Exit(follow_or_fail(settings, place))
    from cloud_server.server import serve as serve_until_stopped

    async def until_stopped() -> bool:
        try:
            return await serve_until_stopped(settings, _announce)
        finally:
            _heed_no_more_signals()

    if sys.platform != "win32":
        import uvloop

        uvloop.install()  # a third less latency an exchange than asyncio's own loop
    if not asyncio.run(until_stopped()):
        raise typer.Exit(1)


def _heed_no_more_signals() -> None:
    """Let nobody who asks once more to stop kill a process that is about to end, and end well."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if sys.platform != "win32":
            asyncio.get_running_loop().remove_signal_handler(number)  # which the end of the loop would do
        signal.signal(number, signal.SIG_IGN)


def _announce(address: str, service: "Service") -> None:
    config, budget = service.config, service.engine.cache.bytes_total
    plans = ", ".join(offer.plan.name for offer in service.offers.values())
    words = f"serving {config.model} on {address} (plans: {plans}; KV cache {budget / 2**20:.0f} MiB)"
    if config.log_format == "text":
        print(words, flush=True)
    else:
        at, model = address, config.model
        logs.event(log, "serving", words, address=at, model=model, plans=plans, kv_bytes=budget)


def main() -> None:
    """Console entry point."""
    fill_standard_streams()
    app()


if TYPE_CHECKING:
    from cloud_server.config.cloud import CloudConfig

if __name__ == "__main__":
    main()
