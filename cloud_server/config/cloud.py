"""All settings of a cloud in one value: the sections of the top level, and the tables.

The sections are bases of `CloudConfig`, so a setting's name does not tell which file it is in.
"""

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from cloud_server.config.compute import ComputeSettings
from cloud_server.config.engine import EngineConfig
from cloud_server.config.identity import IdentityLimits
from cloud_server.config.limits import LimitSettings
from cloud_server.config.observation import ObservationSettings
from cloud_server.config.patience import PatienceSettings
from cloud_server.config.plans import PlanConfig
from cloud_server.config.security import SecuritySettings
from cloud_server.config.tuning import TuningConfig
from cloud_server.config.waiting import QueueConfig

ENV_PREFIX = "PRIVATELORA_CLOUD_"
MOST_PORT = 65535


class CloudConfig(
    ComputeSettings, LimitSettings, PatienceSettings, SecuritySettings, ObservationSettings, BaseSettings
):
    """Everything a cloud server can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", allow_inf_nan=False
    )

    listen: str = Field(
        default="127.0.0.1:50051", description="Address to listen on (HOST:PORT; port 0 is any)"
    )
    plans: tuple[PlanConfig, ...] = Field(default=(PlanConfig(),), min_length=1, description="Plans offered")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Batching and slicing")
    queue: QueueConfig = Field(default_factory=QueueConfig, description="Waiting for room")
    tuning: TuningConfig = Field(default_factory=TuningConfig, description="Bounds on tuning")
    per_identity: IdentityLimits = Field(
        default_factory=IdentityLimits, description="Bounds on what each identity uses"
    )

    @field_validator("listen", "metrics", "health")
    @classmethod
    def _hosts_are_hosts(cls, address: str | None) -> str | None:
        host, _, port = (address or "").rpartition(":")
        if host == "*":  # whoever resolves it makes something else of it
            raise ValueError(f"to listen everywhere, write 0.0.0.0:{port} or [::]:{port}, not {address!r}")
        return address

    @field_validator("listen", "health")
    @classmethod
    def _ports_are_ports(cls, address: str | None) -> str | None:
        if address is None or address.startswith(("unix:", "unix-abstract:")):
            return address
        _, colon, port = address.rpartition(":")
        if not (colon and port.isascii() and port.isdigit() and int(port) <= MOST_PORT):
            raise ValueError(f"must be HOST:PORT with a port of at most {MOST_PORT}, not {address!r}")
        return address  # gRPC takes what is above modulo 65536, and would listen elsewhere

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
