"""Picking a dropped session up again, as the reception sees it."""

import time
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from cloud_server.caller import Caller, set_caller
from cloud_server.config.cloud import CloudConfig
from cloud_server.handshake import Offer, fingerprint_message
from cloud_server.refusal import Refusal
from cloud_server.service import Service
from cloud_server.session import Session
from shared import PROTOCOL_VERSION, wire
from shared.fingerprint import Fingerprint, plan_digest
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.wire_dtypes import WireDtypes
from tests.unit.session_talk import LIMITS, PLAN, StandIn

FINGERPRINT = Fingerprint(plan=plan_digest(PLAN), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


def hello(session_id: bytes = b"", **dtypes: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(
        open=pb.Open(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=fingerprint_message(FINGERPRINT),
            wire_dtype=pb.DTYPE_FLOAT32,
            session_id=session_id,
            **dtypes,
        )
    )


def new_service() -> Service:
    engine: Any = StandIn(8)
    engine.config, engine.wake = SimpleNamespace(slice_s=0.005), lambda: None
    return Service(CloudConfig(), engine, {FINGERPRINT.plan: Offer(PLAN, FINGERPRINT)}, [], LIMITS)


def test_the_time_that_a_session_was_dropped_is_no_silence() -> None:
    """Else it would be cut off as soon as it is back, if that time is longer than a cloud's patience."""
    service = new_service()
    session = service.reception.open(hello())
    session.heard_at -= 10_000
    session.drop()
    before = time.monotonic()
    again = service.reception.open(hello(session.id))
    assert again is session and again.heard_at >= before


def test_a_session_that_is_picked_up_again_may_travel_otherwise() -> None:
    service = new_service()
    session = service.reception.open(hello())
    assert session.wire_dtypes == WireDtypes.all(pb.DTYPE_FLOAT32)
    session.drop()
    service.reception.open(hello(session.id, codes_dtype=wire.INT8))
    assert session.wire_dtypes == WireDtypes.named("float32", codes="int8")
    session.drop()
    with pytest.raises(Refusal, match="codes dtype must be one of") as refusal:
        service.reception.open(hello(session.id, codes_dtype=17))
    assert refusal.value.code is grpc.StatusCode.INVALID_ARGUMENT and session.dropped_at is not None


def test_nobody_else_picks_up_a_session() -> None:
    """And an id that exists is refused in the words for one that does not."""
    service, said = new_service(), []

    def as_caller(name: str, message: pb.DecodeRequest) -> Session:
        context = copy_context()
        context.run(set_caller, Caller(name))
        return context.run(service.reception.open, message)

    session = as_caller("alice", hello())
    session.drop()
    for session_id in (session.id, bytes(16)):
        with pytest.raises(Refusal) as refusal:
            as_caller("bob", hello(session_id))
        said.append((refusal.value.code, refusal.value.message))
    assert said[0] == said[1] and said[0][0] is grpc.StatusCode.NOT_FOUND
    assert as_caller("alice", hello(session.id)) is session
