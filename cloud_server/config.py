"""Typed settings of the cloud: flags over environment over a TOML file. Unknown keys are errors."""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shared.plan import SHARING_LAYERS, Initialiser, Layout

ENV_PREFIX = "PRIVATELORA_CLOUD_"


class EngineConfig(BaseModel):
    """Batching and slicing bounds of the engine."""

    model_config = ConfigDict(extra="forbid")

    short_step_tokens: int = Field(
        default=16, ge=1, description="Longest row of a step that counts as decoding (positions)"
    )
    max_batch_steps: int = Field(default=256, ge=1, description="Most steps that run together (count)")
    max_batch_tokens: int = Field(
        default=2048, ge=1, description="Most of long steps that runs at once, all together (positions)"
    )
    slice_s: float = Field(default=0.005, gt=0, description="Longest slice while decodes are ready (seconds)")
    inline_s: float = Field(
        default=0.005, ge=0, description="Work expected to be shorter runs on the event loop itself (seconds)"
    )
    gather_wait_s: float = Field(
        default=0.01, ge=0, description="Longest wait for steps due at the same layer (seconds)"
    )
    start_wait_share: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="Longest wait of a new step for others, as a share of what a step takes (no unit)",
    )
    fairness_s: float = Field(
        default=0.05, gt=0, description="Prefill that has waited longer goes before decoding (seconds)"
    )


class TuningConfig(BaseModel):
    """Bounds on tuning, which shares the engine with decoding and comes after it."""

    model_config = ConfigDict(extra="forbid")

    max_streams: int = Field(
        default=8, ge=0, description="Most edges that tune at a time (count); 0 switches tuning off"
    )
    max_bytes: int = Field(
        default=4 << 30, ge=1, description="Memory of all tuning batches under way together (bytes)"
    )
    checkpointing: bool = Field(
        default=False,
        description="Run layers again on the way back instead of keeping what they computed: a tenth of the "
        "memory, a third less speed",
    )
    piece_tokens: int = Field(
        default=384,
        ge=1,
        description="Most that runs at once, whole sequences: more is faster, less delays decoding less "
        "(tokens). Gradients depend on it in their last bits",
    )
    min_share: float = Field(
        default=0.1, gt=0, le=1, description="Share of the time that tuning gets, whoever decodes (no unit)"
    )
    spare_share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of the time that it may get while all decodes wait for their edges (no unit)",
    )
    idle_timeout_s: float = Field(
        default=600.0, gt=0, description="An edge that is waited for this long is cut off (seconds)"
    )


class IdentityLimits(BaseModel):
    """Bounds on what one identity (a token, a certificate) uses; None is none but the cloud's own."""

    model_config = ConfigDict(extra="forbid")

    max_sessions: int | None = Field(
        default=None, ge=1, description="Most sessions, dropped ones included (count)"
    )
    max_kv_bytes: int | None = Field(default=None, ge=1, description="Most of the KV cache (bytes)")
    max_tokens_per_s: float | None = Field(
        default=None, gt=0, description="Positions of steps and tuning batches (tokens per second)"
    )
    burst_s: float = Field(
        default=10.0, ge=0, description="Unused token rate is saved up for this long (seconds)"
    )
    max_wait_s: float = Field(
        default=5.0,
        ge=0,
        description="A step waits this long for the token rate before it is refused (seconds)",
    )
    max_tuning_streams: int | None = Field(
        default=None, ge=0, description="Most tuning runs at a time (count); 0 lets nobody tune"
    )

    @property
    def burst_tokens(self) -> float:
        """Tokens that may be spent at once."""
        return self.burst_s * (self.max_tokens_per_s or 0.0)


class PlanConfig(BaseModel):
    """A plan that the cloud offers; A and B are made for it on first use."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="per-layer-r64", description="Name edges ask for it by")
    r_c2d: int = Field(default=64, ge=1, description="Width of one group of codes (elements)")
    r_d2c: int = Field(default=64, ge=1, description="Width of one group of residual codes (elements)")
    layout: Layout = Field(default="per_projection", description="One A-M-B per projection, or one fused")
    initialiser: Initialiser = Field(default="orthonormal", description="How A and B are made")
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Layers in the cloud that are adapted (indices); if absent all, or none where "
        "the edge keeps layers",
    )
    exchange_layers: tuple[int, ...] | None = Field(
        default=None,
        description="Layers where codes are sent, for themselves and those after them (indices); the adapted "
        "ones if absent",
    )
    share_residual_codes: int = Field(
        default=1,
        ge=1,
        description="Adapted layers in a row, of those that one exchange feeds, that share one M and the "
        "residual codes (count)",
    )
    one_trip: bool = Field(
        default=False,
        description="Fill in layers, exchange_layers, head_layers and tail_layers for one round trip a token",
    )
    head_layers: int = Field(default=0, ge=0, description="First decoder layers that edges run (count)")
    tail_layers: int = Field(default=0, ge=0, description="Last decoder layers that edges run (count)")
    lora_rank: int = Field(
        default=16, ge=0, description="Rank of the LoRA in the layers that edges run (elements); 0: none"
    )
    scale: float = Field(default=1.0, gt=0, description="Factor on the residual (no unit)")


NAMED_PLANS = {
    "per-layer": PlanConfig(),
    "one-trip": PlanConfig(name="one-trip-r64", one_trip=True),
    "one-trip-shared": PlanConfig(
        name="one-trip-shared-r64", one_trip=True, share_residual_codes=SHARING_LAYERS
    ),
}


def plan_config(text: str) -> PlanConfig:
    """Return the plan that ``text`` names or describes as JSON.

    Raises
    ------
    ValueError
        If it does neither.
    """
    if text in NAMED_PLANS:
        return NAMED_PLANS[text]
    if not text.lstrip().startswith("{"):
        raise ValueError(f"no plan is called {text!r}; give {' or '.join(NAMED_PLANS)}, or a plan as JSON")
    return PlanConfig.model_validate_json(text)


class CloudConfig(BaseSettings):
    """Everything a cloud server can be told."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid")

    model: str = Field(
        default="smollm2-135m-instruct",
        description="Packaged model name, Hugging Face folder, GGUF file or hub id",
    )
    listen: str = Field(
        default="127.0.0.1:50051", description="Address to listen on (HOST:PORT; port 0 is any)"
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="Element type the backbone computes in"
    )
    device: str = Field(default="cpu", description="Torch device of the backbone (cpu, cuda, cuda:N, mps)")
    kv_bytes: int = Field(default=1 << 30, ge=1, description="Budget of the KV cache (bytes)")
    plans: tuple[PlanConfig, ...] = Field(default=(PlanConfig(),), min_length=1, description="Plans offered")
    max_context_tokens: int | None = Field(
        default=None, ge=1, description="Longest row (positions); the model's own limit if absent"
    )
    max_step_tokens: int = Field(default=512, ge=1, description="Most positions in one step (positions)")
    max_rows: int = Field(
        default=64, ge=1, description="Most rows, beams or batch entries, a session (count)"
    )
    max_sessions: int = Field(default=1024, ge=1, description="Most sessions, dropped ones included (count)")
    max_fetches: int = Field(
        default=64, ge=1, description="Most edges that fetch parts at a time (count); each takes a few MB"
    )
    max_steps_in_flight: int = Field(default=8, ge=1, description="Most unfinished steps a session (count)")
    grace_period_s: float = Field(
        default=60.0,
        ge=0,
        description="How long a dropped session's KV is held for it to come back (seconds)",
    )
    write_timeout_s: float = Field(
        default=30.0, gt=0, description="An edge that reads nothing for this long is cut off (seconds)"
    )
    idle_timeout_s: float = Field(
        default=3600.0, gt=0, description="A session that sends nothing for this long is closed (seconds)"
    )
    tls_cert: Path | None = Field(
        default=None, description="Server certificate and its chain (PEM file); read again when it changes"
    )
    tls_key: Path | None = Field(default=None, description="Private key of the certificate (PEM file)")
    client_ca: Path | None = Field(
        default=None, description="CAs whose clients are let in (PEM file); without, none is asked for"
    )
    tokens: Path | None = Field(
        default=None, description="Token file; without, no token is asked for. Read again when it changes"
    )
    allow_plaintext: bool = Field(
        default=False, description="Listen beyond loopback without TLS: everybody on the way can read along"
    )
    allow_anonymous: bool = Field(
        default=False, description="Listen beyond loopback without tokens or client certificates"
    )
    threads: int | None = Field(default=None, ge=1, description="Torch threads (count); all cores if absent")
    cache_dir: Path | None = Field(default=None, description="Folder for models and A/B files")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Log detail")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Batching and slicing")
    tuning: TuningConfig = Field(default_factory=TuningConfig, description="Bounds on tuning")
    per_identity: IdentityLimits = Field(
        default_factory=IdentityLimits, description="Bounds on what each identity uses"
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "CloudConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("client_ca needs tls_cert and tls_key: client certificates are part of TLS")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let flags win over the environment, and the environment over the TOML file given by --config."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_config(file: Path | None, **flags: object) -> CloudConfig:
    """Return the configuration from a TOML file, the environment and flags that were given.

    Raises
    ------
    pydantic.ValidationError
        On unknown keys or values out of range.
    ValueError
        On unknown environment variables: one letter wrong must not switch TLS off unnoticed.
    FileNotFoundError
        If the file is missing.
    """
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"no configuration file at {file}")

    known = {ENV_PREFIX + name.upper() for name in CloudConfig.model_fields}
    names = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if strange := [name for name in names if name.partition("__")[0] not in known]:
        raise ValueError(f"unknown environment variable {strange[0]}; known: {', '.join(sorted(known))}")

    class FromFile(CloudConfig):
        model_config = SettingsConfigDict(**{**CloudConfig.model_config, "toml_file": file})

    given = {name: value for name, value in flags.items() if value is not None}
    return FromFile.model_validate(FromFile(**given).model_dump())  # type: ignore[arg-type]
