"""Tuning over localhost, by hand: gradients are the reference's, and one edge's mistakes harm nobody."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch

from benchmarks.processes import CloudProcess
from shared import lowrank
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.reference import Reference
from tests.families import build, prompts, tokenizer
from tests.integration.raw_edge import RawEdge
from tests.integration.raw_tune import RawTune
from tests.integration.served import TINY_PLANS, Served
from tests.plans import matrices_for
from tests.tuning import Head, InDouble, Learner, reference_gradients

Code = grpc.StatusCode
SEQUENCES = prompts(3)
LENGTHS = [len(ids) for ids in SEQUENCES]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve four tiny layers in float64, with little memory for tuning."""
    folder, cache_dir = tmp_path_factory.mktemp("tiny"), tmp_path_factory.mktemp("cache")
    build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    arguments = ["--kv-bytes", str(16 << 20), "--cache-dir", str(cache_dir), "--threads", "1"]
    for plan in TINY_PLANS:
        arguments += ["--plan", plan]
    tuning = {"MAX_STREAMS": 2, "MAX_BYTES": 32 << 20, "PIECE_TOKENS": 40}
    environment = {f"PRIVATELORA_CLOUD_TUNING__{key}": str(value) for key, value in tuning.items()}
    environment |= {"PRIVATELORA_CLOUD_WRITE_TIMEOUT_S": "2"}
    with CloudProcess(
        str(folder), dtype="float64", arguments=arguments, env=environment, log=folder / "log"
    ) as process:
        yield Served(process, folder, cache_dir)


@pytest.fixture
def edge(served: Served) -> Iterator[RawEdge]:
    with served.raw() as raw:
        yield raw
    log = served.process.logs()
    assert "Traceback" not in log and "never retrieved" not in log, log[-6000:]


class Truth:
    """The plain model in float64, and what autograd on the reference says of it."""

    def __init__(self, served: Served, edge: RawEdge, name: str) -> None:
        self.model: Any = build("llama").double().requires_grad_(False)
        self.head, self.plan = Head(self.model), Plan.parse(edge.offers[name].plan_json)
        ab, _ = lowrank.ensure(self.plan, resolve(str(served.folder), progress=False), served.cache_dir)
        self.matrices = {layer: m.double() for layer, m in matrices_for(self.plan).items()}
        reference = Reference(self.model, self.plan, ab, self.matrices)
        with InDouble():
            self.loss, self.gradients = reference_gradients(reference, SEQUENCES)
        reference.remove()

    def check(self, stream: RawTune, **options: Any) -> None:
        """Run one batch there and back."""
        learner = Learner(self.plan, self.matrices)
        with InDouble():
            hidden = stream.forward(learner, self.head.embed(SEQUENCES), LENGTHS, **options)
            loss, gradient = self.head.gradient(hidden, SEQUENCES)
            assert loss == pytest.approx(self.loss, rel=1e-10)
            stream.backward(learner, gradient, **options)
        for layer, expected in self.gradients.items():
            assert (learner.gradients[layer] - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", ["r8", "fused"])
def test_gradients_over_the_wire_are_the_references(served: Served, edge: RawEdge, name: str) -> None:
    truth = Truth(served, edge, name)
    with RawTune(edge, name).open() as stream:
        for step in (10_000, 7):  # whole tensors, and rows that do not fit the cloud's pieces
            truth.check(stream, step=step)
        learner = Learner(truth.plan, truth.matrices)
        with InDouble():
            stream.forward(learner, truth.head.embed(SEQUENCES), LENGTHS, forward_only=True)
        stream.done()
        stream.finish()


def test_two_edges_and_a_dropped_one(served: Served, edge: RawEdge) -> None:
    truth = Truth(served, edge, "r8")
    learner = Learner(truth.plan, truth.matrices)
    with RawTune(edge, "r8").open() as one:
        with RawTune(edge, "r8").open() as two:
            with InDouble():
                two.forward(learner, truth.head.embed(SEQUENCES), LENGTHS)
            truth.check(one)
            third = RawTune(edge, "r8")
            third.send(third.hello())
            end = third.refused()
            assert end.code is Code.RESOURCE_EXHAUSTED and "all 2 tuning streams" in end.message
            assert int(end.trailers["retry-after-ms"]) > 0
        truth.check(one)  # the dropped one is no hindrance
        one.finish()


def test_a_batch_waits_for_anothers_memory_or_is_told_to_come_back(served: Served, edge: RawEdge) -> None:
    with RawTune(edge, "r8").open() as one, RawTune(edge, "r8").open() as two:
        length = one.opened.max_sequence_tokens
        lengths = [length] * (one.opened.max_batch_tokens // length)  # more than half of the memory
        assert lengths
        one.begin(lengths)
        one.rows("hidden", 0, torch.zeros(sum(lengths), 48), step=500)
        one.expect("codes", 0, sum(lengths), one.plan.codes_width)
        two.begin(lengths)
        end = two.refused()
        assert end.code is Code.RESOURCE_EXHAUSTED and "other tuning batches hold" in end.message
        assert int(end.trailers["retry-after-ms"]) > 0
        one.drop()
        with RawTune(edge, "r8").open() as three:
            three.begin(lengths)
            three.rows("hidden", 0, torch.zeros(sum(lengths), 48), step=500)
            three.expect("codes", 0, sum(lengths), three.plan.codes_width)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"protocol_version": 9}, Code.FAILED_PRECONDITION, "protocol version 9"),
        ({"wire_dtype": pb.DTYPE_FLOAT16}, Code.INVALID_ARGUMENT, "underflow in float16"),
        ({"wire_dtype": pb.DTYPE_INT8}, Code.INVALID_ARGUMENT, "int8 is too coarse for gradients"),
        ({"wire_dtype": pb.DTYPE_INT4}, Code.INVALID_ARGUMENT, "int4 is too coarse for gradients"),
        ({"wire_dtype": 17}, Code.INVALID_ARGUMENT, "wire dtype must be one of"),
        ({"fingerprint": pb.Fingerprint()}, Code.NOT_FOUND, "no such plan here"),
    ],
)
def test_a_handshake_that_cannot_be(edge: RawEdge, changes: Any, code: grpc.StatusCode, words: str) -> None:
    with RawTune(edge, "r8") as stream:
        stream.send(stream.hello(**changes))
        end = stream.refused()
        assert end.code is code and words in end.message


def test_a_fingerprint_mismatch_says_which_part(edge: RawEdge) -> None:
    other = pb.Fingerprint()
    other.CopyFrom(edge.offers["r8"].fingerprint)
    other.lowrank = b"\2" * 32
    with RawTune(edge, "r8") as stream:
        stream.send(stream.hello(fingerprint=other))
        end = stream.refused()
        assert end.code is Code.FAILED_PRECONDITION and "fingerprint mismatch in A/B" in end.message


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"", "first message must be open"),
        (pb.TuneRequest(batch=pb.Batch(batch=1)), "first message must be open"),
        (b"\xff" * 50, "50 bytes that are not a TuneRequest"),
    ],
    ids=["empty", "batch", "noise"],
)
def test_a_first_message_that_is_not_open(edge: RawEdge, first: Any, words: str) -> None:
    with RawTune(edge, "r8") as stream:
        stream.send(first)
        end = stream.refused()
        assert end.code is Code.INVALID_ARGUMENT and words in end.message


def test_what_may_not_follow(edge: RawEdge) -> None:
    for message, words in (
        (RawTune(edge, "r8").hello(), "only the first"),
        (pb.TuneRequest(), "an empty message"),
    ):
        with RawTune(edge, "r8").open() as stream:
            stream.send(message)
            end = stream.refused()
            assert end.code is Code.INVALID_ARGUMENT and words in end.message
