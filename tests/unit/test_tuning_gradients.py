"""dL/dM of the split run is autograd's on the reference, for every family and plan, in fp64."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cloud_server.backbone import Backbone
from shared.lowrank import LowRank
from shared.models import resolve
from shared.plan import Plan
from shared.reference import Matrices, Reference
from tests.families import FAMILIES, build, plan_for, prompts
from tests.plans import lowrank_for, matrices_for
from tests.splits import PLANS
from tests.tuning import Head, InDouble, reference_gradients, tune_directly

RTOL = 1e-9
GROUPED = {"exchange_layers": (0, 2), "schedule": "grouped"}
LATE = {"exchange_layers": (0, 2), "adapted_layers": (1, 2, 3), "schedule": "grouped"}
SHARED = {
    "shared": {"exchange_layers": (0,), "schedule": "grouped", "owner_layers": (0, 2)},
    "shared-late": LATE | {"owner_layers": (1, 2)},
    "fused-shared": {"exchange_layers": (0,), "schedule": "grouped", "owner_layers": (0, 3)},
}
KINDS = [*(kind for kind in PLANS if kind != "fused"), "grouped", "grouped-late", "fused-grouped", *SHARED]


def plan_of(model: Any, kind: str) -> Plan:
    if kind in PLANS:
        return plan_for(model, **PLANS[kind], name=kind)
    options: dict[str, Any] = PLANS["asymmetric"] if kind in SHARED else {}
    if kind.startswith("fused"):
        options = PLANS["fused-asymmetric"]
    base = plan_for(model, **options, name=kind)
    changes = SHARED.get(kind, LATE if kind == "grouped-late" else GROUPED)
    return Plan.model_validate({**base.model_dump(), **changes})


class Case:
    """A family in fp64: the served layers, the plain model, and every plan."""

    def __init__(self, name: str, folder: Any) -> None:
        self.model = build(name).double().requires_grad_(False)
        self.plans = {kind: plan_of(self.model, kind) for kind in KINDS}
        self.lowrank = {kind: lowrank_for(plan, self.model) for kind, plan in self.plans.items()}
        served: dict[str, tuple[Plan, LowRank]] = {
            kind: (plan, self.lowrank[kind]) for kind, plan in self.plans.items()
        }
        self.backbone = Backbone(resolve(str(folder), progress=False), served, dtype=torch.float64)
        self.head = Head(self.model)

    def matrices(self, kind: str) -> Matrices:
        return matrices_for(self.plans[kind])

    def split(
        self, kind: str, sequences: Sequence[Sequence[int]], **options: Any
    ) -> tuple[float, dict[int, Tensor], Tensor]:
        with InDouble():
            return tune_directly(
                self.backbone, self.plans[kind], self.matrices(kind), self.head, sequences, **options
            )

    @cache  # noqa: B019
    def expected(self, kind: str) -> tuple[float, dict[int, Tensor]]:
        doubled = {layer: m.double() for layer, m in self.matrices(kind).items()}
        reference = Reference(self.model, self.plans[kind], self.lowrank[kind], doubled)
        try:
            with InDouble():
                return reference_gradients(reference, SEQUENCES)
        finally:
            reference.remove()


SEQUENCES = [*prompts(3), prompts(1)[0][:1], prompts(1)[0][:5]]


@pytest.fixture(scope="module")
def case_of(folder_of):
    return cache(lambda name: Case(name, folder_of(name)))


def assert_same(found: dict[int, Tensor], expected: dict[int, Tensor], rtol: float = RTOL) -> None:
    assert found.keys() == expected.keys()
    for layer, gradient in expected.items():
        error = (found[layer] - gradient).norm() / gradient.norm()
        assert gradient.norm() > 1e-3 and error <= rtol, f"layer {layer}: relative error {error:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_references(name: str, kind: str, case_of) -> None:
    case = case_of(name)
    loss, gradients, _ = case.split(kind, SEQUENCES)
    expected_loss, expected = case.expected(kind)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert_same(gradients, expected)


@pytest.mark.parametrize("kind", ["per-projection", "fused-asymmetric", "grouped-late", "shared-late"])
@pytest.mark.parametrize("name", FAMILIES)
def test_running_layers_again_changes_nothing(name: str, kind: str, case_of) -> None:
    case = case_of(name)
    _, kept, _ = case.split(kind, SEQUENCES)
    _, again, _ = case.split(kind, SEQUENCES, checkpointing=True)
    assert_same(again, kept, rtol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("piece_tokens", [1, 25, 10_000])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_pieces_do_not_matter(name: str, piece_tokens: int, checkpointing: bool, case_of) -> None:
    case = case_of(name)
    for kind in ("per-projection", "grouped", "shared"):
        options = {"piece_tokens": piece_tokens, "checkpointing": checkpointing}
        _, gradients, _ = case.split(kind, SEQUENCES, **options)
        assert_same(gradients, case.expected(kind)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_only_gives_the_same_hidden_states_and_keeps_nothing(name: str, case_of) -> None:
    case = case_of(name)
    loss, _, hidden = case.split("per-projection", SEQUENCES)
    again, gradients, same = case.split("per-projection", SEQUENCES, forward_only=True)
    assert loss == again and torch.equal(hidden, same)
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_where_it_is_kept_does_not_matter(name: str, checkpointing: bool, case_of) -> None:
    case = case_of(name)
    results = [
        case.split(
            "per-projection", SEQUENCES, checkpointing=checkpointing, arena_bytes=size, piece_tokens=40
        )
        for size in (4 << 20, 100_000, 0)
    ]
    for _, gradients, _ in results[1:]:
        assert all(torch.equal(gradients[layer], g) for layer, g in results[0][1].items())


def test_a_batch_that_is_sent_again_gives_the_same_bits(case_of) -> None:
    case = case_of("llama")
    (_, one, _), (_, two, _) = (case.split("per-projection", SEQUENCES, piece_tokens=40) for _ in range(2))
    assert all(torch.equal(one[layer], two[layer]) for layer in one)


def test_a_wrong_gradient_would_be_seen(case_of) -> None:
    """Every part of the way back matters: without dL/dc, or with a scale forgotten, nothing agrees."""
    case = case_of("llama")
    plan = case.plans["per-projection"]
    _, expected = case.expected("per-projection")
    a, at = case.backbone.residuals._a, (plan.name, 3)
    right, a[at] = a[at], torch.zeros_like(a[at])  # codes of layer 3 are zero: its M learns nothing
    try:
        _, gradients, _ = case.split("per-projection", SEQUENCES)
    finally:
        a[at] = right
    assert all((gradients[layer] - g).norm() > 1e-3 * g.norm() for layer, g in expected.items())
