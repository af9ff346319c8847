"""What one decoded token costs on the wire, from the plan alone: the README's formula."""

from dataclasses import dataclass

from shared.plan import Plan

# What protobuf spends on field numbers, shape, layer and step around the numbers themselves; a byte or two
# more once step numbers and sizes grow.
STEP, ANSWER, CODES, HIDDEN, RESIDUAL = 26, 23, 20, 18, 18
FRAME = 5  # gRPC's header of a message


@dataclass(frozen=True)
class WireCost:
    """Bytes up and down, and round trips, of one decoded token of one session."""

    up: int
    down: int
    round_trips: int


def wire_cost(plan: Plan, element_bytes: int) -> WireCost:
    """Return the cost under ``plan`` with ``element_bytes`` a number on the wire.

    Residual codes that the first exchange feeds go up with the hidden states where the edge makes its codes.
    """
    up = down = plan.hidden_size * element_bytes + FRAME
    up, down = up + STEP, down + HIDDEN
    for index, exchange in enumerate(plan.exchange_layers):
        fed = len(plan.fed_by(exchange))
        up += fed * (plan.residual_width * element_bytes + RESIDUAL)
        if index == 0 and plan.first_codes_on_edge:
            continue
        up += ANSWER - RESIDUAL + FRAME
        down += plan.codes_width * element_bytes + CODES + FRAME
    return WireCost(up, down, plan.round_trips)
