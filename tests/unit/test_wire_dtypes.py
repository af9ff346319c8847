"""What a session's tensors travel in: as asked, by kind, with the one for all where nothing is said."""

import pytest
import torch

from edge_client.wire_cost import WireCost, wire_cost
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
        ({"wire_dtype": 0}, "^wire dtype must be one of float32, .*int8, got unknown dtype 0"),
        ({"wire_dtype": 17}, "^wire dtype must be one of"),
        ({"hidden_dtype": 17}, "^hidden dtype must be one of"),
        ({"codes_dtype": 6}, "^codes dtype must be one of"),
        ({"residual_codes_dtype": 17}, "^residual codes dtype must be one of .* unknown dtype 17"),
    ],
)
def test_what_is_no_dtype(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WireDtypes.asked(pb.Open(**{"wire_dtype": pb.DTYPE_FLOAT32} | fields))


def test_a_name_that_is_no_dtype() -> None:
    with pytest.raises(ValueError, match="wire dtype 'int4' is not one of float32, .*int8"):
        WireDtypes.named("float32", codes="int4")


def test_the_cost_counts_each_kind_and_its_scales() -> None:
    """Two exchanges of three groups; the first is answered with h0."""
    assert wire_cost(PLAN, WireDtypes.named("float32")) == WireCost(
        up=(8 * 4 + 26 + 5) + (9 * 4 + 18) + (9 * 4 + 23 + 5),
        down=(8 * 4 + 18 + 5) + (6 * 4 + 20 + 5),
        round_trips=2,
    )
    mixed = WireDtypes.named("int8", codes="bfloat16")
    assert wire_cost(PLAN, mixed) == WireCost(
        up=(8 + 6 + 26 + 5) + (9 + 3 * 4 + 2 + 18) + (9 + 3 * 4 + 2 + 23 + 5),
        down=(8 + 6 + 18 + 5) + (6 * 2 + 20 + 5),
        round_trips=2,
    )


@pytest.mark.parametrize("names", [("float32",), ("int8",), ("bfloat16", "int8", "bfloat16", "int8")])
def test_the_cost_is_what_messages_take(names: tuple[str, ...]) -> None:
    """Of a plan as large as the demo's; a byte or two a message depend on step numbers and sizes."""
    layers = tuple(range(30))
    plan = Plan.subset(layers, name="p", backbone="b", num_layers=30, hidden_size=576, rank=64)
    dtypes = WireDtypes.named(*names)
    step, down = 300, 0
    request = pb.DecodeRequest(step=pb.Step(step=step, spans=[pb.Span(row=0, start=300, count=1, keep=1)]))
    wire.fill(request.step.hidden, torch.randn(1, 576), dtypes.hidden)
    up = 0
    for layer in layers:
        z = pb.LayerCodes(layer=layer)
        wire.fill(z.codes, torch.randn(1, plan.residual_width), dtypes.residual_codes, plan.groups)
        if layer == 0:
            request.step.residual_codes.append(z)
            up += request.ByteSize() + wire.FRAME_BYTES
            continue
        answer = pb.DecodeRequest(residual_codes=pb.ResidualCodes(step=step, residual_codes=[z]))
        response = pb.DecodeResponse(codes=pb.Codes(step=step, layer=layer))
        wire.fill(response.codes.codes, torch.randn(1, plan.codes_width), dtypes.codes, plan.groups)
        up, down = up + answer.ByteSize() + wire.FRAME_BYTES, down + response.ByteSize() + wire.FRAME_BYTES
    last = pb.DecodeResponse(hidden=pb.Hidden(step=step))
    wire.fill(last.hidden.hidden, torch.randn(1, 576), dtypes.hidden)
    down += last.ByteSize() + wire.FRAME_BYTES
    cost = wire_cost(plan, dtypes)
    assert cost.up == pytest.approx(up, rel=0.01) and cost.down == pytest.approx(down, rel=0.01)
