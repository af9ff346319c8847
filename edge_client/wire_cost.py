"""What one decoded token costs on the wire, from the plan alone: the README's formula, to the byte.

Protobuf spends a byte or more on the number of each field, on each length and on each number. They are
counted here with step numbers and positions below 128; from there on they take a byte more.
"""

from dataclasses import dataclass

from shared.plan import Plan
from shared.wire import FRAME_BYTES, ROUNDINGS, row_bytes
from shared.wire_dtypes import WireDtypes

NUMBER = 100  # of the step, and of its position: both take one byte


@dataclass(frozen=True)
class WireCost:
    """Bytes up and down, and round trips, of one decoded token of one session."""

    up: int
    down: int
    round_trips: int


def wire_cost(plan: Plan, dtypes: WireDtypes) -> WireCost:
    """Return the cost under ``plan`` with tensors that travel in ``dtypes``.

    Residual codes that the first exchange feeds go up with the hidden states where the edge makes its codes.
    """
    hidden = _tensor(dtypes.hidden, plan.hidden_size, 1)
    codes = _tensor(dtypes.codes, plan.codes_width, plan.groups)
    residual = _tensor(dtypes.residual_codes, plan.residual_width, plan.groups)
    span = _number(NUMBER) + _number(1) + _number(1)  # start, count, keep
    step = _number(NUMBER) + _field(span) + _field(hidden)
    up, down = 0, _message(_number(NUMBER) + _field(hidden))
    for index, exchange in enumerate(plan.exchange_layers):
        answers = sum(_field(_number(owner) + _field(residual)) for owner in plan.fed_by(exchange))
        if index == 0 and plan.first_codes_on_edge:
            step += answers
            continue
        up += _message(_number(NUMBER) + answers)
        down += _message(_number(NUMBER) + _number(exchange) + _field(codes))
    return WireCost(up + _message(step), down, plan.round_trips)


def widest_row(plan: Plan, dtypes: WireDtypes, *, upfront: bool) -> int:
    """Return the most bytes that one position takes in any message of a step.

    ``upfront`` says whether the edge makes the first exchange's codes, whose answers go up with h0.
    """
    hidden, widest = dtypes.hidden_bytes(plan), dtypes.codes_bytes(plan)
    for index, exchange in enumerate(plan.exchange_layers):
        answer = len(plan.fed_by(exchange)) * dtypes.residual_bytes(plan)
        if index == 0 and upfront:
            hidden += answer
        widest = max(widest, answer)
    return max(hidden, widest)


# --- protobuf's own bytes, of fields whose numbers are below 16 ---------------------------------------------


def _message(size: int) -> int:
    """Return what a message takes as the one field of a request or response, with gRPC's header."""
    return _field(size) + FRAME_BYTES


def _tensor(dtype: int, width: int, groups: int) -> int:
    """Return what a tensor of one row takes."""
    data = row_bytes(dtype, width, groups=0)
    shape = _varint(1) + _varint(width)
    rounding = ROUNDINGS.get(dtype)
    scales = 0 if rounding is None else _field(groups * rounding.SCALE_BYTES)
    return _number(dtype) + _field(shape) + _field(data) + scales


def _field(size: int) -> int:
    """Return what a field that states its length takes."""
    return 1 + _varint(size) + size


def _number(value: int) -> int:
    """Return what a whole number's field takes; zero is left out."""
    return 1 + _varint(value) if value else 0


def _varint(value: int) -> int:
    """Return the bytes of a number, seven bits in each."""
    return max(1, -(-value.bit_length() // 7))
