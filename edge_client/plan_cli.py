"""``privatelora-edge plan``: what each plan will do on these devices over this link, and which one to use."""

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_client.flags import (
    AsJson,
    CacheDir,
    ClientCert,
    ClientKey,
    Cloud,
    CodesWireDtype,
    ConfigFile,
    Debug,
    Device,
    Dtype,
    HiddenWireDtype,
    ResidualCodesWireDtype,
    Tls,
    TlsCa,
    TokenFile,
    WireDtype,
    one_line_errors,
)

if TYPE_CHECKING:
    from edge_client.planning.network import LinkFacts
    from edge_client.planning.speeds import CloudSpeed

MOST_POSITIONS = 65  # one, and as many guesses as may be made


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("must be a finite number")
    return value


def plan(
    cloud: Cloud = None,
    tls: Tls = None,
    tls_ca: TlsCa = None,
    token_file: TokenFile = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    link: Annotated[
        str | None,
        typer.Option("--link", metavar="NAME", help="Predict for loopback, wifi, 5g or wan, not this link."),
    ] = None,
    rtt_ms: Annotated[
        float | None,
        typer.Option("--rtt-ms", min=0, callback=_finite, help="Round-trip time (ms); measured by default."),
    ] = None,
    up_mbit: Annotated[
        float | None,
        typer.Option("--up-mbit", callback=_finite, help="Rate to the cloud (Mbit/s); measured by default."),
    ] = None,
    down_mbit: Annotated[
        float | None,
        typer.Option(
            "--down-mbit", callback=_finite, help="Rate from the cloud (Mbit/s); measured by default."
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            metavar="N",
            min=1,
            help="Prompt to predict the first token of; 512 by default.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", min=1, help="Positions a session holds (for memory); 1024 by default."
        ),
    ] = None,
    positions: Annotated[
        int,
        typer.Option(
            "--positions",
            metavar="N",
            min=1,
            max=MOST_POSITIONS,
            help="Positions sent in one step: 1 and the guesses.",
        ),
    ] = 1,
    tokens_per_step: Annotated[
        float,
        typer.Option(
            "--tokens-per-step",
            metavar="X",
            min=1,
            callback=_finite,
            help="Tokens that a step yields on average with these guesses.",
        ),
    ] = 1.0,
    memory_mib: Annotated[
        float | None,
        typer.Option(
            "--memory-mib",
            metavar="X",
            min=0,
            callback=_finite,
            help="This side's room for a plan (MiB); no bound by default.",
        ),
    ] = None,
    busy_watt: Annotated[
        float,
        typer.Option(
            "--busy-watt", min=0, callback=_finite, help="This side's power while it computes; assumed."
        ),
    ] = 10.0,
    idle_watt: Annotated[
        float,
        typer.Option(
            "--idle-watt", min=0, callback=_finite, help="This side's power while it waits; assumed."
        ),
    ] = 2.0,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Only the paper's own estimates, and what a real link makes of them."),
    ] = False,
    wire_dtype: WireDtype = None,
    hidden_wire_dtype: HiddenWireDtype = None,
    codes_wire_dtype: CodesWireDtype = None,
    residual_codes_wire_dtype: ResidualCodesWireDtype = None,
    dtype: Dtype = None,
    device: Device = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Predict speed, bytes and memory of every plan, and recommend one. Sends random numbers only.

    Times this side and, over the live connection, the cloud and the link; that takes some seconds, and longer
    where round trips are long. The cloud's model is not fetched, nor any adapter read.
    """
    with one_line_errors(debug):
        if paper:
            _paper(as_json)
            return
        from edge_client.config import SettingsError, load_config

        if tokens_per_step > positions:
            raise SettingsError(f"a step of {positions} positions cannot yield {tokens_per_step:g} tokens")
        flags: dict[str, Any] = {"cloud": cloud, "wire_dtype": wire_dtype, "dtype": dtype, "device": device}
        flags |= {
            "hidden_wire_dtype": hidden_wire_dtype,
            "codes_wire_dtype": codes_wire_dtype,
            "residual_codes_wire_dtype": residual_codes_wire_dtype,
        }
        flags |= {"tls": tls, "tls_ca": tls_ca, "client_cert": client_cert, "client_key": client_key}
        settings = load_config(config, **flags, token_file=token_file, cache_dir=cache_dir)
        from edge_client.planning.network import LINKS
        from edge_client.planning.report import document, show
        from edge_client.planning.speeds import Drafting, Power
        from edge_client.planning.survey import Survey

        chosen = _link(link)
        _altered(
            LINKS["loopback"], rtt_ms, up_mbit, down_mbit
        )  # a wrong one is told before anything is timed
        survey = Survey.take(settings)
        _check_limits(survey.cloud, prompt_tokens, context, positions)
        most = survey.cloud.max_context_tokens
        over = _altered(chosen or survey.link, rtt_ms, up_mbit, down_mbit)
        setting = survey.setting(
            over,
            prompt_tokens=prompt_tokens or min(512, most),
            context_tokens=context or min(1024, most),
            drafting=Drafting(positions=positions, tokens_per_step=tokens_per_step),
            power=Power(busy_w=busy_watt, idle_w=idle_watt),
        )
        memory = None if memory_mib is None else int(memory_mib * 2**20)
        found = document(survey, setting, memory)
        if as_json:
            print(json.dumps(found, allow_nan=False))
        else:
            show(found)


def _check_limits(
    cloud: "CloudSpeed", prompt_tokens: int | None, context: int | None, positions: int
) -> None:
    from edge_client.config import SettingsError

    for flag, value, most, what in (
        ("--prompt-tokens", prompt_tokens, cloud.max_context_tokens, "positions in a session"),
        ("--context", context, cloud.max_context_tokens, "positions in a session"),
        ("--positions", positions, cloud.max_step_tokens, "positions in a step"),
    ):
        if value is not None and value > most:
            raise SettingsError(f"{flag} {value}: this cloud takes at most {most} {what}")


def _link(name: str | None) -> "LinkFacts | None":
    from edge_client.config import SettingsError
    from edge_client.planning.network import LINKS

    if name is not None and name not in LINKS:
        raise SettingsError(f"no link is called {name!r}; there are {', '.join(LINKS)}")
    return LINKS[name] if name is not None else None


def _altered(
    link: "LinkFacts", rtt_ms: float | None, up_mbit: float | None, down_mbit: float | None
) -> "LinkFacts":
    from pydantic import ValidationError

    from edge_client.config import SettingsError

    changes: dict[str, Any] = {}
    if rtt_ms is not None:
        changes["rtt_s"] = rtt_ms / 1e3
    if up_mbit is not None:
        changes["up_bit_s"] = up_mbit * 1e6
    if down_mbit is not None:
        changes["down_bit_s"] = down_mbit * 1e6
    if not changes:
        return link
    try:
        return type(link).model_validate({**link.model_dump(), **changes, "name": "given"})
    except ValidationError:
        raise SettingsError(
            "--up-mbit and --down-mbit must be above 0, and --rtt-ms at most 3,600,000 (an hour)"
        ) from None


def _paper(as_json: bool) -> None:
    from edge_client.planning.paper_table import document, show

    found = document()
    if as_json:
        print(json.dumps(found))
    else:
        show(found)
