"""Typed settings of the edge: flags over environment over a TOML file. Unknown keys are errors."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from edge_client.draft_length import DEFAULT_DRAFT_TOKENS
from edge_client.trust import config_folder
from edge_client.tuning.config import TuneConfig
from shared.complaint import setting_in_words

ENV_PREFIX = "PRIVATELORA_EDGE_"
TOKEN_VARIABLE = ENV_PREFIX + "TOKEN"  # no setting: what dumps or shows settings must not meet it
Dtype = Literal["float32", "bfloat16", "float16"]
WireDtype = Literal["float32", "bfloat16", "float16", "int8"]
CodesDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]
DEFAULT_RECOVER_S = 300.0  # a cloud that is restarted may have to load its model
MOST_S = 7 * 86400.0  # that is waited for (seconds): a week; timers overflow far beyond
MOST_PORT = 65535
LEAST_TEMPERATURE = 0.001  # below, logits divided by it leave the range of floats


class SettingsError(ValueError):
    """Settings that are unknown, malformed or out of range."""


class EdgeConfig(BaseSettings):
    """Everything an edge can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", allow_inf_nan=False)

    cloud: str = Field(
        default="127.0.0.1:50051",
        pattern=r"^[^\s,]+:\d{1,5}(,[^\s,]+:\d{1,5})*$",
        description="Address of the cloud (HOST:PORT), or several of them with commas: replicas",
    )
    allow_redirect: tuple[str, ...] = Field(
        default=(),
        description="Names (HOST, HOST:PORT or *.DOMAIN) besides those in cloud that a cloud which drains "
        "may send this edge to",
    )
    tls: bool = Field(default=False, description="Use TLS; the cloud's certificate is from a public CA")
    tls_ca: Path | None = Field(
        default=None, description="Use TLS; the cloud's certificate is from a CA in this file (PEM)"
    )
    client_cert: Path | None = Field(default=None, description="This edge's certificate, for mTLS (PEM file)")
    client_key: Path | None = Field(default=None, description="Private key of that certificate (PEM file)")
    token_file: Path | None = Field(
        default=None, description="File with this edge's token; else PRIVATELORA_EDGE_TOKEN. Needs TLS"
    )
    adapter: Path | None = Field(
        default=None, description="File of personal weights M; none is the base model"
    )
    plan: str | None = Field(default=None, description="Split to use; the adapter's, else the cloud's first")
    wire_dtype: WireDtype | None = Field(
        default=None,
        description="Element type on the wire; the cloud's preference if absent (int8: not for tuning)",
    )
    hidden_wire_dtype: WireDtype | None = Field(
        default=None, description="Element type of hidden states on the wire, both ways; wire_dtype if absent"
    )
    codes_wire_dtype: CodesDtype | None = Field(
        default=None, description="Element type of codes (cloud to edge) on the wire; wire_dtype if absent"
    )
    residual_codes_wire_dtype: CodesDtype | None = Field(
        default=None,
        description="Element type of residual codes (edge to cloud) on the wire; wire_dtype if absent",
    )
    device: str = Field(default="cpu", description="Torch device of embeddings and head (cpu, cuda, mps)")
    dtype: Dtype | None = Field(
        default=None, description="Element type of embeddings and head; the cloud's if absent"
    )
    fingerprint: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="Expected fingerprint of the model (hex)"
    )
    accept_new_fingerprint: bool = Field(default=False, description="Replace what is pinned for this cloud")
    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer (tokens)")
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="0 always takes the likeliest token (no unit), else at least 0.001; the model's default",
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Sample from the likeliest tokens up to this probability (0 to 1)",
    )
    seed: int | None = Field(
        default=None, ge=0, lt=1 << 63, description="Seed of the sampling (no unit); random if absent"
    )
    prefill_chunk_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1 << 16,
        description="Most tokens of a prompt in one step (count); if absent 256 in one-trip plans, else 512",
    )
    draft_tokens: int = Field(
        default=DEFAULT_DRAFT_TOKENS,
        ge=0,
        le=64,
        description="Most tokens guessed ahead and checked in one step (count); 0 guesses none",
    )
    draft_from: tuple[Path, ...] = Field(
        default=(),
        description="Your own texts (files) to guess from; what is guessed crosses the wire like a prompt",
    )
    system: str | None = Field(default=None, description="System message that chats begin with")
    connect_timeout_s: float = Field(
        default=10.0, gt=0, le=MOST_S, description="Longest wait for the cloud (seconds)"
    )
    step_timeout_s: float = Field(
        default=120.0, gt=0, le=MOST_S, description="Longest wait for one step (seconds)"
    )
    recover_timeout_s: float = Field(
        default=DEFAULT_RECOVER_S,
        ge=0,
        le=MOST_S,
        description="How long a lost cloud is tried again before the end (seconds); 0: not at all",
    )
    cache_dir: Path | None = Field(default=None, description="Folder for fetched parts")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Torch threads (count); all cores if absent"
    )

    tune: TuneConfig = Field(default_factory=TuneConfig, description="How to tune; each has its own unit")

    @field_validator("cloud")
    @classmethod
    def _ports_are_ports(cls, cloud: str) -> str:
        if strange := [a for a in cloud.split(",") if int(a.rpartition(":")[2]) > MOST_PORT]:
            raise ValueError(f"ports end at {MOST_PORT}: {strange[0]}")  # gRPC would go to another one
        return cloud

    @field_validator("temperature")
    @classmethod
    def _is_no_speck(cls, temperature: float | None) -> float | None:
        if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"must be 0 or at least {LEAST_TEMPERATURE}")
        return temperature

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let flags win over the environment, and the environment over the TOML file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_config(file: Path | None = None, **flags: object) -> EdgeConfig:
    """Return the settings from a TOML file, the environment and the flags that were given.

    Parameters
    ----------
    file
        None is ``edge.toml`` in the user's configuration folder, if there is one.
    flags
        None means not given.

    Raises
    ------
    SettingsError
        On unknown or malformed settings, or a missing file.
    """
    if file is not None and not file.is_file():
        raise SettingsError(f"no settings file at {file}")
    chosen = file or config_folder() / "edge.toml"

    class FromFile(EdgeConfig):
        model_config = SettingsConfigDict(toml_file=chosen if chosen.is_file() else None)

    known = {ENV_PREFIX + name.upper() for name in EdgeConfig.model_fields} | {TOKEN_VARIABLE}
    if strange := sorted(n for n in os.environ if n.startswith(ENV_PREFIX) and n not in known):
        raise SettingsError(f"unknown environment variable {strange[0]}; known: {', '.join(sorted(known))}")
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return FromFile(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {_words(problem['type'], problem['loc'], problem['msg'])}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        where = f" (flags, {ENV_PREFIX}* or {chosen})" if chosen.is_file() else f" (flags or {ENV_PREFIX}*)"
        raise SettingsError(f"settings{where}: {'; '.join(problems)}") from None
    except (ValueError, RecursionError) as error:  # malformed TOML
        raise SettingsError(f"{chosen}: {str(error)[:300]}") from None


def _words(kind: str, place: tuple[int | str, ...], message: str) -> str:
    """Return what is wrong with a setting; a pattern says less to a person than what it is meant for."""
    field = EdgeConfig.model_fields.get(str(place[0])) if place else None
    if kind == "string_pattern_mismatch" and field is not None:
        return f"this cannot be it; needed: {field.description}"
    return setting_in_words(kind, place, message, EdgeConfig.model_fields)
