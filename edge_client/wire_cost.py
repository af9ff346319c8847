"""What one decoded token costs on the wire, from the plan alone: the README's formula."""

from dataclasses import dataclass

from shared.plan import Plan
from shared.wire import INT8
from shared.wire_dtypes import WireDtypes

# What protobuf spends on field numbers, shape, layer and step around the numbers themselves; a byte or two
# more once step numbers and sizes grow.
STEP, ANSWER, CODES, HIDDEN, RESIDUAL = 26, 23, 20, 18, 18
SCALES = 2  # of an int8 tensor: the scales' field number and size
FRAME = 5  # gRPC's header of a message


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
    hidden = dtypes.hidden_bytes(plan) + _scales(dtypes.hidden)
    codes = dtypes.codes_bytes(plan) + _scales(dtypes.codes)
    residual = dtypes.residual_bytes(plan) + _scales(dtypes.residual_codes)
    up, down = hidden + STEP + FRAME, hidden + HIDDEN + FRAME
    for index, exchange in enumerate(plan.exchange_layers):
        fed = len(plan.fed_by(exchange))
        up += fed * (residual + RESIDUAL)
        if index == 0 and plan.first_codes_on_edge:
            continue
        up += ANSWER - RESIDUAL + FRAME
        down += codes + CODES + FRAME
    return WireCost(up, down, plan.round_trips)


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


def _scales(dtype: int) -> int:
    return SCALES if dtype == INT8 else 0
