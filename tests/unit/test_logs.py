"""What is written down: one JSON object a line, and nothing of what crosses the wire."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import grpc
import pytest
import torch

from cloud_server import logs
from cloud_server.config.tuning import TuningConfig
from cloud_server.refusal import Refusal
from cloud_server.service import Service
from cloud_server.streams import log_refusal
from cloud_server.tune_session import TuneLimits, TuneSession
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from tests.unit.session_talk import PLAN, WIDTH
from tests.unit.test_service_resume import hello, new_service


@contextmanager
def lines(level: int = logging.DEBUG) -> Iterator[list[dict[str, Any]]]:
    """Collect what all loggers write meanwhile, read back as a machine would."""
    text, found = io.StringIO(), []
    handler, root = logging.StreamHandler(text), logging.getLogger()
    handler.setFormatter(logs.JsonLines())
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield found
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        found += [json.loads(line) for line in text.getvalue().splitlines()]


def test_an_event_is_one_line_with_its_fields():
    log = logging.getLogger("here")
    with lines() as found:
        logs.warning(log, "weather", "it rains,\nagain", drops=3, where=None, wet=True)
        log.info("%d plain", 1)
    event, plain = found
    moment = datetime.fromisoformat(event.pop("time"))
    assert abs((datetime.now(timezone.utc) - moment).total_seconds()) < 60
    assert event == {
        "level": "warning",
        "logger": "here",
        "event": "weather",
        "message": "it rains,\nagain",
        "drops": 3,
        "where": None,
        "wet": True,
    }
    assert plain["event"] == "message" and plain["message"] == "1 plain"


def test_an_error_is_still_one_line():
    with lines() as found:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("here").exception("it failed")
    assert len(found) == 1 and found[0]["error"] == "ValueError" and "two\nlines" in found[0]["traceback"]


def test_a_failure_is_a_line_of_the_same_kind(capsys):
    logs.failed("no such model")
    assert capsys.readouterr().err == "error: no such model\n"
    with lines() as found:
        logs.failed("no such model")
    assert (found[0]["event"], found[0]["level"], found[0]["message"]) == ("failed", "error", "no such model")


@pytest.mark.parametrize("value", [torch.full((3,), 0.4321), b"secret-4321", [4321], {"a": 4321}])
def test_what_is_no_number_and_no_word_is_not_written(value):
    with lines() as found:
        logs.event(logging.getLogger("here"), "odd", "odd", value=value)
    assert found[0]["value"] == type(value).__name__ and "4321" not in json.dumps(found[0])


def test_a_refusal_says_status_reason_and_hint():
    with lines() as found:
        full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=2.5, reason="kv")
        log_refusal("session", full, session="abc")
    assert found[0]["event"] == "session_refused" and found[0]["message"].endswith("RESOURCE_EXHAUSTED: full")
    expected = {"status": "RESOURCE_EXHAUSTED", "reason": "kv", "retry_after_s": 2.5, "session": "abc"}
    assert expected.items() <= found[0].items()


def spoken(service: Service) -> list[dict[str, Any]]:
    """Run a session with conspicuous numbers through a service; return what was logged."""
    with lines() as found:
        session = service.reception.open(hello())
        hidden = wire.encode(torch.full((5, WIDTH), 0.8765), pb.DTYPE_FLOAT32)
        session.step(pb.Step(step=1, spans=[pb.Span(row=0, start=0, count=5, keep=1)], hidden=hidden))
        bad = pb.Step(step=2, spans=[pb.Span(row=0, start=99, count=5, keep=1)], hidden=hidden)
        with pytest.raises(Refusal) as refusal:
            session.step(bad)
        log_refusal("session", refusal.value)
        service.roster.leave(session, finished=False)
        service.reception.open(hello(session.id))
        service.roster.leave(session, finished=True)
    for line in found:
        text = json.dumps(line)
        assert "8765" not in text and session.id.hex() not in text, text
    return found


def test_the_life_of_a_session_without_anything_that_crossed_the_wire():
    found = spoken(new_service())
    names = [line["event"] for line in found]
    assert names == [
        "session_opened",
        "session_refused",
        "session_dropped",
        "session_opened",
        "session_closed",
    ]
    opened, refused, dropped, resumed, closed = found
    assert (opened["how"], resumed["how"]) == ("new", "resumed") and opened["plan"] == PLAN.name
    assert refused["status"] == "FAILED_PRECONDITION" and refused["reason"] == "gap"
    assert opened["session"] == dropped["session"] == resumed["session"] == closed["session"]
    assert closed["reason"] == "ended" and 0 <= closed["seconds"] < 60


def test_whose_tuning_was_closed():
    tuning = new_service().tuning
    limits = TuneLimits(max_batch_tokens=8, max_sequence_tokens=8)
    parts = tuning.engine.backbone, tuning.queue, tuning.budget, TuningConfig()
    session = TuneSession(PLAN, pb.DTYPE_FLOAT32, limits, *parts, patience_s=1.0, payer="alice")
    tuning.sessions[session] = tuning.allowances.of("alice")
    with lines() as found:
        tuning._leave(session)
        tuning._leave(session)
    assert len(found) == 1 and found[0]["event"] == "tuning_closed"
    assert {"identity": "alice", "plan": PLAN.name, "streams": 0}.items() <= found[0].items()


def test_why_a_session_was_closed():
    service = new_service()
    session = service.reception.open(hello())
    service.roster.leave(session, finished=False)
    with lines() as found:
        assert service.roster.evict()
    assert [(line["event"], line["reason"]) for line in found] == [("session_closed", "evicted")]


def test_at_the_very_end_all_sessions_are_closed_and_nothing_is_in_use():
    service = new_service()
    held, connected = (service.reception.open(hello()) for _ in range(2))
    hidden = wire.encode(torch.zeros(5, WIDTH), pb.DTYPE_FLOAT32)
    connected.step(pb.Step(step=1, spans=[pb.Span(row=0, start=0, count=5, keep=1)], hidden=hidden))
    service.roster.leave(held, finished=False)
    assert service.engine.cache.bytes_used > 0
    with lines() as found:
        assert service.end() == 0
    assert [(line["event"], line["reason"]) for line in found] == [("session_closed", "stopped")] * 2
