"""How fast a cloud and the link to it are, from a live connection. What is sent is random or public.

A step that brings all residual codes along makes no exchange, so it takes one call, its bits and the cloud's
layers; the same step without them takes its exchanges on top. Round trips of the link itself are timed by
opening TCP connections, as a call spends time in both processes; where a proxy answers these, less is found,
and as much more counts as the cost of a message, so that predictions over this same link stay right.
"""

import contextlib
import socket
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edge_client.connection import Connection
from edge_client.offer import CloudOffer, fingerprint_message
from edge_client.personal import PersonalWeights
from edge_client.planning.network import LinkFacts
from edge_client.planning.predict import step_bytes
from edge_client.planning.speeds import CloudSpeed, Line
from edge_client.session import MAX_TENSOR_BYTES, Session
from edge_client.spans import Span
from shared.adapter import Adapter
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire import TORCH_DTYPES, Array
from shared.wire_dtypes import WireDtypes

POSITIONS = 64  # of the longer of the two steps that are timed
REPEATS = 5
SLOW_S = 2.0  # steps that take longer are timed once
FETCH_BYTES = 4 << 20  # of public parts, to time the way down
FETCH_S = 5.0  # for that at most
CLEAR_SHARE = 0.15  # a difference has to be this much of what is timed, or it is taken for noise
CLEAR_S = 2e-3  # and this long


class KnownCodes(PersonalWeights):
    """Residual codes of M = 0, for every layer, sent with the hidden states: nothing is left to exchange."""

    def upfront(self, hidden: Tensor) -> dict[int, Array]:
        """Return zeros ``(tokens, groups * r_d2c)`` by owner."""
        zeros = np.zeros((len(hidden), self.plan.residual_width), dtype=np.float32)
        return dict.fromkeys(self.plan.owners, zeros)


class Timed:
    """A session whose steps are timed, on random hidden states; closed at the end of its block."""

    def __init__(
        self,
        connection: Connection,
        offer: CloudOffer,
        plan: Plan,
        wire_dtype: "pb.Dtype.ValueType",
        *,
        exchanging: bool,
    ) -> None:
        adapter = Adapter.zeros(*offer.plans[plan.name])
        personal = PersonalWeights(adapter) if exchanging else KnownCodes(adapter)
        message = fingerprint_message(offer.plans[plan.name][1])
        self.session: Session = connection.open_session(
            personal, message, WireDtypes.all(wire_dtype), offer.raw_limits
        )
        self.plan, self.positions = plan, longest(plan, offer, TORCH_DTYPES[wire_dtype].itemsize)
        self._hidden = 0.02 * torch.randn(self.positions, plan.hidden_size)
        self._run(self.positions, 0)  # whatever is only done once

    def one_s(self) -> float:
        """Return the time of a step of one position that follows others (seconds)."""
        return statistics.median(_times(lambda: self._run(1, self.positions)))

    def many(self) -> list[float]:
        """Return the times of a few steps of `positions` (seconds)."""
        return _times(lambda: self._run(self.positions, 0))

    def bytes_up(self) -> int:
        """Return what a step of `positions` sends (bytes)."""
        before = self.session.traffic.bytes_up
        self._run(self.positions, 0)
        return self.session.traffic.bytes_up - before

    def _run(self, positions: int, start: int) -> None:
        self.session.step(self._hidden[:positions], [Span(0, start, positions, 1)])

    def __enter__(self) -> "Timed":
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


def measure_cloud(
    connection: Connection, offer: CloudOffer, wire_dtype: "pb.Dtype.ValueType"
) -> tuple[CloudSpeed, LinkFacts]:
    """Time the cloud and the link; takes some seconds, up to half a minute where round trips are long.

    Parameters
    ----------
    connection
        To the cloud.
    offer
        What it has stated there.
    wire_dtype
        What numbers will travel as.
    """
    call_s = min(_seconds(connection.describe) for _ in range(REPEATS + 2))
    rtt_s = min(call_s, connect_s(connection.target, connection.timeouts.connect_s))
    down = down_rate(connection, offer)
    plans = [plan for plan, _ in offer.plans.values()]
    width = TORCH_DTYPES[wire_dtype].itemsize

    plain = min(plans, key=lambda plan: len(plan.owners) * plan.residual_width)
    with Timed(connection, offer, plain, wire_dtype, exchanging=False) as timed:
        one_s, full, positions, bytes_up = timed.one_s(), timed.many(), timed.positions, timed.bytes_up()
    other = pb.DTYPE_BFLOAT16 if width > 2 else pb.DTYPE_FLOAT32
    with Timed(connection, offer, plain, other, exchanging=False) as timed:
        others, more_bytes = timed.many(), bytes_up - timed.bytes_up()
    with Timed(connection, offer, plain, wire_dtype, exchanging=False) as timed:
        full += timed.many()  # before and after the others: a machine that slows down is no link
    up, many_s = rate_of(more_bytes, full, others), statistics.median(full)
    link = LinkFacts(name="measured", rtt_s=rtt_s, up_bit_s=up, down_bit_s=down)

    def layer_s(taken: float, count: int) -> float:
        codes = len(plain.owners) * plain.residual_width
        bits = link.transfer_s((plain.hidden_size + codes) * width * count, plain.hidden_size * width)
        return max(0.0, taken - call_s - bits) / len(plain.cloud_layers)

    layer = Line.through(layer_s(one_s, 1), layer_s(many_s, positions), positions)
    message = call_s - rtt_s
    exchange = Line(one_s=message, each_s=0.0)
    exchanging = [plan for plan in plans if plan.exchange_layers]
    if exchanging:
        most = max(exchanging, key=lambda plan: len(plan.exchange_layers))
        count = len(most.exchange_layers)  # the first one too: these sessions leave its codes to the cloud

        def exchange_s(taken: float, positions: int) -> float:
            bits = link.transfer_s(*step_bytes(most, WireDtypes.all(wire_dtype), positions, 1))
            rest = taken - call_s - bits - len(most.cloud_layers) * layer.at(positions)
            return max(0.0, rest / count - rtt_s)

        with Timed(connection, offer, most, wire_dtype, exchanging=True) as timed:
            one, many = (
                exchange_s(timed.one_s(), 1),
                exchange_s(statistics.median(timed.many()), timed.positions),
            )
            exchange = Line.through(one, many, timed.positions)
    return (
        CloudSpeed(
            layer=layer,
            exchange=exchange,
            message_s=message,
            max_context_tokens=offer.limits.max_context_tokens,
            max_step_tokens=offer.limits.max_step_tokens,
            max_steps_in_flight=max(1, offer.raw_limits.max_steps_in_flight),
        ),
        link,
    )


def longest(plan: Plan, offer: CloudOffer, wire_bytes: int) -> int:
    """Return how many positions the longer step has: all its residual codes have to fit one message."""
    row = (plan.hidden_size + len(plan.owners) * plan.residual_width) * wire_bytes
    limits = offer.limits
    return max(
        1, min(POSITIONS, limits.max_step_tokens, limits.max_context_tokens - 1, MAX_TENSOR_BYTES // row)
    )


def connect_s(target: str, timeout_s: float) -> float:
    """Return the fastest of several TCP handshakes (seconds); infinite if none succeeds."""
    host, _, port = target.rpartition(":")

    def connect() -> None:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()

    best = float("inf")
    for _ in range(REPEATS):
        with contextlib.suppress(OSError, ValueError):  # a name that only gRPC can resolve
            best = min(best, _seconds(connect))
    return best


def down_rate(connection: Connection, offer: CloudOffer) -> float | None:
    """Return the rate from cloud to edge while a public part is fetched (bits/s); None if all are small."""
    index = max(range(len(offer.parts)), key=lambda i: offer.parts[i].size)
    if offer.parts[index].size < FETCH_BYTES // 2:
        return None
    pieces = connection.fetch_part(index)
    counted, started = 0, 0.0
    for number, piece in enumerate(pieces):
        now = time.perf_counter()
        if number == 0:
            started = now  # the first one has waited for a round trip and a disk
            continue
        counted += len(piece)
        if counted >= FETCH_BYTES or now - started > FETCH_S:
            break
    taken = time.perf_counter() - started
    pieces.close()  # type: ignore[attr-defined]
    return 8 * counted / taken if counted and taken > 0 else None


def rate_of(more_bytes: int, fuller: Sequence[float], leaner: Sequence[float]) -> float | None:
    """Return the rate at which ``more_bytes`` explain by how much longer steps take (bits/s).

    None if that may be noise: nearly every fuller step has to take longer than nearly every leaner one.

    Parameters
    ----------
    more_bytes
        Of a fuller step over a leaner one; below 0 if it is the other way round.
    fuller, leaner
        Times of such steps (seconds).
    """
    if more_bytes < 0:
        more_bytes, fuller, leaner = -more_bytes, leaner, fuller
    more_s = statistics.median(fuller) - statistics.median(leaner)
    apart = _but_one(sorted(fuller)) > _but_one(sorted(leaner, reverse=True))
    if not more_bytes or not apart or more_s < max(CLEAR_S, CLEAR_SHARE * statistics.median(leaner)):
        return None
    return 8 * more_bytes / more_s


def _but_one(times: Sequence[float]) -> float:
    """Return the first of several times but one, which may have been disturbed."""
    return times[1] if len(times) > 2 else times[0]


def _times(run: Callable[[], object]) -> list[float]:
    first = _seconds(run)
    return [first] if first > SLOW_S else [_seconds(run) for _ in range(REPEATS)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
