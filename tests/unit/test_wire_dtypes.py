"""What a session's tensors travel in: as asked, by kind, with the one for all where nothing is said."""

import pytest
import torch

from edge_client.planning.candidates import LEAN
from edge_client.wire_cost import wire_cost
from shared import wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

PLAN = Plan.subset((0, 2), name="p", backbone="b", num_layers=4, hidden_size=8, r_c2d=2, r_d2c=3)


def test_an_edge_of_before_there_were_kinds() -> None:
    assert WireDtypes.asked(pb.Open(wire_dtype=pb.DTYPE_BFLOAT16)) == WireDtypes.all(pb.DTYPE_BFLOAT16)


def test_what_is_asked_for_is_understood() -> None:
    asked = WireDtypes.named("bfloat16", codes="int8", residual_codes="float16")
    assert asked == WireDtypes(pb.DTYPE_BFLOAT16, pb.DTYPE_INT8, pb.DTYPE_FLOAT16)
    request = pb.Open()
    asked.ask(request)
    assert WireDtypes.asked(pb.Open.FromString(request.SerializeToString())) == asked


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"wire_dtype": 0}, "^wire dtype must be one of float32, .*int8, int4, got unknown dtype 0"),
        ({"wire_dtype": 17}, "^wire dtype must be one of"),
        ({"hidden_dtype": 17}, "^hidden dtype must be one of"),
        ({"codes_dtype": 7}, "^codes dtype must be one of"),
        ({"residual_codes_dtype": 17}, "^residual codes dtype must be one of .* unknown dtype 17"),
    ],
)
def test_what_is_no_dtype(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WireDtypes.asked(pb.Open(**{"wire_dtype": pb.DTYPE_FLOAT32} | fields))


def test_a_name_that_is_no_dtype() -> None:
    with pytest.raises(ValueError, match="wire dtype 'int2' is not one of float32, .*int8, int4"):
        WireDtypes.named("float32", codes="int2")


def test_hidden_states_do_not_travel_as_int4() -> None:
    for fields in ({"wire_dtype": pb.DTYPE_INT4}, {"hidden_dtype": pb.DTYPE_INT4}):
        with pytest.raises(ValueError, match="hidden states do not travel as int4"):
            WireDtypes.asked(pb.Open(**{"wire_dtype": pb.DTYPE_FLOAT32} | fields))
    for names in (("int4",), ("float32", "int4")):
        with pytest.raises(ValueError, match="hidden states do not travel as int4"):
            WireDtypes.named(*names)
    asked = WireDtypes.named("int4", hidden="int8")
    assert asked == WireDtypes(pb.DTYPE_INT8, pb.DTYPE_INT4, pb.DTYPE_INT4)


# --- what it costs ------------------------------------------------------------------------------------------

SMALL = {"name": "p", "backbone": "b", "num_layers": 4, "hidden_size": 8, "r_c2d": 2, "r_d2c": 3}
LARGE = {"name": "p", "backbone": "b", "num_layers": 30, "hidden_size": 576, "rank": 64}
PLANS = {
    "small": PLAN,
    "fused": Plan.subset(layout="fused", **SMALL),
    "shared": Plan.subset(exchange_layers=(0, 2), share_residual_codes=2, **SMALL),
    "shared-late": Plan.subset((1, 2, 3), exchange_layers=(1,), share_residual_codes=2, **SMALL),
    "none": Plan.subset((), head_layers=1, **SMALL),
    "demo": Plan.subset(**LARGE),
    "one-trip": Plan.one_trip((), lora_rank=0, **LARGE),
    "one-trip-shared": Plan.one_trip((), lora_rank=0, share_residual_codes=4, **LARGE),
    "one-trip-lean": Plan.one_trip((), lora_rank=0, **LEAN, **LARGE),
}
KINDS = [  # of hidden states, codes and residual codes
    ("float32",) * 3, ("bfloat16",) * 3, ("int8",) * 3, ("int8", "bfloat16", "int8"),
    ("int8", "int4", "int4"),
    ("bfloat16", "bfloat16", "int4"),
]  # fmt: skip
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def messages_bytes(plan: Plan, dtypes: WireDtypes, number: int) -> tuple[int, int]:
    """Return what the messages of a token take up and down, with their frames, made as the two sides do."""
    step = pb.Step(step=number, spans=[pb.Span(row=0, start=number, count=1, keep=1)])
    wire.fill(step.hidden, torch.randn(1, plan.hidden_size), dtypes.hidden)
    up, down = [], [pb.DecodeResponse(hidden=pb.Hidden(step=number))]
    wire.fill(down[0].hidden.hidden, torch.randn(1, plan.hidden_size), dtypes.hidden)
    for exchange in plan.exchange_layers:
        answers = [pb.LayerCodes(layer=owner) for owner in plan.fed_by(exchange)]
        for answer in answers:
            wire.fill(answer.codes, torch.randn(1, plan.residual_width), dtypes.residual_codes, plan.groups)
        if exchange == plan.cloud_layers.start:
            step.residual_codes.extend(answers)
            continue
        up.append(
            pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=number, residual_codes=answers)),
        )
        response = pb.DecodeResponse(codes=pb.Codes(step=number, layer=exchange))
        wire.fill(response.codes.codes, torch.randn(1, plan.codes_width), dtypes.codes, plan.groups)
        down.append(response)
    up.append(pb.DecodeRequest(step=step))
    sent, received = (sum(m.ByteSize() + wire.FRAME_BYTES for m in way) for way in (up, down))
    return sent, received


@pytest.mark.parametrize("names", KINDS, ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_cost_is_what_messages_take(plan: Plan, names: tuple[str, str, str]) -> None:
    dtypes = WireDtypes.named("float32", *names)
    cost = wire_cost(plan, dtypes)
    assert (cost.up, cost.down) == messages_bytes(plan, dtypes, 100) and cost.round_trips == plan.round_trips
    later = messages_bytes(plan, dtypes, 5000)  # a byte more a number, and where lengths grow by that
    messages = 2 * plan.round_trips
    assert 0 < sum(later) - cost.up - cost.down <= 4 * messages


@pytest.mark.parametrize("names", KINDS, ids=str)
@pytest.mark.parametrize("name", ["demo", "one-trip", "one-trip-shared", "one-trip-lean"])
def test_the_cost_is_the_readmes_formula(name: str, names: tuple[str, str, str]) -> None:
    (hidden, codes, residual), plan, dtypes = names, PLANS[name], WireDtypes.named("float32", *names)
    extra = {"int8": 4 * plan.groups + 2, "int4": 2 * plan.groups + 2}
    h0 = plan.hidden_size * BITS[hidden] // 8 + (6 if hidden == "int8" else 0)
    z = plan.residual_width * BITS[residual] // 8 + extra.get(residual, 0)
    c = plan.codes_width * BITS[codes] // 8 + extra.get(codes, 0)
    others, first = len(plan.exchange_layers) - 1, len(plan.fed_by(plan.exchange_layers[0]))
    cost = wire_cost(plan, dtypes)
    assert cost.up == pytest.approx(h0 + 26 + 5 + first * (z + 18) + others * (z + 23 + 5), rel=0.03)
    assert cost.down == pytest.approx(h0 + 18 + 5 + others * (c + 20 + 5), rel=0.03)


def test_the_readmes_table() -> None:
    """Bytes of a token under the plan of one trip, with 26, 13, 7 and 2 residual codes up; and lean."""
    kinds = [("bfloat16", None), ("int8", None), ("int8", "int4")]
    plans = [Plan.one_trip((), lora_rank=0, share_residual_codes=n, **LARGE) for n in (1, 2, 4, 13)]
    plans.append(PLANS["one-trip-lean"])
    assert [len(plan.owners) for plan in plans] == [26, 13, 7, 2, 7]
    dtypes = [WireDtypes.named(one, residual_codes=residual) for one, residual in kinds]
    costs = [[wire_cost(plan, each) for plan in plans] for each in dtypes]
    assert [[cost.up + cost.down for cost in row] for row in costs] == [
        [12_810, 7_584, 5_172, 3_162, 3_373],
        [7_042, 4_130, 2_786, 1_666, 1_806],
        [4_312, 2_765, 2_051, 1_456, 1_568],
    ]
