"""What a cloud serves beyond loopback: nothing in clear and nobody unknown, unless asked for by name."""

import logging
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloud_server import cli
from cloud_server.config.cloud import CloudConfig
from cloud_server.config.reading import load_config
from cloud_server.exposure import check_exposure, is_local

FILE = Path("any.pem")
TLS = {"tls_cert": FILE, "tls_key": FILE}


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.9.10:0", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("unix:/run/privatelora.sock", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("192.0.2.7:50051", False),
        ("[::ffff:192.0.2.7]:50051", False),
        ("no-such-host.invalid:50051", False),
        (":50051", False),
        ("127.0.0.1", False),
        ("ipv4:0.0.0.0:50051", False),
        ("dns:///localhost:50051", False),
        ("*:50051", False),  # every interface, to those who listen
        ("0:50051", False),
        ("127.1:50051", False),  # not sure: who resolves it may not be who listens
        ("127.0.0.1,0.0.0.0:50051", False),
    ],
)
def test_which_addresses_are_this_machines_alone(listen, local):
    assert is_local(listen) is local


def test_a_name_is_looked_up_as_those_who_listen_do(monkeypatch):
    def lookup(host, port, type, flags=0):
        place = ("0.0.0.0", port) if flags & socket.AI_PASSIVE else ("127.0.0.1", port)
        return [(socket.AF_INET, type, 6, "", place)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert not is_local("any.name:50051")


@pytest.mark.parametrize("flag", ["listen", "metrics", "health"])
def test_a_star_is_refused_and_what_to_write_instead_is_said(flag):
    with pytest.raises(ValueError, match=r"0\.0\.0\.0:50051 or \[::\]:50051"):
        CloudConfig(**{flag: "*:50051"})


def test_loopback_asks_for_nothing(caplog):
    check_exposure(CloudConfig())
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({}, "--tls-cert"),
        ({"tokens": FILE}, "--tls-cert"),
        ({"allow_anonymous": True}, "--tls-cert"),
        (TLS, "--tokens"),
        ({"allow_plaintext": True}, "--tokens"),
    ],
)
def test_beyond_loopback_what_is_missing_must_be_allowed_by_name(given, lacking):
    with pytest.raises(ValueError, match=lacking):
        check_exposure(CloudConfig(listen="0.0.0.0:1", **given))


@pytest.mark.parametrize(
    ("given", "warnings"),
    [
        (TLS | {"tokens": FILE}, []),
        (TLS | {"client_ca": FILE}, []),
        (TLS | {"allow_anonymous": True}, ["authentication"]),
        ({"tokens": FILE, "allow_plaintext": True}, ["TLS"]),
        ({"allow_plaintext": True, "allow_anonymous": True}, ["TLS", "authentication"]),
    ],
)
def test_what_was_allowed_by_name_is_warned_of(given, warnings, caplog):
    with caplog.at_level(logging.WARNING):
        check_exposure(CloudConfig(listen="0.0.0.0:1", **given))
    assert len(caplog.messages) == len(warnings)
    assert all(word in message for word, message in zip(warnings, caplog.messages, strict=True))


@pytest.mark.parametrize("given", [{"tls_cert": FILE}, {"tls_key": FILE}, {"client_ca": FILE}])
def test_half_of_tls_is_refused(given):
    with pytest.raises(ValueError, match="go together|needs tls_cert"):
        CloudConfig(**given)


def test_the_command_refuses_before_a_model_is_looked_for():
    told = CliRunner().invoke(cli.app, ["serve", "--listen", "0.0.0.0:0", "--model", "no such model"])
    assert told.exit_code == 1 and "--allow-plaintext" in told.stderr and "Traceback" not in told.output


def test_a_misspelt_setting_is_an_error(monkeypatch, tmp_path):
    file = tmp_path / "cloud.toml"
    file.write_text('token = "x"\n')
    with pytest.raises(ValueError, match="token"):
        load_config(file)
    monkeypatch.setenv("PRIVATELORA_CLOUD_TSL_CERT", "cert.pem")
    with pytest.raises(ValueError, match="PRIVATELORA_CLOUD_TSL_CERT"):
        load_config(None)
