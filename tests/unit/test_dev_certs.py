"""Certificates to begin with: what they are good for, and for how long."""

import ipaddress
import stat
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from typer.testing import CliRunner

from cloud_server import cli
from cloud_server.dev_certs import make
from cloud_server.tls import TlsError, TlsFiles


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_server_is_valid_for_its_names_and_no_others(tmp_path: Path) -> None:
    ca, server, (client,) = make(tmp_path, ["cloud.example", "192.0.2.7", "::1"], ["alice"], 30)
    store = Store([load(ca)])

    def verified(subject: x509.GeneralName) -> bool:
        try:
            PolicyBuilder().store(store).build_server_verifier(subject).verify(load(server.cert), [])
        except VerificationError:
            return False
        return True

    for name in ("192.0.2.7", "::1"):
        assert verified(x509.IPAddress(ipaddress.ip_address(name)))
    assert verified(x509.DNSName("cloud.example"))
    assert not verified(x509.DNSName("other.example"))
    assert not verified(x509.IPAddress(ipaddress.ip_address("192.0.2.8")))
    left = load(server.cert).not_valid_after_utc - datetime.now(timezone.utc)
    assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
    purposes = [
        load(pair.cert).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        for pair in (server, client)
    ]
    assert list(purposes[0]) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert list(purposes[1]) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert load(client.cert).subject.rfc4514_string() == "CN=alice"


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    make(tmp_path / "certs", ["localhost"], ["alice"], 30)
    keys = list((tmp_path / "certs").glob("*.key"))
    assert len(keys) == 3 and all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)
    assert stat.S_IMODE((tmp_path / "certs").stat().st_mode) == 0o700


def test_renewing_keeps_the_ca(tmp_path: Path) -> None:
    ca, server, _ = make(tmp_path, ["localhost"], [], 30)
    before = ca.read_bytes(), server.cert.read_bytes()
    make(tmp_path, ["localhost"], ["bob"], 30)
    assert ca.read_bytes() == before[0] and server.cert.read_bytes() != before[1]
    load(tmp_path / "bob.pem").verify_directly_issued_by(load(ca))


def test_a_damaged_ca_is_not_replaced_silently(tmp_path: Path) -> None:
    make(tmp_path, ["localhost"], [], 30)
    (tmp_path / "ca.key").write_text("rubbish")
    with pytest.raises(ValueError, match="damaged"):
        make(tmp_path, ["localhost"], [], 30)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ValueError, match="damaged"):
        make(tmp_path, ["localhost"], [], 30)


@pytest.mark.parametrize("name", ["", "two words", "höst", "a/b", "http://host"])
def test_a_name_that_cannot_be_a_hosts(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="neither a host name"):
        make(tmp_path, [name], [], 30)


@pytest.mark.parametrize("name", ["", "server", "ca", "../x", "a b", "x" * 65])
def test_a_name_that_cannot_be_a_clients(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="client"):
        make(tmp_path, ["localhost"], [name], 30)


def test_the_command_says_how_to_use_them(tmp_path: Path) -> None:
    told = CliRunner().invoke(cli.app, ["cert", "dev", "--out", str(tmp_path), "--client", "laptop"])
    assert told.exit_code == 0, told.output
    assert (
        f"--tls-cert {tmp_path}/server.pem" in told.stdout
        and f"--client-cert {tmp_path}/laptop.pem" in told.stdout
    )
    names = (
        load(tmp_path / "server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    bad = CliRunner().invoke(cli.app, ["cert", "dev", "--out", str(tmp_path), "--name", "a b"])
    assert bad.exit_code == 1 and bad.stderr.startswith("error: 'a b' is neither")


# --- what a server makes of them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "server.pem").unlink(), "cannot read"),
        (lambda f: (f / "server.pem").write_text("x"), "no certificate in PEM"),
        (lambda f: (f / "server.key").write_text("x"), "no private key"),
        (
            lambda f: (f / "server.key").write_bytes((f / "ca.key").read_bytes()),
            "is not that of the certificate",
        ),
        (lambda f: (f / "ca.pem").write_text(""), "no certificate in PEM"),
        (lambda f: make(f, ["localhost"], [], -1), "expired on"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, spoil, words: str) -> None:
    ca, server, _ = make(tmp_path, ["localhost"], [], 30)
    TlsFiles(server.cert, server.key, ca)
    spoil(tmp_path)
    with pytest.raises(TlsError, match=words):
        TlsFiles(server.cert, server.key, ca)


def test_new_files_are_taken_and_unusable_ones_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca, server, _ = make(tmp_path, ["localhost"], [], 30)
    files = TlsFiles(server.cert, server.key, ca)
    assert files._news() is None, "nothing has changed"
    key = server.key.read_bytes()
    server.key.write_text("half")
    assert files._news() is None and files._news() is None
    assert len([r for r in caplog.records if "keeping the old" in r.message]) == 1
    server.key.write_bytes(key)
    assert files._news() is not None and files._news() is None
    make(tmp_path, ["localhost"], [], 30)
    assert files._news() is not None


def valid_from(folder: Path, since: datetime) -> bytes:
    """Return the server's certificate as its CA would have signed it for a day from then on."""
    old, ca = load(folder / "server.pem"), load(folder / "ca.pem")
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    anew = x509.CertificateBuilder(ca.subject, old.subject, old.public_key(), x509.random_serial_number())
    anew = anew.not_valid_before(since).not_valid_after(since + timedelta(days=1))
    return anew.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_certificate_of_tomorrow_is_taken_tomorrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then every edge would refuse it: the old one is shown."""
    _, server, _ = make(tmp_path, ["localhost"], [], 1)
    files, tomorrow = TlsFiles(server.cert, server.key, None), datetime.now(timezone.utc) + timedelta(days=1)
    server.cert.write_bytes(valid_from(tmp_path, tomorrow))
    for _ in range(2):  # handshakes
        assert files._news() is None
    assert caplog.text.count("keeping the old TLS certificate") == 1 and "is valid from" in caplog.text
    with pytest.raises(TlsError, match="set this machine's clock"):
        TlsFiles(server.cert, server.key, None)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Tomorrow":
            return cls.fromtimestamp((tomorrow + timedelta(hours=1)).timestamp(), tz)

    monkeypatch.setattr("cloud_server.tls.datetime", Tomorrow)
    assert files._news() is not None and files._news() is None  # without a change of the files, and once
