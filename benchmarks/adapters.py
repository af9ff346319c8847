"""Personal weights for benchmarks and tests: random M for whatever plan a running cloud offers."""

from pathlib import Path

import grpc

from shared import PROTOCOL_VERSION
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.pb.privatelora.v1 import private_lora_pb2_grpc as pb_grpc
from shared.plan import Plan


def offered_plan(address: str, index: int = 0) -> tuple[Plan, Fingerprint]:
    """Return a plan that the cloud at `address` (host:port) offers, and its fingerprint."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.PrivateLoraServiceStub(channel)
        said = stub.Describe(pb.DescribeRequest(protocol_version=PROTOCOL_VERSION), timeout=30)
    offer = said.plans[index]
    stated = offer.fingerprint
    fingerprint = Fingerprint(
        plan=stated.plan, lowrank=stated.lowrank, layers=stated.layers, edge=stated.edge
    )
    return Plan.parse(offer.plan_json), fingerprint


def random_adapter(address: str, path: Path, *, seed: int, std: float) -> Adapter:
    """Write an adapter with M ~ N(0, std^2) for the cloud's first plan to `path`, and return it."""
    adapter = Adapter.random(*offered_plan(address), seed=seed, std=std)
    adapter.save(path)
    return adapter
