"""What an edge shows a cloud: nothing secret without TLS, and no secret in a message."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from edge_client import cli
from edge_client.config import EdgeConfig, SettingsError, load_config
from edge_client.credentials import Credentials, tls_problem

SECRET = "plora_" + "s3cr3t" * 7
PEM = b"-----BEGIN CERTIFICATE-----\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "ca.pem").write_bytes(PEM)
    (tmp_path / "token").write_text(f" {SECRET}\n")
    (tmp_path / "token").chmod(0o600)
    return tmp_path


def test_in_clear_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRIVATELORA_EDGE_TOKEN", raising=False)
    assert Credentials.of(EdgeConfig()) == Credentials() and not Credentials().tls


@pytest.mark.parametrize("cloud", ["127.0.0.1:50051", "localhost:1", "cloud.example:443"])
def test_a_token_is_never_sent_without_tls(files: Path, cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="never sent without TLS") as error:
        Credentials.of(EdgeConfig(cloud=cloud, token_file=files / "token"))
    assert SECRET not in str(error.value)
    monkeypatch.setenv("PRIVATELORA_EDGE_TOKEN", SECRET)
    with pytest.raises(SettingsError, match="never sent without TLS"):
        Credentials.of(EdgeConfig(cloud=cloud))


def test_the_token_is_from_the_file_else_from_the_environment(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVATELORA_EDGE_TOKEN", "another_token_for_tests")
    assert Credentials.of(EdgeConfig(tls=True)).token == "another_token_for_tests"
    found = Credentials.of(EdgeConfig(tls_ca=files / "ca.pem", token_file=files / "token"))
    assert found.tls and found.token == SECRET and found.roots == PEM


def test_settings_hold_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRIVATELORA_EDGE_TOKEN", SECRET)
    monkeypatch.setenv("PRIVATELORA_CONFIG_DIR", str(tmp_path))
    settings = load_config(None, tls=True)
    assert SECRET not in repr(settings) and SECRET not in settings.model_dump_json()
    assert SECRET not in repr(Credentials.of(settings))
    (tmp_path / "edge.toml").write_text(f'token = "{SECRET}"\n')
    with pytest.raises(SettingsError, match="token") as error:
        load_config(None)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "token", ["", "short", "two words of a token", SECRET + "\nX: y", "tökentökentöken" * 2]
)
def test_what_is_no_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(SettingsError, match="expected one line") as error:
        Credentials(tls=True, token=token)
    assert not token or token not in str(error.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602])
def test_a_token_file_that_everybody_may_read_is_refused(files: Path, mode: int) -> None:
    (files / "token").chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        Credentials.of(EdgeConfig(tls=True, token_file=files / "token"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"client_cert": "ca.pem", "tls": True}, "go together"),
        ({"client_key": "token", "tls": True}, "go together"),
        ({"client_cert": "ca.pem", "client_key": "token"}, "need TLS"),
        ({"tls_ca": "none.pem"}, "cannot read"),
        ({"tls_ca": "token"}, "no certificate"),
        ({"tls": True, "token_file": "none"}, "cannot read"),
    ],
)
def test_what_does_not_go_together_is_refused(files: Path, given: dict, words: str) -> None:
    paths = {key: value if value is True else files / value for key, value in given.items()}
    with pytest.raises(SettingsError, match=words):
        Credentials.of(EdgeConfig(**paths))


def test_commands_refuse_before_they_connect(files: Path) -> None:
    told = CliRunner().invoke(
        cli.app, ["info", "--cloud", "127.0.0.1:1", "--token-file", str(files / "token")]
    )
    assert told.exit_code == 2 and "never sent without TLS" in told.stderr and SECRET not in told.output


@pytest.mark.parametrize("command", ["info", "generate", "chat", "tune", "plan"])
def test_every_command_that_connects_has_the_flags_and_none_for_a_token_in_clear(command: str) -> None:
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for flag in ("--tls", "--tls-ca", "--token-file", "--client-cert", "--client-key"):
        assert flag in shown
    assert "--token " not in shown


FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:192.0.2.7:1: "
SSL = (
    FAILED
    + "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1: SSL routines:OPENSSL_internal:"
)


@pytest.mark.parametrize(  # as grpcio 1.85 says it; `tests/integration/test_security.py` meets them
    ("details", "words"),
    [
        (SSL + "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK", "--tls-ca"),
        (SSL + "CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", "expired"),
        (SSL + "WRONG_VERSION_NUMBER: Invalid certificate verification context: OK", "does not serve TLS"),
        (SSL + "SOMETHING_ELSE", "handshake failed"),
        (FAILED + "Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check "
         "failed.", "not for cloud.example"),
        (FAILED + "Socket closed", "--client-cert"),
    ],
)  # fmt: skip
def test_a_failed_handshake_is_said_in_words(details: str, words: str) -> None:
    said = tls_problem(details, "cloud.example:1")
    assert said is not None and words in said


def test_a_cloud_that_is_not_there_is_no_matter_of_tls() -> None:
    assert (
        tls_problem(FAILED + "Failed to connect to remote host: Connection refused", "cloud.example:1")
        is None
    )
