"""What an edge shows to a cloud, and by what it knows the cloud: TLS, client certificate, token.

A token is sent over TLS only, to a server whose certificate is good for the name it was called by. There
is no exception for loopback: while the cloud is down, any user of this machine could listen on its port.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from edge_client.config import TOKEN_VARIABLE, EdgeConfig, SettingsError

TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")  # what a bearer token may consist of (RFC 6750)
MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Credentials:
    """How to connect.

    Parameters
    ----------
    tls
        Whether to encrypt, and to insist on a certificate of the cloud.
    roots
        Certificates of the CAs that are trusted (PEM); None is the public ones.
    client_cert, client_key
        This edge's own certificate and key (PEM), where the cloud asks for one.
    token
        This edge's bearer token; needs ``tls``.

    Raises
    ------
    SettingsError
        If they do not go together. The message holds no token.
    """

    tls: bool = False
    roots: bytes | None = None
    client_cert: bytes | None = None
    client_key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what would send a token in clear, or what gRPC would only fail over later."""
        if (self.client_cert is None) != (self.client_key is None):
            raise SettingsError("client_cert and client_key go together")
        if not self.tls and (self.roots is not None or self.client_cert is not None):
            raise SettingsError("a client certificate and a CA need TLS")
        if self.token is not None and not self.tls:
            raise SettingsError(
                "a token is never sent without TLS, on loopback neither: give --tls-ca FILE, or --tls if the "
                "cloud's certificate is from a public CA, or no token"
            )
        if self.token is not None and TOKEN.fullmatch(self.token) is None:
            raise SettingsError("the token is none: expected one line of letters, digits and . _ ~ + / = -")

    @classmethod
    def of(cls, settings: EdgeConfig) -> "Credentials":
        """Read what the settings name.

        Raises
        ------
        SettingsError
            If a file is missing, or lies open to others, or the settings do not go together.
        """
        token: str | None = os.environ.get(TOKEN_VARIABLE)
        if settings.token_file is not None:
            token = _secret(settings.token_file)
        client_key = None if settings.client_key is None else _read(settings.client_key)
        return cls(
            tls=settings.tls or settings.tls_ca is not None,
            roots=None if settings.tls_ca is None else _pem(settings.tls_ca),
            client_cert=None if settings.client_cert is None else _pem(settings.client_cert),
            client_key=client_key,
            token=None if token is None else token.strip(),
        )

    def channel(self, target: str, options: Sequence[tuple[str, int | str]]) -> grpc.aio.Channel:
        """Return a channel to ``target``; call it where the event loop runs.

        gRPC refuses a certificate that is not for the target's host, or not from a trusted CA, before
        anything is sent, and never sends call credentials over a channel without TLS.
        """
        if not self.tls:
            return grpc.aio.insecure_channel(target, options=options)
        secure = grpc.ssl_channel_credentials(self.roots, self.client_key, self.client_cert)
        if self.token is not None:
            secure = grpc.composite_channel_credentials(
                secure, grpc.access_token_call_credentials(self.token)
            )
        return grpc.aio.secure_channel(target, secure, options=options)


def _secret(path: Path) -> str:
    raw = _read(path)
    if os.name == "posix" and path.expanduser().stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise SettingsError(f"everybody on this machine may read the token in {path}: chmod 600 {path}")
    return raw.decode("utf-8", "replace")


def _pem(path: Path) -> bytes:
    raw = _read(path)
    if b"-----BEGIN CERTIFICATE-----" not in raw:
        raise SettingsError(f"{path} holds no certificate in PEM")
    return raw


def _read(path: Path) -> bytes:
    try:
        with path.expanduser().open("rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None


def tls_problem(details: str, target: str) -> str | None:
    """Return what gRPC's words about a failed connection say of TLS, for people; None if nothing."""
    words, host = details.lower(), target.rpartition(":")[0]
    for sign, meaning in (
        ("hostname verification check failed", f"its certificate is not for {host}"),
        ("certificate has expired", "its certificate has expired (or this machine's clock is wrong)"),
        (
            "certificate is not yet valid",
            "its certificate is not valid yet (or this machine's clock is wrong)",
        ),
        (
            "certificate_verify_failed",
            "its certificate is not from a CA that is trusted here; --tls-ca names the right one",
        ),
        ("wrong_version_number", "it does not serve TLS"),
        ("tls handshake failed", "the TLS handshake failed"),
        (
            "socket closed",  # all that an edge sees of a cloud which refuses its certificate
            "it closed the connection; does it want a (another) certificate of this edge: --client-cert?",
        ),
    ):
        if sign in words:
            return meaning
    return None
