"""How the link to the cloud is, measured as for predictions: random numbers through the cloud's layers."""

from edge_client.connection import Connection, Timeouts
from edge_client.doctor.finding import Exam, Finding, failed, ok, warning
from edge_client.planning.measure_cloud import measure_cloud
from edge_client.streams import SessionError
from shared.wire import WIRE_DTYPES

SLOW_S = 0.25  # of waiting for the link in one token


def link(exam: Exam) -> Finding:
    """Open sessions, time steps, and say what round trips and rates mean for a token."""
    assert exam.offer is not None and exam.adapter is not None
    settings, plan = exam.settings, exam.adapter.plan
    timeouts = Timeouts(settings.connect_timeout_s, settings.step_timeout_s)
    try:
        connection = Connection(exam.target, timeouts, exam.credentials)
        try:
            speed, found = measure_cloud(connection, exam.offer, WIRE_DTYPES[exam.offer.compute_dtype])
        finally:
            connection.close()
    except SessionError as error:
        wait = f" in {error.retry_after_s:.0f} s" if error.retry_after_s else " later"
        return failed(
            f"no session can be opened: {error}", f"try again{wait}, or ask the cloud's operator for room"
        )
    trips_s = plan.round_trips * found.rtt_s
    rates = ", ".join(
        f"{way} {rate / 1e6:.0f} Mbit/s" if rate else f"{way} too fast for the little that was sent to tell"
        for way, rate in (("up", found.up_bit_s), ("down", found.down_bit_s))
    )
    says = (
        f"{1e3 * found.rtt_s:.1f} ms round trip, {rates}; plan {plan.name!r} takes {plan.round_trips} a token"
    )
    facts = {
        "rtt_ms": round(1e3 * found.rtt_s, 3),
        "up_mbit_s": found.up_bit_s and round(found.up_bit_s / 1e6, 3),
        "down_mbit_s": found.down_bit_s and round(found.down_bit_s / 1e6, 3),
        "message_ms": round(1e3 * speed.message_s, 3),
        "round_trips_per_token": plan.round_trips,
    }
    if trips_s > SLOW_S and plan.round_trips > 1:
        return warning(
            f"{says}: {trips_s:.1f} s of waiting for each",
            "take a plan with fewer round trips: `privatelora-edge plan` compares them over this link",
            **facts,
        )
    return ok(says, **facts)
