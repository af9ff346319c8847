"""Clouds that are closed: one behind TLS and tokens, one behind client certificates; and keys to them."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.processes import CloudProcess
from cloud_server import dev_certs, tokens
from edge_client.connection import Connection, Timeouts
from edge_client.credentials import Credentials
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.integration.raw_edge import RawEdge
from tests.integration.served import TINY_PLANS


@dataclass
class Secured:
    """A cloud process that lets in only some, its certificates and its token file."""

    process: CloudProcess
    certs: Path
    tokens: Path | None = None
    metrics: str = ""  # where Prometheus is answered
    known: dict[str, str] = field(default_factory=dict, repr=False)  # tokens by name

    @property
    def address(self) -> str:
        return self.process.address

    def tls(self, client: str | None = None, folder: Path | None = None) -> grpc.ChannelCredentials:
        """Return credentials that trust the cloud, with a client's certificate from a folder of them."""
        ca = (self.certs / "ca.pem").read_bytes()
        if client is None:
            return grpc.ssl_channel_credentials(ca)
        own = folder or self.certs
        return grpc.ssl_channel_credentials(
            ca, (own / f"{client}.key").read_bytes(), (own / f"{client}.pem").read_bytes()
        )

    def with_token(self, token: str) -> grpc.ChannelCredentials:
        return grpc.composite_channel_credentials(self.tls(), grpc.access_token_call_credentials(token))

    def raw(self, who: str) -> RawEdge:
        """Return the channel of somebody who is let in."""
        if who in self.known:
            return RawEdge(self.address, self.with_token(self.known[who]))
        return RawEdge(self.address, self.tls(who))

    def newcomer(self, name: str) -> str:
        """Add a token while the cloud serves; return it."""
        assert self.tokens is not None
        self.known[name] = tokens.add(self.tokens, name)
        return self.known[name]


def certificates(
    folder: Path, *clients: str, names: tuple[str, ...] = ("127.0.0.1",), days: float = 1
) -> Path:
    """Make a CA, a server's certificate and clients'; return the folder."""
    dev_certs.make(folder, names, clients, days)
    return folder


def started(model: Path, certs: Path, *arguments: str, client: str | None = None, **env: str) -> Secured:
    """Start a cloud with the server certificate in ``certs``."""
    common = ["--kv-bytes", str(16 << 20), "--threads", "1", "--grace-period-s", "3600"]
    common += ["--plan", TINY_PLANS[0]]
    common += ["--cache-dir", str(model.with_name(f"{model.name}-cache")), "--log-level", "debug"]
    common += ["--tls-cert", str(certs / "server.pem"), "--tls-key", str(certs / "server.key"), *arguments]
    secured = Secured(None, certs)  # type: ignore[arg-type]
    secured.process = CloudProcess(
        str(model), arguments=common, log=certs / "log", credentials=secured.tls(client), env=env
    )
    return secured


def edge_describe(
    address: str, credentials: Credentials | None = None, connect_s: float = 60.0
) -> pb.DescribeResponse:
    """Ask as an edge does, which waits so long (seconds) for somebody to be there."""
    connection = Connection(address, Timeouts(connect_s=connect_s), credentials)
    try:
        return connection.describe()
    finally:
        connection.close()


class Impostor:
    """A server with a certificate of a test's choice, which counts what is called.

    It may be in clear (no ``certs``), or ask for certificates of the same CA.
    """

    def __init__(self, certs: Path | None, *, asks: bool = False) -> None:
        self.calls = 0
        impostor = self

        class Count(grpc.GenericRpcHandler):
            def service(self, _: grpc.HandlerCallDetails) -> None:
                impostor.calls += 1

        self._server = grpc.server(ThreadPoolExecutor(1))
        self._server.add_generic_rpc_handlers((Count(),))
        if certs is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            pair = ((certs / "server.key").read_bytes(), (certs / "server.pem").read_bytes())
            ca = (certs / "ca.pem").read_bytes() if asks else None
            keys = grpc.ssl_server_credentials([pair], ca, require_client_auth=asks)
            port = self._server.add_secure_port("127.0.0.1:0", keys)
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> "Impostor":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


class Relay:
    """A TCP relay on loopback that may spoil what an edge sends: whoever sits on the way can do as much."""

    def __init__(self, address: str) -> None:
        self._to = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.spoil = self.repeat = False
        self.seen: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._listener, *self._open):
            end.close()

    def cut(self) -> None:
        """Cut every connection there is; new ones are relayed."""
        ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                edge, _ = self._listener.accept()
            except OSError:
                return
            host, _, port = self._to.rpartition(":")
            cloud = socket.create_connection((host, int(port)))
            self._open += [edge, cloud]
            for pump in (self._up, self._down):
                threading.Thread(target=pump, args=(edge, cloud), daemon=True).start()

    def _up(self, edge: socket.socket, cloud: socket.socket) -> None:
        try:
            while raw := edge.recv(1 << 16):
                self.seen.append(raw)
                if self.spoil:
                    raw = raw[:-1] + bytes([raw[-1] ^ 1])
                cloud.sendall(raw * 2 if self.repeat else raw)
        except OSError:
            pass
        self._end(edge, cloud)

    def _down(self, edge: socket.socket, cloud: socket.socket) -> None:
        try:
            while raw := cloud.recv(1 << 16):
                edge.sendall(raw)
        except OSError:
            pass
        self._end(edge, cloud)

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
