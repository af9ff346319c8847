"""Picking a dropped session up again, as the service sees it."""

import time
from types import SimpleNamespace
from typing import Any

from cloud_server.config import CloudConfig
from cloud_server.handshake import Offer, fingerprint_message
from cloud_server.service import Service
from shared import PROTOCOL_VERSION
from shared.fingerprint import Fingerprint, plan_digest
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.unit.session_talk import LIMITS, PLAN, StandIn

FINGERPRINT = Fingerprint(plan=plan_digest(PLAN), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


def hello(session_id: bytes = b"") -> pb.DecodeRequest:
    return pb.DecodeRequest(
        open=pb.Open(
            protocol_version=PROTOCOL_VERSION,
            fingerprint=fingerprint_message(FINGERPRINT),
            wire_dtype=pb.DTYPE_FLOAT32,
            session_id=session_id,
        )
    )


def test_the_time_that_a_session_was_dropped_is_no_silence() -> None:
    """Else it would be cut off as soon as it is back, if that time is longer than a cloud's patience."""
    engine: Any = StandIn(8)
    engine.config, engine.wake = SimpleNamespace(slice_s=0.005), lambda: None
    service = Service(CloudConfig(), engine, {FINGERPRINT.plan: Offer(PLAN, FINGERPRINT)}, [], LIMITS)
    session = service._open(hello())
    session.heard_at -= 10_000
    session.drop()
    before = time.monotonic()
    again = service._open(hello(session.id))
    assert again is session and again.heard_at >= before
