"""Settings of who is let in, and of who can read along: TLS, client certificates, tokens.

That nothing listens beyond loopback in clear, or for everybody, unless it is said so, is the rule of
`cloud_server.exposure`.
"""

from pathlib import Path

from pydantic import BaseModel, Field, model_validator


class SecuritySettings(BaseModel):
    """TLS, client certificates and tokens."""

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

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "SecuritySettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.client_ca is not None and self.tls_cert is None:
            raise ValueError("client_ca needs tls_cert and tls_key: client certificates are part of TLS")
        return self
