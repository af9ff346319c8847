"""A replica of several ranks equals the single-process reference: tokens, logits and gradients.

Every rank is a thread here; shares, sums and commands are those of real ranks. The sum over ranks adds in
another order than one product does, so logits agree to rounding and greedy tokens exactly.
"""

import asyncio
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cloud_server.parallel_children import Children
from cloud_server.parallel_leader import LeadingTuneBatch, ReplicaError
from cloud_server.parallel_shard import Shard, sharded
from edge_client.spans import Span
from shared.exactness import compare, continuation, greedy
from shared.families import UnsupportedModelError
from shared.models import resolve
from shared.reference import Reference, merged
from tests.families import FAMILIES, build, plan_for, prompts, save
from tests.inprocess import Cloud
from tests.parallel import ParallelCloud, Replica, gloo
from tests.splits import NEW_TOKENS, PLANS, assert_close, logits_of, lowrank_for, matrices_for, split_of
from tests.tuning import Head, InDouble, reference_gradients, tune_directly

KINDS = ("per-projection", "fused-asymmetric", "query-and-value")


@pytest.fixture(scope="module")
def clouds(folder_of):
    """One cloud of two ranks a family, with several plans, for the whole module."""
    made: dict[str, ParallelCloud] = {}

    def of(name: str) -> ParallelCloud:
        if name not in made:
            splits = [split_of(name, kind) for kind in KINDS]
            cloud = ParallelCloud(folder_of(name), [(s.plan, s.lowrank) for s in splits])
            made[name] = cloud.__enter__()
        return made[name]

    yield of
    for cloud in made.values():
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0
        cloud.__exit__()


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_greedy_tokens_are_the_references(name: str, clouds) -> None:
    split, cloud = split_of(name), clouds(name)
    assert cloud.backbone.layers[0].lean is not None, "the probe should not see the ranks"
    with cloud.edge(split.plan, split.matrices, chunk_tokens=7) as edge:
        expected = [greedy(split.reference, prompt, NEW_TOKENS) for prompt in prompts(2)]
        assert not compare(expected, continuation(split.model)).exact, "M should matter"
        verdict = compare(expected, continuation(edge))
        assert verdict.exact, str(verdict)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, KINDS[0]) for name in FAMILIES), *((name, k) for name in ("llama", "phi3") for k in KINDS[1:])],
)
def test_every_plan_has_the_references_logits(name: str, kind: str, clouds) -> None:
    split, ids = split_of(name, kind), prompts(1)[0]
    with clouds(name).edge(split.plan, split.matrices) as edge:
        assert_close(logits_of(edge, ids), logits_of(split.reference, ids))


def test_beams_and_rejected_drafts(clouds) -> None:
    """Rows are forked, reordered and cropped: blocks are copied and cleared on all ranks."""
    split, prompt = split_of("llama"), prompts(1)[0] * 2
    ids = torch.tensor([prompt])
    options = {"num_beams": 3, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    with clouds("llama").edge(split.plan, split.matrices) as edge:
        assert torch.equal(edge.generate(ids, **options), split.reference.generate(ids, **options))
        expected = [greedy(split.reference, prompt, NEW_TOKENS)]
        verdict = compare(expected, continuation(edge, prompt_lookup_num_tokens=4))
        assert verdict.exact, str(verdict)


def test_sessions_of_different_plans_share_batches_in_slices(folder_of) -> None:
    model, rows = build("llama"), prompts(3, shortest=40)
    plans = [
        plan_for(model, name="each"),
        plan_for(model, exchange_layers=(0,), share_residual_codes=3, layout="fused", name="shared"),
    ]
    lowrank, matrices = [lowrank_for(p, model) for p in plans], [matrices_for(p) for p in plans]
    expected = []
    for plan, ab, m in zip(plans, lowrank, matrices, strict=True):
        reference = Reference(model, plan, ab, m)
        expected.append([logits_of(reference, ids) for ids in rows])
        reference.remove()
    options: dict[str, Any] = {"slice_s": 1e-9, "short_step_tokens": 1}
    served = list(zip(plans, lowrank, strict=True))
    with (
        ParallelCloud(folder_of("llama"), served, options) as cloud,
        cloud.edge(plans[0], matrices[0]) as edge,
        torch.inference_mode(),
    ):
        wanted = [(which, index) for which in range(2) for index in range(3)]
        streams = [cloud.open(plans[which], matrices[which], chunk_tokens=25) for which, _ in wanted]

        async def together() -> list[Tensor]:
            steps = []
            for stream, (_, index) in zip(streams, wanted, strict=True):
                ids = rows[index]
                steps.append(stream.step_async(edge._embed(ids), [Span(0, 0, len(ids), len(ids))]))
            return list(await asyncio.gather(*steps))

        for hidden, (which, index) in zip(cloud.call(together()), wanted, strict=True):
            assert_close(edge.lm_head(edge.norm(hidden)), expected[which][index])
        cloud.close_streams()
        assert cloud.cache.bytes_used == 0
        backbone = cloud.backbone
    assert not backbone._told, "rank 0 remembers steps that are gone"
    assert not any(follower.batches for follower in cloud.replica.followers)
    left = [step for follower in cloud.replica.followers for step in follower.steps]
    assert len(left) <= len(wanted), "followers remember steps that are gone"


def test_a_plan_whose_ends_are_on_the_edge(folder_of) -> None:
    """The cloud's layers begin at 1: every rank holds layers 1 and 2 only, and needs no answers at 2."""
    model = build("llama")
    options = {"head_layers": 1, "tail_layers": 1, "exchange_layers": (1,)}
    plan = plan_for(model, layers=(1, 2), **options)
    served, matrices = [(plan, lowrank_for(plan, model))], matrices_for(plan)
    hidden = torch.randn(30, plan.hidden_size, generator=torch.Generator().manual_seed(0))
    with Cloud(folder_of("llama"), served) as alone, ParallelCloud(folder_of("llama"), served) as cloud:
        spans = [Span(0, 0, 30, 30)]
        expected = alone.open(plan, matrices).step(hidden, spans)
        assert_close(cloud.open(plan, matrices, chunk_tokens=7).step(hidden, spans), expected)
        assert cloud.backbone.served == range(1, 3) == cloud.replica.followers[0].backbone.served


def test_three_ranks_and_biases_everywhere(tmp_path: Path) -> None:
    changes = {"num_key_value_heads": 3, "intermediate_size": 81, "attention_bias": True, "mlp_bias": True}
    model = build("llama", **changes)
    plan = plan_for(model, scale=1.7)
    lowrank, matrices = lowrank_for(plan, model), matrices_for(plan)
    reference = merged(model, plan, lowrank, matrices)
    with (
        ParallelCloud(save("llama", tmp_path, **changes), [(plan, lowrank)], size=3) as cloud,
        cloud.edge(plan, matrices, chunk_tokens=7) as edge,
    ):
        expected = [greedy(reference, prompt, NEW_TOKENS) for prompt in prompts(2)]
        verdict = compare(expected, continuation(edge))
        assert verdict.exact, str(verdict)


def test_hugging_faces_own_code_is_summed_too(folder_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that does not pass the probe runs as the module that it is."""
    monkeypatch.setattr("cloud_server.layer.Probe.agrees", lambda *_: False)
    for name in ("llama", "phi3"):
        split, ids = split_of(name), prompts(1)[0]
        with (
            ParallelCloud(folder_of(name), [(split.plan, split.lowrank)]) as cloud,
            cloud.edge(split.plan, split.matrices) as edge,
        ):
            assert cloud.backbone.layers[0].lean is None
            assert_close(logits_of(edge, ids), logits_of(split.reference, ids))


# --- tuning -------------------------------------------------------------------------------------------

SEQUENCES = [*prompts(3), prompts(1)[0][:1], prompts(1)[0][:5]]
SHARED = {"exchange_layers": (0, 2), "share_residual_codes": 2, "r_c2d": 5, "r_d2c": 9}
FUSED = PLANS["fused-asymmetric"]
TUNED: dict[str, dict[str, Any]] = {"per-projection": {}, "shared": SHARED, "fused": FUSED}
CASES = [(name, "per-projection") for name in FAMILIES] + [("llama", "shared"), ("phi3", "fused")]


@pytest.fixture(scope="module")
def tuned(folder_of):
    """Return a family in fp64: a replica of two ranks, the plain model, and plans with A and B."""
    replicas = []

    @cache
    def of(name: str) -> tuple[Replica, Any, dict[str, Any]]:
        model = build(name).double().requires_grad_(False)
        plans = {kind: plan_for(model, **changes, name=kind) for kind, changes in TUNED.items()}
        served = {kind: (plan, lowrank_for(plan, model)) for kind, plan in plans.items()}
        checkpoint = resolve(str(folder_of(name)), progress=False)
        replicas.append(Replica(checkpoint, served, 2, torch.float64))
        return replicas[-1], model, served

    yield of
    for replica in replicas:
        replica.stop()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_the_references(name: str, kind: str, tuned) -> None:
    replica, model, served = tuned(name)
    plan, lowrank = served[kind]
    matrices = matrices_for(plan)
    with InDouble():
        reference = Reference(model, plan, lowrank, {layer: m.double() for layer, m in matrices.items()})
        try:
            expected_loss, expected = reference_gradients(reference, SEQUENCES)
        finally:
            reference.remove()
        for checkpointing in (False, True) if name == "llama" else (False,):
            loss, found, _ = tune_directly(
                replica.backbone,
                plan,
                matrices,
                Head(model),
                SEQUENCES,
                make=LeadingTuneBatch,
                checkpointing=checkpointing,
                piece_tokens=25,
            )
            assert loss == pytest.approx(expected_loss, rel=1e-10)
            assert found.keys() == expected.keys()
            for layer, gradient in expected.items():
                error = (found[layer] - gradient).norm() / gradient.norm()
                assert gradient.norm() > 1e-3 and error <= 1e-9, f"layer {layer}: relative error {error:.1e}"
    replica.leader.beat()
    assert not replica.followers[0].batches, "a follower remembers a batch that is gone"


# --- what a rank holds --------------------------------------------------------------------------------


def test_each_rank_holds_its_share_only(folder_of) -> None:
    split = split_of("phi3")
    whole = resolve(str(folder_of("phi3")), progress=False)
    with Cloud(folder_of("phi3"), [(split.plan, split.lowrank)]) as alone:
        expected = sum(t.numel() for t in alone.backbone.layers[0].module.parameters())
    with ParallelCloud(folder_of("phi3"), [(split.plan, split.lowrank)]) as cloud:
        replica = cloud.replica
        for b in (replica.backbone, replica.followers[0].backbone):
            share = sum(t.numel() for t in b.layers[0].module.parameters())
            assert 2 * share == expected  # norms are no parameters of it
            b_matrix = b.residuals._spread[split.plan.name, 0]
            assert b_matrix.shape[1] == (whole.geometry.q_dim + 2 * whole.geometry.kv_dim) // 2
        assert replica.cache.pool.shape == replica.followers[0].cache.pool.shape
        assert replica.cache.bytes_total == alone.cache.bytes_total
        assert replica.cache.pool.shape[2] == whole.geometry.num_kv_heads // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_shares_together_are_the_whole(name: str, folder_of) -> None:
    """Every number of the checkpoint is on one rank, or on all of them."""
    whole = resolve(str(folder_of(name)), progress=False)
    shares = [sharded(whole, Shard(rank, 2)) for rank in range(2)]
    for local, tensor in whole.layer_tensors(1).items():
        (full,) = whole.load([tensor]).values()
        parts = [share.load([tensor])[tensor] for share in shares]
        cut = shares[0].cuts.get(tensor)
        if cut is None:
            assert full.ndim == 1 and all(torch.equal(part, full) for part in parts), local
            continue
        pieces = [part.split([w // 2 for w in cut.parts], dim=cut.dim) for part in parts]
        again = [p for together in zip(*pieces, strict=True) for p in together]
        assert torch.equal(torch.cat(again, dim=cut.dim), full), local


@pytest.mark.parametrize(
    ("ranks", "said"), [(3, "2 key/value heads"), (4, "6 query heads"), (7, "80 MLP columns")]
)
def test_heads_that_cannot_be_divided_are_refused(ranks: int, said: str, folder_of) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        sharded(resolve(str(folder_of("llama")), progress=False), Shard(0, ranks))
    assert "runs on 1, 2" in str(refused.value)


# --- when a rank is late ------------------------------------------------------------------------------


class Noted:
    """A group, or a call of one, that notes what is asked of it and what is over."""

    def __init__(self, inner: Any, name: str, log: list[str]) -> None:
        self._inner, self._name, self._log = inner, name, log

    def __getattr__(self, what: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._log.append(f"{self._name} {what}")
            found = getattr(self._inner, what)(*arguments)
            if what != "wait":
                return Noted(found, self._name, self._log)
            self._log.append(f"{self._name} is over")
            return found

        return call


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_wait_for_one_that_is_still_loading(late: int) -> None:
    """In the meeting, which waits for long: the group that serves waits for a short time."""
    ranks, meeting = gloo(2), [member._tensors for member in gloo(2)]
    own, log = ([3, 1, 4], [3, 1, 4 + late]), list[str]()
    early = ranks[1 - late]
    early._control = Noted(early._control, "service", log)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(early.agree, own[1 - late], Noted(meeting[1 - late], "meeting", log))
        while len(log) < 2:
            time.sleep(0.001)
        assert not first.done(), "it should wait for the other"
        second = pool.submit(ranks[late].agree, own[late], meeting[late])
        agreed = (first.result() and second.result()) is True
    assert agreed is (late == 0), "rank 1 has other numbers where it is late"
    assert log[:4] == ["meeting barrier", "meeting wait", "meeting is over", "service broadcast"], log


# --- when a rank is lost ------------------------------------------------------------------------------


def test_ranks_are_ended_while_others_are_being_started() -> None:
    """Whatever comes later ends by itself, as the process that started it does."""
    children, command = Children(), [sys.executable, "-I", "-c", "input()"]

    class First(subprocess.Popen[bytes]):
        def kill(self) -> None:
            children.processes[2] = second
            super().kill()

    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as second,
        First(command, stdin=subprocess.PIPE) as first,
    ):
        children.processes[1] = first
        children.kill()
        assert first.wait(120) == -signal.SIGKILL
        second.kill()


def test_a_rank_that_does_not_answer_breaks_the_replica(folder_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle or not: nobody waits for longer than the groups' time. What is asked later fails at once."""
    split = split_of("llama")
    checkpoint = resolve(str(folder_of("llama")), progress=False)
    served = {split.plan.name: (split.plan, split.lowrank)}
    replica = Replica(checkpoint, served, 2, beat_s=0.05)
    for ranks in replica.ranks:  # not before, when all answer and the machine may be slow
        ranks._control._set_default_timeout(timedelta(seconds=0.5))
    replica.followers[0]._do = None  # type: ignore[method-assign, assignment]
    while len(replica.failures) < 2:
        time.sleep(0.01)
    assert any("out of step" in failure for failure in replica.failures), replica.failures
    sent: list[object] = []
    monkeypatch.setattr(replica.leader.ranks, "send", lambda *message: sent.append(message))
    with pytest.raises(ReplicaError, match="out of step"):
        replica.leader.beat()
    assert not sent, "nobody is asked who would not answer"
    replica.leader.stop()
