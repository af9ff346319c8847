"""The plan: what it refuses, what follows from it, and the one text that is hashed."""

import hashlib
import json
from typing import Any

import pytest
from pydantic import ValidationError

from shared.plan import MAX_PLAN_BYTES, Plan, PlanError

FACTS: dict[str, Any] = {"name": "p", "backbone": "b", "num_layers": 6, "hidden_size": 32}


def subset(layers: tuple[int, ...] | None = None, **options: Any) -> Plan:
    return Plan.subset(layers, **FACTS | {"rank": 4} | options)


def changed(**fields: Any) -> dict[str, Any]:
    return subset().model_dump() | fields


def test_every_layer_unless_told_otherwise() -> None:
    plan = subset()
    assert plan.exchange_layers == plan.adapted_layers == tuple(range(6))
    assert plan.schedule == "per_layer" and plan.cloud_layers == range(6)
    assert subset((1, 4)).schedule == "subset" and subset((0, 1, 2, 3, 4, 5)).schedule == "per_layer"


@pytest.mark.parametrize(
    ("options", "groups", "codes", "residual"),
    [
        ({}, 3, 12, 12),
        ({"layout": "fused"}, 1, 4, 4),
        ({"r_c2d": 5, "r_d2c": 9}, 3, 15, 27),
        ({"r_c2d": 5, "r_d2c": 9, "layout": "fused"}, 1, 5, 9),
        ({"targets": ("q", "v")}, 2, 8, 8),
        ({"targets": ("k",), "r_c2d": 7}, 1, 7, 4),
    ],
)
def test_widths(options: dict[str, Any], groups: int, codes: int, residual: int) -> None:
    plan = subset(**options)
    assert (plan.groups, plan.codes_width, plan.residual_width) == (groups, codes, residual)


def test_grouped_layers_take_codes_from_the_last_exchange() -> None:
    plan = Plan.model_validate(
        changed(exchange_layers=(1, 4), adapted_layers=(1, 2, 3, 4, 5), schedule="grouped")
    )
    assert [plan.source_of(layer) for layer in plan.adapted_layers] == [1, 1, 1, 4, 4]
    assert plan.fed_by(1) == (1, 2, 3) and plan.fed_by(4) == (4, 5) and plan.fed_by(2) == ()


def test_layers_may_live_on_the_edge() -> None:
    plan = Plan.model_validate(
        changed(head_layers=1, tail_layers=2, exchange_layers=(1, 2, 3), adapted_layers=(1, 2, 3))
    )
    assert plan.cloud_layers == range(1, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Upper"},
        {"name": ""},
        {"name": "../etc"},
        {"name": "x" * 65},
        {"backbone": ""},
        {"backbone": "x" * 257},
        {"num_layers": 0},
        {"num_layers": 5},
        {"num_layers": 10**9},
        {"hidden_size": 0},
        {"hidden_size": 2**21},
        {"head_layers": -1},
        {"head_layers": 1},
        {"head_layers": 4, "tail_layers": 2, "exchange_layers": (), "adapted_layers": ()},
        {"exchange_layers": (0, 1, 2, 3, 4, 6), "adapted_layers": (0, 1, 2, 3, 4, 6)},
        {"exchange_layers": (1, 0, 2, 3, 4, 5)},
        {"exchange_layers": (0, 0, 1, 2, 3, 4, 5)},
        {"adapted_layers": (-1, 0)},
        {"exchange_layers": ()},
        {"adapted_layers": ()},
        {"exchange_layers": (1,), "adapted_layers": (0, 1), "schedule": "grouped"},
        {"exchange_layers": (0, 1), "adapted_layers": (1, 2), "schedule": "grouped"},
        {"exchange_layers": (0, 2), "adapted_layers": (0, 1, 2), "schedule": "subset"},
        {"exchange_layers": (0, 2), "adapted_layers": (0, 2), "schedule": "per_layer"},
        {"targets": ()},
        {"targets": ("k", "q")},
        {"targets": ("q", "q")},
        {"targets": ("o",)},
        {"r_c2d": 0},
        {"r_d2c": 8193},
        {"r_c2d": "many"},
        {"layout": "stacked"},
        {"schedule": "sometimes"},
        {"initialiser": "zeros"},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": 1e4},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"lora_scale": 3.0},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_a_plan_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Plan.model_validate(changed(**fields))
    with pytest.raises(PlanError, match="not a plan"):
        Plan.parse(json.dumps(changed(**fields)))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", "{", '"plan"', '{"name": "p"}', "[" * 10_000])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.parse(text)


def test_an_overlong_text_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PlanError, match=f"at most {MAX_PLAN_BYTES}"):
        Plan.parse(" " * (MAX_PLAN_BYTES + 1))


def test_there_is_one_canonical_text() -> None:
    plan = subset((1, 4), scale=2)
    text = plan.canonical_json()
    assert Plan.parse(text) == plan and Plan.parse(text).canonical_json() == text
    assert " " not in text
    shuffled = dict(reversed(json.loads(text).items()))
    assert Plan.parse(json.dumps(shuffled, indent=3)).canonical_json() == text
    assert subset((1, 4), scale=2.0).canonical_json() == text


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 5},
        {"layout": "fused"},
        {"scale": 1.5},
        {"initialiser": "svd"},
        {"targets": ("q",)},
        {"name": "o"},
    ],
    ids=str,
)
def test_every_difference_shows_in_the_text(options: dict[str, Any]) -> None:
    assert subset(**options).canonical_json() != subset().canonical_json()


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        subset().scale = 3.0  # type: ignore[misc]


def test_a_plan_without_lora_has_the_digest_it_had_before_there_were_any() -> None:
    text = Plan.subset(name="a", backbone="b", num_layers=2, hidden_size=8).canonical_json()
    assert "lora" not in text and Plan.parse(text).canonical_json() == text
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "0d3974917d2c21bfbd15288ecac4f0d33e0e18e25d67263c9b56fcc608251959"
    )


# --- layers that share an M ---------------------------------------------------------------------------------


def test_layers_in_a_row_may_share_an_m() -> None:
    plan = subset(exchange_layers=(0, 3), share_residual_codes=2)
    assert plan.owners == plan.owner_layers == (0, 2, 3, 5) and plan.adapted_layers == tuple(range(6))
    assert [plan.owner_of(layer) for layer in range(6)] == [0, 0, 2, 3, 3, 5]
    assert [plan.served_by(owner) for owner in plan.owners] == [(0, 1), (2,), (3, 4), (5,)]
    assert plan.fed_by(0) == (0, 2) and plan.fed_by(3) == (3, 5)
    some = subset((1, 2, 5), exchange_layers=(1,), share_residual_codes=2)
    assert some.owners == (1, 5) and some.owner_of(2) == 1 and some.owner_of(3) is None
    assert some.served_by(2) == () and some.lowest_gradient == 1


def test_a_plan_of_one_trip_may_share_too() -> None:
    facts = {**FACTS, "num_layers": 30}
    plan = Plan.one_trip((), lora_rank=0, share_residual_codes=4, **facts)
    assert plan.owners == (2, 6, 10, 14, 18, 22, 26) and plan.fed_by(2) == plan.owners
    assert plan.served_by(26) == (26, 27) and plan.round_trips == 1
    assert Plan.one_trip((), lora_rank=0, share_residual_codes=99, **facts).owners == (2,)


def test_sharing_with_nobody_is_the_plan_without() -> None:
    alone = subset(exchange_layers=(0, 3))
    assert subset(exchange_layers=(0, 3), share_residual_codes=1) == alone
    assert alone.owner_layers == () and alone.owners == alone.adapted_layers
    assert all(alone.served_by(layer) == (layer,) and alone.owner_of(layer) == layer for layer in range(6))
    assert subset(share_residual_codes=3) == subset()  # each layer is fed by its own exchange
    assert subset((), exchange_layers=(), head_layers=1, share_residual_codes=3).owners == ()


def test_sharing_is_part_of_the_text_where_there_is_any() -> None:
    alone, shared = subset(exchange_layers=(0, 3)), subset(exchange_layers=(0, 3), share_residual_codes=2)
    assert "owner" not in alone.canonical_json()
    assert json.loads(shared.canonical_json())["owner_layers"] == [0, 2, 3, 5]
    assert Plan.parse(shared.canonical_json()) == shared


@pytest.mark.parametrize(
    ("owners", "words"),
    [
        ((0, 1, 2, 3, 4, 5), "some of adapted_layers, left out"),
        ((0, 3, 6), "some of adapted_layers"),
        ((3, 0), "strictly increasing"),
        ((0, 0, 3), "strictly increasing"),
        ((0, 2), r"layers \[3\] would share an M across exchanges"),
        ((3, 4), r"layers \[0\] would share"),
        ((1, 4), r"layers \[0, 3\] would share"),
        ((-1, 0, 3), "owner_layers"),
    ],
    ids=str,
)
def test_owners_that_cannot_be(owners: tuple[int, ...], words: str) -> None:
    facts = changed(exchange_layers=(0, 3), schedule="grouped", owner_layers=owners)
    with pytest.raises(PlanError, match=words):
        Plan.parse(json.dumps(facts))


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_of_layers_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError):
        subset(exchange_layers=(0, 3), share_residual_codes=count)
