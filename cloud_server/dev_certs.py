"""A small CA for development and private networks: one folder of PEM files.

Elliptic-curve keys (P-256, which every TLS library takes). The CA signs servers and clients, nothing else;
its key stays in the folder, so whoever reads that folder can be any of them. For a cloud on the internet
take the server's certificate from a public CA instead; a CA of one's own suits its clients there too.
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.cache import locked, replacing

CA_DAYS = 3650
CLOCK_SKEW = timedelta(minutes=5)  # machines whose clock is a little slow must not find them not valid yet


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, where they lie."""

    cert: Path
    key: Path


def make(
    folder: Path, names: Sequence[str], clients: Sequence[str], days: float
) -> tuple[Path, Pair, list[Pair]]:
    """Write a CA (kept if it is there already), a server's certificate and those of clients.

    Parameters
    ----------
    folder
        Made if need be, for its owner alone.
    names
        Host names and IP addresses by which edges reach the server: its subject alternative names.
    clients
        Names that clients are known by (their common names).
    days
        How long the server's and the clients' certificates are valid (days).

    Returns
    -------
    tuple
        The CA's certificate, the server's pair, a pair for each client.

    Raises
    ------
    ValueError
        If a name cannot be one, or the CA in the folder is damaged.
    """
    general = [_general_name(name) for name in names]
    if not general:
        raise ValueError("a server certificate needs at least one name")
    for client in clients:
        if not client or len(client) > 64 or not all(c.isalnum() or c in "._@-" for c in client):
            raise ValueError(f"{client!r} cannot be a client's name: letters, digits and . _ @ -, at most 64")
        if client in ("ca", "server"):
            raise ValueError(f"a client cannot be called {client!r}: that file is another one")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(folder / "ca.pem"):
        ca, ca_key = _authority(folder)
    server = _issue(folder, "server", ca, ca_key, days, general, ExtendedKeyUsageOID.SERVER_AUTH)
    made = [_issue(folder, c, ca, ca_key, days, [], ExtendedKeyUsageOID.CLIENT_AUTH) for c in clients]
    return folder / "ca.pem", server, made


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    cert_path, key_path = folder / "ca.pem", folder / "ca.key"
    if cert_path.exists() or key_path.exists():
        try:
            cert = x509.load_pem_x509_certificate(cert_path.read_bytes())
            key = serialization.load_pem_private_key(key_path.read_bytes(), None)
            theirs, _ = cert.public_key(), cert.subject  # looked into only when it is asked
        except (ValueError, TypeError, FileNotFoundError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise ValueError(
                f"the CA in {folder} is damaged; delete ca.pem and ca.key to begin anew"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != theirs:
            raise ValueError(f"{key_path} is not the key of {cert_path}; delete both to begin anew")
        return cert, key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"PrivateLoRA development CA {os.urandom(4).hex()}")]
    )
    usage = _usage(key_cert_sign=True, crl_sign=True)
    cert = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(Pair(cert_path, key_path), cert, key)
    return cert, key


def _issue(
    folder: Path,
    name: str,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: float,
    alternatives: list[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    _write(pair, builder.sign(ca_key, hashes.SHA256()), key)
    return pair


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_SKEW)
        .not_valid_after(end)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    kinds = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{kind: allowed.get(kind, False) for kind in kinds.split()})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not name or not name.isascii() or not all(c.isalnum() or c in ".-_*" for c in name):
        raise ValueError(f"{name!r} is neither a host name nor an IP address (international names: punycode)")
    return x509.DNSName(name)


def _write(pair: Pair, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    """Replace both files; a server that reads them between the two keeps the old ones until they fit."""
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with replacing(pair.key) as file:  # of mode 0600
        file.write(secret)
    with replacing(pair.cert) as file:
        file.write(cert.public_bytes(serialization.Encoding.PEM))
    pair.cert.chmod(0o644)
