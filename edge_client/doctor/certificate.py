"""Whether the connection is as it was set: encrypted to the right cloud, with what it asks of this edge.

Python's own TLS speaks here, as gRPC says little about why it does not connect. It trusts what gRPC would:
the CA file of the settings, or gRPC's own list of public CAs. No token is sent.
"""

import contextlib
import ipaddress
import os
import pkgutil
import socket
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509

from edge_client.config import SettingsError
from edge_client.credentials import Credentials
from edge_client.doctor.finding import Exam, Finding, failed, ok, warning

SOON = timedelta(days=14)
# How an HTTP/2 client begins: whoever accepts this edge answers, whoever does not says why.
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
# OpenSSL's X509_V_ERR_*: what is wrong with a certificate.
NOT_YET, EXPIRED, NAMES = 9, 10, (62, 64)
CLIENT_FLAGS = "--client-cert FILE and --client-key FILE"


def keys(exam: Exam) -> Finding:
    """Read the files that the settings name, and this edge's own certificate."""
    settings = exam.settings
    exam.credentials = Credentials.of(settings)
    shown = []
    if settings.client_cert is not None and settings.client_key is not None:
        own = x509.load_pem_x509_certificate(exam.credentials.client_cert or b"")
        name, until = own.subject.rfc4514_string(), own.not_valid_after_utc
        renew = f"renew {settings.client_cert}: its issuer is {own.issuer.rfc4514_string()}"
        if until < _now():
            return failed(f"this edge's certificate ({name}) expired on {until:%Y-%m-%d %H:%M} UTC", renew)
        if own.not_valid_before_utc > _now():
            since = own.not_valid_before_utc
            return failed(
                f"this edge's certificate ({name}) is valid from {since:%Y-%m-%d %H:%M} UTC only, and it is "
                f"{_now():%Y-%m-%d %H:%M} UTC here",
                "set this machine's clock",
            )
        _context(exam)  # whether key and certificate belong together
        if until < _now() + SOON:
            return warning(f"this edge's certificate ({name}) expires on {until:%Y-%m-%d %H:%M} UTC", renew)
        shown.append(f"a certificate ({name}, until {until:%Y-%m-%d})")
    if exam.credentials.token is not None:
        shown.append("a token")
    return ok(f"this edge can show {' and '.join(shown) or 'nothing, neither token nor certificate'}")


def tls(exam: Exam) -> Finding:
    """Shake hands as the settings say, and look whether the cloud goes on from there."""
    if not exam.credentials.tls:
        return _in_clear(exam)
    context = _context(exam)
    context.set_alpn_protocols(["h2"])
    secure: ssl.SSLSocket | None = None
    try:
        with _connected(exam) as plain, context.wrap_socket(plain, server_hostname=exam.host) as secure:
            shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
            speaks, version = secure.selected_alpn_protocol(), secure.version()
            secure.sendall(GREETING)
            if not secure.recv(1):
                raise ConnectionResetError
    except ssl.SSLCertVerificationError as error:
        return _not_trusted(exam, error.verify_code)
    except (ssl.SSLError, OSError) as error:
        reason = str(getattr(error, "reason", "") or "")
        if secure is None and "ALERT" not in reason:
            return failed(
                f"no TLS on port {exam.port} of {exam.host} ({reason or error})",
                "if the cloud serves in clear, leave --tls and --tls-ca away (a token cannot be sent then); "
                "else start it with --tls-cert and --tls-key",
            )
        return _refused(exam, reason)
    return _good(exam, shown, speaks, version)


def _good(exam: Exam, shown: x509.Certificate, speaks: str | None, version: str | None) -> Finding:
    until = shown.not_valid_after_utc
    says = f"{version} with a certificate {_described(shown)}"
    facts = {
        "names": _names(shown),
        "not_before": shown.not_valid_before_utc.isoformat(),
        "not_after": until.isoformat(),
        "issuer": shown.issuer.rfc4514_string(),
    }
    if speaks != "h2":
        return failed(
            f"{says}, but what answers does not speak HTTP/2 (ALPN: {speaks})",
            "a proxy in front has to pass gRPC on: switch HTTP/2 on there",
            **facts,
        )
    if until < _now() + SOON:
        days = (until - _now()).days
        return warning(
            f"{says}: in {days} days",
            "renew it in the cloud (`privatelora-cloud cert dev` again, or your CA); no restart is needed",
            **facts,
        )
    return ok(says, **facts)


def _in_clear(exam: Exam) -> Finding:
    """Say that nothing is encrypted; whether that is what the cloud speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError):  # ssl.SSLError is one; any is what is hoped for here
        with _connected(exam) as plain, context.wrap_socket(plain):
            pass
        shown = _certificate(exam)
        of = f" with a certificate {_described(shown)}" if shown is not None else ""
        return failed(
            f"the cloud serves TLS{of}, and this edge is set to speak in clear",
            "give --tls-ca FILE with the CA of the cloud's certificate, or --tls if that is a public one",
        )
    try:
        loopback = ipaddress.ip_address(exam.host).is_loopback
    except ValueError:
        loopback = exam.host == "localhost"
    if loopback:
        return ok("in clear, which stays on this machine")
    return warning(
        f"in clear: everybody on the way to {exam.host} reads along and may change what is sent",
        "serve TLS (`privatelora-cloud cert dev` to begin with), unless the network itself is private",
    )


def _not_trusted(exam: Exam, code: int) -> Finding:
    """Say why this edge does not trust the certificate that it is shown."""
    shown = _certificate(exam)
    described = "" if shown is None else f" It is {_described(shown)}"
    here = f"{_now():%Y-%m-%d %H:%M} UTC here"
    if code == EXPIRED:
        return failed(
            f"the cloud's certificate (or its CA's) has expired; it is {here}.{described}",
            "renew it in the cloud (`privatelora-cloud cert dev` again, or your CA), or set this machine's "
            "clock if it is wrong",
        )
    if code == NOT_YET:
        return failed(
            f"the cloud's certificate is not valid yet; it is {here}.{described}",
            "set this machine's clock, or that of the machine which made the certificate",
        )
    if code in NAMES:
        return failed(
            f"the cloud's certificate is not for {exam.host}.{described}",
            "call the cloud by a name that its certificate has, or make one with this name too "
            f"(`privatelora-cloud cert dev --name {exam.host} ...`)",
        )
    given = exam.settings.tls_ca
    return failed(
        f"the cloud's certificate is not from a CA in {given or 'the list of public ones'}.{described}",
        "give the file of that CA with --tls-ca, brought here by a safe way; if the cloud never had such a "
        "certificate, somebody may be answering in its place",
    )


def _refused(exam: Exam, reason: str) -> Finding:
    """Say why a cloud hangs up on this edge: TLS alerts are terse, gRPC's clouds give none at all."""
    own = exam.settings.client_cert
    alert = f" ({reason.lower().replace('_', ' ')})" if reason else ""
    if own is None:
        return failed(
            f"the cloud ends the connection{alert}; most likely it asks for a client certificate",
            f"give {CLIENT_FLAGS}; its operator makes them (`privatelora-cloud cert dev --client NAME`)",
        )
    return failed(
        f"the cloud ends the connection{alert}; most likely it does not take the certificate in {own}",
        f"give {CLIENT_FLAGS} of a CA that the cloud was started with (--client-ca), made for clients",
    )


def _context(exam: Exam) -> ssl.SSLContext:
    """Return a context with what this edge trusts and shows.

    Raises
    ------
    SettingsError
        If a file cannot be used.
    """
    settings = exam.settings
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    roots = exam.credentials.roots if settings.tls_ca is not None else _public_roots()
    try:
        context.load_verify_locations(cadata=roots.decode("ascii", "ignore") if roots else None)
    except ssl.SSLError:
        raise SettingsError(
            f"{settings.tls_ca} holds no certificate that can be read; copy it anew"
        ) from None
    if settings.client_cert is not None and settings.client_key is not None:
        cert, key = settings.client_cert.expanduser(), settings.client_key.expanduser()
        try:
            context.load_cert_chain(cert, key, password=lambda: "")
        except ssl.SSLError as error:
            raise SettingsError(
                f"{key} is not the key of {cert}, or encrypted ({error.reason}); give the pair that belongs "
                "together"
            ) from None
    return context


def _public_roots() -> bytes | None:
    given = os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
    return Path(given).read_bytes() if given else pkgutil.get_data("grpc", "_cython/_credentials/roots.pem")


def _connected(exam: Exam) -> socket.socket:
    return socket.create_connection((exam.host, exam.port), min(5.0, exam.settings.connect_timeout_s))


def _certificate(exam: Exam) -> x509.Certificate | None:
    """Return the certificate that is shown there, whether it is trusted or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with _connected(exam) as plain, context.wrap_socket(plain, server_hostname=exam.host) as secure:
            return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _described(certificate: x509.Certificate) -> str:
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return (
        f"for {', '.join(_names(certificate)) or 'nobody'}, from {since:%Y-%m-%d %H:%M} to "
        f"{until:%Y-%m-%d %H:%M} UTC, of {certificate.issuer.rfc4514_string()}"
    )


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    hosts = names.get_values_for_type(x509.DNSName)
    return [*hosts, *map(str, names.get_values_for_type(x509.IPAddress))]


def _now() -> datetime:
    return datetime.now(timezone.utc)
