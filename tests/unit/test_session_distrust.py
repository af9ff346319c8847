"""A cloud that breaks the protocol of a session: the edge says at once what was wrong (real channel)."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from edge_client.connection import CloudConnectionError, Connection, Timeouts
from edge_client.parts import fetch
from edge_client.personal import PersonalWeights
from edge_client.session import Session, Span
from edge_client.streams import MAX_RETRY_AFTER_S, SessionError
from shared import wire
from shared.adapter import Adapter
from shared.edge_parts import EdgePart, EdgePartsError
from shared.fingerprint import Fingerprint
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

PLAN = Plan.subset((0, 2), name="p", backbone="b", num_layers=4, hidden_size=6, rank=2)
NOTHING = Fingerprint(plan=bytes(32), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))
OPENED = pb.DecodeResponse(opened=pb.Opened(session_id=b"1"))
TOKENS = 3
Script = Callable[[pb.Step, grpc.ServicerContext], Iterable[pb.DecodeResponse | bytes]]


class LyingCloud(grpc.GenericRpcHandler):
    """A server that answers the first step, or a fetch, as a test's script says."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.server = grpc.server(ThreadPoolExecutor(4))
        self.server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("Decode"):
            return grpc.stream_stream_rpc_method_handler(self.decode)
        return grpc.unary_stream_rpc_method_handler(lambda _, context: self.say(pb.Step(), context))

    def decode(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield OPENED.SerializeToString()
        yield from self.say(pb.DecodeRequest.FromString(next(requests)).step, context)
        for _ in requests:  # until the edge leaves
            pass

    def say(self, step: pb.Step, context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in self.script(step, context):
            yield message if isinstance(message, bytes) else message.SerializeToString()


@pytest.fixture
def talk() -> Iterator[Callable[[Script], Connection]]:
    with ExitStack() as stack:

        def start(script: Script) -> Connection:
            cloud = LyingCloud(script)
            stack.callback(cloud.server.stop, 0)
            connection = Connection(cloud.address, Timeouts(connect_s=60, step_s=120))
            stack.callback(connection.close)
            return connection

        yield start


def open_session(connection: Connection) -> Session:
    personal = PersonalWeights(Adapter.zeros(PLAN, NOTHING))
    limits = pb.Limits(max_step_tokens=64, max_steps_in_flight=8)
    return connection.open_session(personal, pb.Fingerprint(), WireDtypes.all(pb.DTYPE_FLOAT32), limits)


def tensor(*shape: int, value: float = 0.0) -> pb.Tensor:
    return wire.encode(torch.full(shape, value), pb.DTYPE_FLOAT32)


def codes(step: pb.Step, layer: int) -> pb.DecodeResponse:
    return pb.DecodeResponse(
        codes=pb.Codes(step=step.step, layer=layer, codes=tensor(TOKENS, PLAN.codes_width))
    )


def hidden(step: pb.Step, found: pb.Tensor) -> pb.DecodeResponse:
    return pb.DecodeResponse(hidden=pb.Hidden(step=step.step, hidden=found))


def aborting(message: str, *trailers: tuple[str, str]) -> Script:
    def script(step: pb.Step, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.set_trailing_metadata(trailers)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        yield b""

    return script


LIES: dict[str, tuple[Script, str]] = {
    "too many hidden states": (lambda s, _: [hidden(s, tensor(2, 6))], r"hidden: shape is \(2, 6\)"),
    "hidden states too wide": (lambda s, _: [hidden(s, tensor(1, 7))], r"hidden: shape is \(1, 7\)"),
    "NaN": (lambda s, _: [hidden(s, tensor(1, 6, value=np.nan))], "hidden: holds NaN or infinity"),
    "one layer again": (lambda s, _: [codes(s, 0), codes(s, 0)], "codes for layer 0 after those of layer 0"),
    "a layer before": (lambda s, _: [codes(s, 2), codes(s, 0)], "codes for layer 0 after those of layer 2"),
    "a layer of its own": (lambda s, _: [codes(s, 1)], "layer 1, which does not exchange"),
    "no message": (lambda s, _: [b"\xff\xff"], "2 bytes that are no message"),
    "another step": (lambda s, _: [codes(pb.Step(step=9), 0)], "step 9, which was never sent"),
    "a hint of 4,000 digits": (aborting("full", ("retry-after-ms", "9" * 4000)), "full"),
    "a hint of 400 digits": (aborting("full", ("retry-after-ms", "9" * 400)), "full"),
}


@pytest.mark.parametrize(("script", "words"), LIES.values(), ids=LIES)
def test_what_a_cloud_must_not_say(talk: Callable, script: Script, words: str) -> None:
    session = open_session(talk(script))
    with pytest.raises(SessionError, match=words) as refusal:
        session.step(torch.zeros(TOKENS, 6), [Span(0, 0, TOKENS, 1)])
    assert (refusal.value.retry_after_s or 0) <= MAX_RETRY_AFTER_S


def test_a_refusal_cannot_steer_a_terminal(talk: Callable) -> None:
    session = open_session(talk(aborting("no\x1b[2J\x1b]0;owned\x07 room\r\nerror: all is well")))
    with pytest.raises(SessionError, match="no") as refusal:
        session.step(torch.zeros(TOKENS, 6), [Span(0, 0, TOKENS, 1)])
    assert str(refusal.value).endswith("no[2J]0;owned room error: all is well")


def test_a_part_of_empty_pieces(talk: Callable, tmp_path: Any) -> None:
    def endless(*_: Any) -> Iterator[pb.FetchEdgePartsResponse]:
        while True:
            yield pb.FetchEdgePartsResponse()

    part = EdgePart("config.json", None, 10, bytes(32))
    with pytest.raises(EdgePartsError, match="empty pieces"):
        fetch(talk(endless), [part], tmp_path, progress=False)


def test_a_fetch_that_is_refused_cannot_steer_a_terminal(talk: Callable) -> None:
    with pytest.raises(CloudConnectionError, match="no") as refusal:
        list(talk(aborting("no\x1b[2J")).fetch_part(0))
    assert "\x1b" not in str(refusal.value)
