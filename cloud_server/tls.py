"""The cloud's certificate and key, and the CA of its clients: files that may be replaced while it serves."""

import logging
import os
import stat
from datetime import datetime, timezone
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

log = logging.getLogger(__name__)


class TlsError(ValueError):
    """Certificate files that cannot be used; the message says which and why."""


class NotYetError(TlsError):
    """A certificate that will be good, and is not now."""


class TlsFiles:
    """What the server shows and asks for in TLS handshakes, as the files are now.

    Parameters
    ----------
    cert
        The server's certificate, followed by those between it and its CA (PEM).
    key
        Its private key (PEM, not encrypted).
    client_ca
        Certificates of the CAs whose clients are let in (PEM); None asks clients for no certificate.

    Raises
    ------
    TlsError
        If a file cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = [path for path in (cert, key, client_ca) if path is not None]
        self.asks_for_certificates = client_ca is not None
        self._tried, self._current = self._state(), self._read()
        self._waits: tuple[tuple[int, ...] | None, ...] | None = None  # the files that are not good yet

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow the files.

        gRPC asks for news at every handshake, on a thread of its own; connections that are open stay as
        they are.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._current,
            self._news,  # type: ignore[arg-type]  # None is "no news", which the stubs do not know
            require_client_authentication=self.asks_for_certificates,
        )

    def _news(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold if that has changed and can be used, else None."""
        state = self._state()
        if state == self._tried:
            return None
        try:
            current = self._read()
        except NotYetError as error:  # looked at in each handshake: it becomes good without a change
            if state != self._waits:
                log.error("keeping the old TLS certificate for now: %s", error)
            self._waits = state
            return None
        except TlsError as error:  # such as a certificate without its key yet: the next change is tried again
            self._tried = state
            log.error("keeping the old TLS certificate: %s", error)
            return None
        self._tried, self._current = state, current
        log.info("read the TLS files again")
        return self._current

    def _state(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(_state(path) for path in self._paths)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key, *client_ca = self._paths
        chain, secret = _contents(cert), _contents(key)
        _check_pair(chain, cert, secret, key)
        for path in client_ca:
            _certificates(_contents(path), path)
        return grpc.ssl_server_certificate_configuration(
            [(secret, chain)], root_certificates=_contents(client_ca[0]) if client_ca else None
        )


def _check_pair(chain: bytes, cert: Path, secret: bytes, key: Path) -> None:
    """Refuse what every handshake would fail over."""
    first = _certificates(chain, cert)[0]
    try:
        own = serialization.load_pem_private_key(secret, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the second if it is encrypted
        raise TlsError(f"{key} holds no private key in PEM, or an encrypted one") from None
    try:  # a certificate is looked into only when it is asked
        theirs, since = first.public_key(), first.not_valid_before_utc
        until = first.not_valid_after_utc
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise TlsError(f"the certificate in {cert} is damaged") from None
    if own != theirs:
        raise TlsError(f"the key in {key} is not that of the certificate in {cert}")
    now = datetime.now(timezone.utc)
    if since > now:
        raise NotYetError(
            f"the certificate in {cert} is valid from {since:%Y-%m-%d %H:%M} UTC only, and it is "
            f"{now:%Y-%m-%d %H:%M} UTC here: wait, take another, or set this machine's clock"
        )
    if until < now:
        raise TlsError(f"the certificate in {cert} expired on {until:%Y-%m-%d %H:%M} UTC")
    if key.stat().st_mode & stat.S_IROTH:
        log.warning("everybody on this machine may read the private key: chmod 600 %s", key)


def _certificates(raw: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(raw)
    except (ValueError, x509.InvalidVersion):  # the second is no ValueError
        raise TlsError(f"{path} holds no certificate in PEM") from None


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from None


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
