"""Settings of what an operator sees of a cloud: probes, logs and metrics."""

from typing import Literal

from pydantic import BaseModel, Field, field_validator

from cloud_server.logs import LogFormat

METRICS_ADDRESS = "127.0.0.1:9464"  # the port that OpenTelemetry has for Prometheus exporters
METRICS_OFF = "off"


class ObservationSettings(BaseModel):
    """Probes, logs and metrics."""

    health: str | None = Field(
        default=None,
        description="Where probes ask for gRPC's health check, and nothing else (HOST:PORT); none if absent",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Log detail")
    log_format: LogFormat = Field(default="text", description="Log lines: text, or one JSON object each")
    metrics: str | None = Field(
        default=None,
        description="Where Prometheus is answered (HOST:PORT, without asking who it is), or off; "
        f"{METRICS_ADDRESS} if absent and free",
    )

    @field_validator("metrics")
    @classmethod
    def _metrics_have_a_place(cls, value: str | None) -> str | None:
        if value is not None and value != METRICS_OFF:
            host_and_port(value)
        return value


def host_and_port(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT.

    Raises
    ------
    ValueError
        If it is none.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"metrics are served at HOST:PORT or {METRICS_OFF}, not {address!r}")
    return host, int(port)
