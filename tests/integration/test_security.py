"""Who does not belong: each way in that must be shut, tried on real processes over real TLS.

While each is tried an honest stream goes on, and afterwards all KV bytes are given back (`shut`, in
`conftest.py`). What an edge refuses is in `test_security_edge.py`.
"""

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.processes import run_edge
from cloud_server import tokens
from cloud_server.config.cloud import CloudConfig
from cloud_server.server import serve
from edge_client.connection import CloudConnectionError
from edge_client.credentials import Credentials
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.raw_edge import SERVICE, TIMEOUT_S, RawEdge
from tests.integration.raw_tune import RawTune
from tests.integration.secured import Relay, Secured, certificates, edge_describe, started

Code = grpc.StatusCode
STEP = [(0, 0, 4, 1)]
ENDS_WITHIN_S = 120.0  # seconds for a revoked token's streams to end; it takes about one


def refused_everywhere(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> list[str]:
    """Try every RPC but the health check's `Check`; return what was said to each."""
    said = []
    for method in ("Describe", "FetchEdgeParts", "Decode", "Tune"):
        call = channel.stream_stream(SERVICE + method)(iter([b""]), timeout=TIMEOUT_S, metadata=metadata)
        said.append(refusal(call))
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    said.append(refusal(stub.ServerReflectionInfo(requests, timeout=TIMEOUT_S, metadata=metadata)))
    watch = health_pb2_grpc.HealthStub(channel).Watch
    said.append(refusal(watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, metadata=metadata)))
    return said


def refusal(call: grpc.Call) -> str:
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() is Code.UNAUTHENTICATED, error.value
    return str(error.value.details())


# --- tokens ---------------------------------------------------------------------------------------------


def test_no_token(shut: Secured) -> None:
    with grpc.secure_channel(shut.address, shut.tls()) as channel:
        assert all("asks for a token" in words for words in refused_everywhere(channel))


def test_only_the_health_check_is_open(shut: Secured) -> None:
    with grpc.secure_channel(shut.address, shut.tls()) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_wrong_token(shut: Secured) -> None:
    right = shut.known["bob"]
    with grpc.secure_channel(shut.address, shut.tls()) as channel:
        for shown in (
            "Bearer nonsense",
            f"Bearer {right}x",
            f"Bearer {right[:-1]}",
            f"Bearer {right.lower()}",
        ):
            for words in refused_everywhere(channel, (("authorization", shown),)):
                assert "wrong or was revoked" in words and right not in words and shown[7:] not in words
        for shown in (right, f"Basic {right}", "Bearer", "Bearer  ", f"Bearer {right} {right}", "x" * 4000):
            refused_everywhere(channel, (("authorization", shown),))
        two = (("authorization", f"Bearer {right}"),) * 2
        assert all("one bearer token" in words for words in refused_everywhere(channel, two))


def test_a_revoked_token(shut: Secured) -> None:
    shut.newcomer("carol")
    with shut.raw("carol") as carol:  # known at once
        tokens.revoke(shut.tokens, "carol")
        for words in refused_everywhere(carol.channel):  # and no more, on the same connection
            assert "revoked" in words


def test_a_revoked_tokens_open_streams_end(shut: Secured) -> None:
    shut.newcomer("dave")
    with shut.raw("dave") as dave, shut.raw("bob") as bob:
        stream, tuning = dave.open(), RawTune(dave, "r8", pb.DTYPE_FLOAT32).open()
        stream.run(STEP)
        bobs = bob.open()
        bobs.run(STEP)
        used = bob.kv_used
        # Its deadline is the bound: the cloud has to end it before that.
        request = health_pb2.HealthCheckRequest()
        watch = health_pb2_grpc.HealthStub(dave.channel).Watch(request, timeout=ENDS_WITHIN_S)
        next(watch)
        before = len(shut.process.logs())
        tokens.revoke(shut.tokens, "dave")
        assert "token was revoked" in refusal(watch)
        for end in (stream.refused(), tuning.refused()):
            assert end.code is Code.UNAUTHENTICATED and "token was revoked" in end.message
        assert bob.settled(used * 2 // 3), "the revoked session's memory was kept"  # two others' are left
        log = shut.process.logs()[before:]
        assert "closed: identity" in log and "held to be resumed" not in log, "nobody may resume it"
        bobs.run([(0, 4, 1, 1)])
        bobs.finish()


def test_a_new_token_of_the_same_name_does_not_keep_the_old_ones_streams(shut: Secured) -> None:
    old = shut.newcomer("erin")
    with shut.raw("erin") as erin:
        stream = erin.open()
        stream.run(STEP)
        tokens.revoke(shut.tokens, "erin")
        assert shut.newcomer("erin") != old
        assert stream.refused().code is Code.UNAUTHENTICATED


# --- sessions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", ["guarded", "mutual"])
def test_another_identitys_session_id(cloud: str, request: pytest.FixtureRequest) -> None:
    secured: Secured = request.getfixturevalue(cloud)
    with secured.raw("alice") as alice, secured.raw("bob") as bob:
        stream = alice.open()
        stream.run(STEP)
        for _ in range(2):  # while it is connected, and when it is dropped
            end = bob.hello_refused(bob.hello(session_id=stream.opened.session_id))
            assert end.code is Code.NOT_FOUND
            words = end.message
            stream.drop()
        unknown = bob.hello_refused(bob.hello(session_id=os.urandom(16)))
        assert (unknown.code, unknown.message) == (Code.NOT_FOUND, words), "it tells which ids exist"
        again = alice.resumed(stream)
        assert list(again.opened.row_lengths) == [4]
        again.number = stream.number
        again.run([(0, 4, 1, 1)])
        again.finish()
        assert alice.settled()


def test_session_ids_cannot_be_guessed(guarded: Secured) -> None:
    with guarded.raw("alice") as alice:
        ids = []
        for _ in range(20):
            stream = alice.open()
            ids.append(stream.opened.session_id)
            stream.finish()
        assert all(len(i) >= 16 for i in ids) and len(set(ids)) == 20
        assert all(len({i[at] for i in ids}) > 5 for at in range(16)), "some bytes are the same in all"


def test_a_step_replayed_with_other_bytes(shut: Secured) -> None:
    """The number of a step is used up; nothing that follows it can change what it did."""
    with shut.raw("bob") as bob:
        one, two = bob.open(), bob.open()
        h0 = [[0.5] * 48] * 4
        first = one.run(STEP, h0)
        assert (two.run(STEP, h0) == first).all()
        one.step(STEP, [[0.25] * 48] * 4, step=1)
        end = one.refused()
        assert end.code is Code.INVALID_ARGUMENT and "not above the last one" in end.message
        again = bob.resumed(one)
        assert list(again.opened.row_lengths) == [4]
        again.number, more = 1, [[0.75] * 48]
        kept, expected = again.run([(0, 4, 1, 1)], more), two.run([(0, 4, 1, 1)], more)
        assert (kept == expected).all(), "the replayed bytes changed what the session holds"
        for stream in (again, two):
            stream.finish()


@pytest.mark.parametrize("how", ["spoil", "repeat"])
def test_bytes_changed_or_repeated_on_the_way(shut: Secured, how: str) -> None:
    credentials = shut.with_token(shut.known["bob"])
    with Relay(shut.address) as relay, shut.raw("bob") as direct, RawEdge(relay.address, credentials) as bob:
        stream = bob.open()
        stream.run(STEP)
        setattr(relay, how, True)
        stream.step([(0, 4, 1, 1)])
        assert stream.refused().code is Code.UNAVAILABLE
        again = direct.resumed(stream)
        assert list(again.opened.row_lengths) == [4], "spoilt or repeated bytes were taken for a step"
        again.finish()


# --- TLS ------------------------------------------------------------------------------------------------


def cannot_connect(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    with pytest.raises(grpc.RpcError) as error:
        RawEdge(address, credentials)
    assert error.value.code() is Code.UNAVAILABLE, error.value
    return str(error.value.details())


def test_plaintext_to_a_tls_port(shut: Secured) -> None:
    cannot_connect(shut.address, None)
    host, _, port = shut.address.rpartition(":")
    for raw in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", os.urandom(2000), b""):
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as plain:
            plain.sendall(raw)
            plain.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1 200" not in plain.recv(1 << 16)
    with pytest.raises(CloudConnectionError, match="--tls"):
        edge_describe(shut.address, connect_s=5.0)  # all of which it waits for somebody to speak in clear


def test_no_client_certificate(shut_mutual: Secured) -> None:
    cannot_connect(shut_mutual.address, shut_mutual.tls())


def test_an_expired_client_certificate(shut_mutual: Secured) -> None:
    certificates(shut_mutual.certs, "late", days=-1 / 24)  # by the CA that is trusted; the server's are read
    certificates(shut_mutual.certs, days=1)
    cannot_connect(shut_mutual.address, shut_mutual.tls("late"))


def test_a_client_certificate_from_another_ca(shut_mutual: Secured, tmp_path: Path) -> None:
    other = certificates(tmp_path / "other", "alice")
    cannot_connect(shut_mutual.address, shut_mutual.tls("alice", other))


def test_a_servers_certificate_is_no_clients(shut_mutual: Secured) -> None:
    cannot_connect(shut_mutual.address, shut_mutual.tls("server"))


def test_a_certificate_that_expires_ends_its_streams(shut_mutual: Secured) -> None:
    with contextlib.ExitStack() as held:
        for seconds in (20, 60, 180):  # a slow machine may not get in before it expires
            certificates(shut_mutual.certs, "brief", days=seconds / 86_400)
            certificates(shut_mutual.certs, days=1)  # the server's lasts
            try:
                brief = held.enter_context(RawEdge(shut_mutual.address, shut_mutual.tls("brief")))
                stream = brief.open()
                stream.run(STEP)
                break
            except grpc.RpcError as error:
                assert error.code() in (Code.UNAVAILABLE, Code.UNAUTHENTICATED), error
        else:
            pytest.fail("nobody is let in with a certificate that will expire soon")
        end = stream.refused()
        assert end.code is Code.UNAUTHENTICATED and "certificate expired" in end.message


def test_a_cloud_does_not_start_with_an_expired_certificate(tmp_path: Path) -> None:
    certs = certificates(tmp_path, days=-1 / 24)
    config = CloudConfig(model="not looked for", tls_cert=certs / "server.pem", tls_key=certs / "server.key")
    with pytest.raises(ValueError, match="expired on"):
        asyncio.run(serve(config, lambda address, service: None))


def test_a_new_certificate_is_taken_without_a_restart(small_model: Path, tmp_path: Path) -> None:
    secured = started(small_model, certificates(tmp_path))
    with secured.process:
        trust = secured.tls()
        with RawEdge(secured.address, trust) as before:
            stream = before.open()
            stream.run(STEP)
            (tmp_path / "server.key").write_text("half of it")  # a slip: the old one stays
            RawEdge(secured.address, trust).channel.close()
            for name in ("ca.pem", "ca.key"):
                (tmp_path / name).unlink()
            certificates(tmp_path)  # by another CA
            cannot_connect(secured.address, trust)
            with RawEdge(secured.address, secured.tls()) as after:
                assert after.kv_used > 0
            stream.run([(0, 4, 1, 1)])  # who is connected stays so
            stream.finish()
        assert "keeping the old TLS certificate" in secured.process.logs()


# --- what is written down -------------------------------------------------------------------------------


def test_no_token_in_a_log(guarded: Secured, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not in the cloud's at its most talkative, not in the edge's, whatever goes wrong."""
    right, wrong = guarded.known["bob"], "plora_" + "w" * 43
    file, wrong_file = tmp_path / "right", tmp_path / "wrong"
    for path, token in ((file, right), (wrong_file, wrong)):
        path.write_text(token)
        path.chmod(0o600)
    ca = str(guarded.certs / "ca.pem")
    told = []
    talkative = {"GRPC_VERBOSITY": "info"}
    for words, status in (
        (["--tls-ca", ca, "--token-file", str(file)], 0),
        (["--tls-ca", ca, "--token-file", str(wrong_file), "--debug"], 1),
    ):
        done = run_edge("info", "--cloud", guarded.address, *words, env=talkative)
        assert done.returncode == status, done.stderr
        told += [done.stdout, done.stderr]
    with caplog.at_level(logging.DEBUG), pytest.raises(CloudConnectionError):
        roots = Path(ca).read_bytes()
        edge_describe(guarded.address, Credentials(tls=True, roots=roots, token=wrong))
    told += [caplog.text, repr(Credentials(tls=True, token=right)), guarded.process.logs()]
    for token in (*guarded.known.values(), wrong):
        for text in told:
            assert token not in text and tokens.digest(token).hex() not in text
    assert "refused /privatelora.v1.PrivateLoraService/Describe" in told[-1], "the refusal itself is logged"
