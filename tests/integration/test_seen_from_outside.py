"""What an operator sees of a cloud: metrics and logs, and in neither anything that crossed the wire."""

import json
import urllib.request
from typing import Any

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.secured import Secured

Code = grpc.StatusCode


def scrape(cloud: Secured) -> tuple[str, dict[str, float]]:
    """Return what Prometheus is told, as it is and by name and labels."""
    with urllib.request.urlopen(f"http://{cloud.metrics}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    samples = {
        sample.name.removeprefix("privatelora_")
        + "".join(f" {v}" for _, v in sorted(sample.labels.items())): value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for value in (sample.value,)
    }
    return text, samples


def lines(cloud: Secured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cloud.process.logs().splitlines()]


def test_a_session_its_steps_and_a_refusal(guarded: Secured) -> None:
    _, before = scrape(guarded)
    logged = len(lines(guarded))
    h0 = np.full((3, 48), 0.7654321)
    with guarded.raw("bob") as bob:
        stream = bob.open()
        codes = dict.fromkeys(stream.plan.adapted_layers, np.full((3, stream.plan.residual_width), 0.1234567))
        stream.run([(0, 0, 40, 1)], known=stream.zeros(40))
        stream.run([(0, 40, 3, 1)], h0, known=codes)
        while scrape(guarded)[1]["kv_used_bytes"] != bob.kv_used:
            pass
        stream.step([(0, 99, 3, 1)], h0)
        end = stream.refused()
        assert end.code is Code.FAILED_PRECONDITION
        again = bob.resumed(stream)
        again.finish()
        assert bob.settled()
    text, after = scrape(guarded)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("positions_total prefill") == 40 and more("positions_total decode") == 3
    assert more("step_seconds_count decode") == 1 and more("step_seconds_count prefill") == 1
    assert more("sessions_opened_total new") == 1 and more("sessions_opened_total resumed") == 1
    assert more("sessions_dropped_total") == 1 and more("sessions_closed_total ended") == 1
    assert more("refusals_total gap FAILED_PRECONDITION") == 1
    assert (
        more("wire_bytes_total in decode") > 43 * 48 * 4 and more("wire_bytes_total out decode") > 2 * 48 * 4
    )
    assert after["kv_used_bytes"] == 0 < after["kv_budget_bytes"] and after["waiting"] == 0
    assert after["sessions connected"] == after["sessions dropped"] == 0

    new = lines(guarded)[logged:]
    mine = [line for line in new if line.get("identity") == "bob" or line["event"] == "session_refused"]
    events = [line["event"] for line in mine]
    told = ["session_opened", "session_refused", "session_dropped", "session_opened", "session_closed"]
    assert events == told, new
    assert len({line["session"] for line in mine}) == 1 and mine[-1]["reason"] == "ended"

    everything = text + guarded.process.logs()
    for private in ("7654321", "1234567", stream.opened.session_id.hex(), repr(stream.opened.session_id)):
        assert private not in everything
    assert not any(name in text for name in guarded.known), "an identity is in the metrics"
    for token in guarded.known.values():
        assert token not in everything


def test_metrics_are_another_port(guarded: Secured) -> None:
    """Where gRPC is served there are none, and nothing but them is served there."""
    assert guarded.metrics != guarded.address
    _, samples = scrape(guarded)
    assert any(name.startswith("build_info") for name in samples)
