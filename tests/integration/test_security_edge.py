"""What an edge refuses: a cloud whose certificate is not right is told nothing, no token above all."""

from pathlib import Path

import pytest

from benchmarks.processes import edge_json
from edge_client.config import EdgeConfig
from edge_client.connection import CloudConnectionError
from edge_client.credentials import Credentials
from tests.integration.secured import Impostor, Secured, certificates, edge_describe


def test_an_edge_with_its_token_is_let_in(shut: Secured, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(shut.known["bob"] + "\n")
    file.chmod(0o600)
    settings = EdgeConfig(cloud=shut.address, tls_ca=shut.certs / "ca.pem", token_file=file)
    assert edge_describe(shut.address, Credentials.of(settings)).plans
    with pytest.raises(CloudConnectionError, match="UNAUTHENTICATED.*--token-file"):
        edge_describe(shut.address, Credentials(tls=True, roots=(shut.certs / "ca.pem").read_bytes()))


def test_an_edge_generates_over_mtls(mutual: Secured) -> None:
    certs = mutual.certs
    flags = ["--tls-ca", f"{certs}/ca.pem"]
    flags += ["--client-cert", f"{certs}/bob.pem", "--client-key", f"{certs}/bob.key"]
    said = edge_json(
        "generate", "--cloud", mutual.address, "--prompt", "hi", "--max-new-tokens", "3",
        "--temperature", "0", "--cache-dir", str(certs / "edge-cache"), *flags,
    )  # fmt: skip
    assert said["tokens"]
    with mutual.raw("alice") as alice:
        assert alice.settled(), "the edge went without ending its session"


@pytest.mark.parametrize("host", ["other.example", "127.0.0.2"])
def test_a_server_certificate_for_another_host(guarded: Secured, tmp_path: Path, host: str) -> None:
    """The edge goes away before it says anything: no call, no token."""
    certs = certificates(tmp_path / "certs", names=(host,))
    with Impostor(certs) as impostor:
        roots = (certs / "ca.pem").read_bytes()
        with pytest.raises(CloudConnectionError, match="not for 127.0.0.1"):
            edge_describe(impostor.address, Credentials(tls=True, roots=roots, token=guarded.known["bob"]))
        assert impostor.calls == 0


def test_a_server_certificate_of_another_ca_or_an_expired_one(guarded: Secured, tmp_path: Path) -> None:
    token = guarded.known["bob"]
    for folder, days in (("other", 1.0), ("expired", -1 / 24)):
        certs = certificates(tmp_path / folder, days=days)
        roots = (guarded.certs if folder == "other" else certs) / "ca.pem"
        with Impostor(certs) as impostor:
            with pytest.raises(CloudConnectionError, match="certificate"):
                edge_describe(impostor.address, Credentials(tls=True, roots=roots.read_bytes(), token=token))
            assert impostor.calls == 0
