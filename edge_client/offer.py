"""What a cloud offers, checked: plans, fingerprints, limits and the list of edge parts.

Everything in a `DescribeResponse` is a claim. Here it is checked for being well-formed and free of
contradictions; whether it is the model that was meant is decided by `trust.py` and the adapter.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

from edge_client.streams import SessionError
from shared import PROTOCOL_VERSION, wire
from shared.adapter import MAX_FILE_BYTES, Adapter, AdapterError, tensor_shapes
from shared.edge_parts import EdgePart, EdgePartsError, check_manifest, digested_parts
from shared.fingerprint import Fingerprint, FingerprintError, edge_digest, plan_digest
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan, PlanError

MAX_PLANS = 64
Code = grpc.StatusCode


class OfferError(ValueError):
    """A cloud that contradicts itself, speaks another protocol, or does not offer what is wanted."""


@dataclass(frozen=True)
class Limits:
    """Bounds that the cloud states: positions in a row, positions in a step, rows in a session."""

    max_context_tokens: int
    max_step_tokens: int
    max_rows: int


@dataclass(frozen=True)
class CloudOffer:
    """A checked offer. ``plans`` is in the cloud's order; the first one is its default."""

    target: str
    server_version: str
    plans: dict[str, tuple[Plan, Fingerprint]]
    parts: tuple[EdgePart, ...]
    limits: Limits
    raw_limits: pb.Limits
    compute_dtype: torch.dtype
    kv_bytes_used: int
    kv_bytes_total: int

    @classmethod
    def check(cls, target: str, response: pb.DescribeResponse) -> "CloudOffer":
        """Read what a cloud states.

        Raises
        ------
        OfferError
            If anything is missing, malformed or contradictory.
        """
        if response.protocol_version != PROTOCOL_VERSION:
            raise OfferError(
                f"{target} speaks protocol version {response.protocol_version}, this edge "
                f"{PROTOCOL_VERSION}; update the older side"
            )
        if not 1 <= len(response.plans) <= MAX_PLANS:
            raise OfferError(f"{target} offers {len(response.plans)} plans; expected 1 to {MAX_PLANS}")
        if response.compute_dtype not in wire.TORCH_DTYPES:
            raise OfferError(f"{target} computes in an unknown dtype ({response.compute_dtype})")
        limits = response.limits
        for name in ("max_context_tokens", "max_step_tokens", "max_rows"):
            if getattr(limits, name) < 1:
                raise OfferError(f"{target} states a limit {name} of 0")
        parts = tuple(EdgePart(p.name, None, p.size_bytes, p.sha256) for p in response.edge_parts)
        try:
            check_manifest(parts)
            plans = dict(_plan(target, offer, parts) for offer in response.plans)
        except (EdgePartsError, PlanError, FingerprintError) as error:
            raise OfferError(f"{target}: {error}") from None
        if len(plans) != len(response.plans):
            raise OfferError(f"{target} offers two plans of one name")
        sizes = {(p.num_layers, p.hidden_size) for p, _ in plans.values()}
        ranges = {p.cloud_layers for p, _ in plans.values()}
        if len(sizes) > 1 or len({(p.cloud_layers, f.layers) for p, f in plans.values()}) > len(ranges):
            raise OfferError(f"{target} offers plans of different models; expected one model")
        return cls(
            target=target,
            server_version=response.server_version[:64],
            plans=plans,
            parts=parts,
            limits=Limits(limits.max_context_tokens, limits.max_step_tokens, limits.max_rows),
            raw_limits=limits,
            compute_dtype=wire.TORCH_DTYPES[response.compute_dtype],
            kv_bytes_used=response.kv_bytes_used,
            kv_bytes_total=response.kv_bytes_total,
        )

    def plan(self, name: str | None) -> tuple[Plan, Fingerprint]:
        """Return the plan called ``name``, or the first; raises OfferError if there is none.

        Where exactly one plan is called ``name`` and a rank, as in one-trip-r64, that is the one.
        """
        if name is None:
            return next(iter(self.plans.values()))
        if name not in self.plans:
            ranked = [full for full in self.plans if re.fullmatch(re.escape(name) + "-r[0-9]+", full)]
            if len(ranked) == 1:
                return self.plans[ranked[0]]
            raise OfferError(f"{self.target} offers no plan {name!r}; it offers: {', '.join(self.plans)}")
        return self.plans[name]

    def same_at(self, target: str, response: pb.DescribeResponse, plan: Plan) -> pb.Limits:
        """Return the limits of a replica, after comparing what it states with this offer.

        Parameters
        ----------
        target, response
            The replica's address, and what it states.
        plan
            The plan in use.

        Raises
        ------
        SessionError
            If it states another model, another split or other A and B. Nothing was sent to it.
        """
        try:
            found = CloudOffer.check(target, response)
            stated = found.plan(plan.name)
        except OfferError as error:
            raise SessionError(str(error), Code.FAILED_PRECONDITION, address=target) from None
        if stated != self.plans[plan.name]:
            differing = stated[1].differs_from(self.plans[plan.name][1])
            raise SessionError(
                f"{target} serves another model or split under plan {plan.name!r} than {self.target} "
                f"({' and '.join(differing)} differ); nothing was sent to it",
                Code.FAILED_PRECONDITION,
                address=target,
            )
        return found.raw_limits

    def adapter_for(self, plan: Plan | None, adapter: str | Path | Adapter | None) -> Adapter:
        """Return the adapter to use, zeros if none is given, after comparing fingerprints.

        Parameters
        ----------
        plan
            The plan that was asked for, None for the adapter's own.
        adapter
            An adapter or a file.

        Raises
        ------
        AdapterError
            If it was made for something else; the message says what differs and what to do.
        """
        if adapter is None:
            return Adapter.zeros(*self.plan(plan.name if plan else None))
        chosen = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        if plan is not None and chosen.plan != plan:
            raise AdapterError(
                f"adapter {chosen.name!r} was made for plan {chosen.plan.name!r}, not for {plan.name!r}; "
                "an adapter belongs to exactly one plan"
            )
        found = [print_ for offered, print_ in self.plans.values() if offered == chosen.plan]
        if not found:
            raise AdapterError(
                f"adapter {chosen.name!r} was made for plan {chosen.plan.name!r} of "
                f"{chosen.plan.backbone!r}, which {self.target} does not offer (it offers: "
                f"{', '.join(self.plans)}); use a cloud that does"
            )
        differing = chosen.fingerprint.differs_from(found[0])
        if differing:
            raise AdapterError(
                f"adapter {chosen.name!r} does not fit {self.target}: {' and '.join(differing)} differ from "
                "what it was made for; use a cloud that serves that model, or an adapter made for this one"
            )
        return chosen


def _plan(
    target: str, offer: pb.PlanOffer, manifest: tuple[EdgePart, ...]
) -> tuple[str, tuple[Plan, Fingerprint]]:
    plan = Plan.parse(offer.plan_json)
    edge = edge_digest(digested_parts(plan, manifest))
    weights = sum(math.prod(shape) for shape in tensor_shapes(plan).values())
    if weights * 4 > MAX_FILE_BYTES:  # float32; before anything of that size is made
        raise OfferError(
            f"{target}: plan {plan.name!r} asks for {weights:,} personal weights, too many for a file"
        )
    stated = offer.fingerprint
    fingerprint = Fingerprint(stated.plan, stated.lowrank, stated.layers, stated.edge)
    for name, claimed, computed in (
        ("root", stated.root, fingerprint.root),
        ("plan", fingerprint.plan, plan_digest(plan)),
        ("edge parts", fingerprint.edge, edge),
    ):
        if claimed != computed:
            raise OfferError(f"{target}: the fingerprint of plan {plan.name!r} contradicts itself ({name})")
    return plan.name, (plan, fingerprint)


def fingerprint_message(fingerprint: Fingerprint) -> pb.Fingerprint:
    """Return a fingerprint as it is sent."""
    return pb.Fingerprint(root=fingerprint.root, **fingerprint.branches())
