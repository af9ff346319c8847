"""Reading the settings of a cloud: flags over environment over a TOML file. Unknown keys are errors."""

import os
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from cloud_server.config.cloud import ENV_PREFIX, CloudConfig


class ConfigError(ValueError):
    """Settings that cannot be read: a file that is no TOML, or variables that are unknown."""


def load_config(file: Path | None, **flags: object) -> CloudConfig:
    """Return the configuration from a TOML file, the environment and flags that were given.

    Raises
    ------
    pydantic.ValidationError
        On unknown keys or values out of range.
    ConfigError
        If the file is no TOML, or on unknown environment variables: one letter wrong must not switch TLS off
        unnoticed.
    FileNotFoundError
        If the file is missing.
    """
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"no configuration file at {file}")

    known = {ENV_PREFIX + name.upper() for name in CloudConfig.model_fields}
    names = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if strange := [name for name in names if name.partition("__")[0] not in known]:
        raise ConfigError(f"unknown environment variable {strange[0]}; known: {', '.join(sorted(known))}")

    class FromFile(CloudConfig):
        model_config = SettingsConfigDict(**{**CloudConfig.model_config, "toml_file": file})

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        read = FromFile(**given)  # type: ignore[arg-type]
    except ValidationError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file or 'settings'}: {str(error)[:300]}") from None
    return FromFile.model_validate(read.model_dump())
