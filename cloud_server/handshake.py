"""The handshake of every stream: both sides compare what they stand on before any activation is sent."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc

from cloud_server.refusal import Refusal, invalid
from shared import PROTOCOL_VERSION
from shared.fingerprint import Fingerprint, FingerprintError
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


@dataclass(frozen=True)
class Offer:
    """A plan that is served, with the fingerprint of everything it stands on."""

    plan: Plan
    fingerprint: Fingerprint


def agreed(offers: Mapping[bytes, Offer], request: pb.Open | pb.TuneOpen) -> Offer:
    """Return the offer that a first message asks for.

    Raises
    ------
    Refusal
        If the protocol version, the plan or the fingerprint is not ours.
    """
    if request.protocol_version != PROTOCOL_VERSION:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"protocol version {request.protocol_version} is not spoken here, {PROTOCOL_VERSION} is; "
            "update the older side",
            reason="protocol",
        )
    offer = offers.get(request.fingerprint.plan)
    if offer is None:
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            f"no such plan here (plan digest {request.fingerprint.plan[:8].hex() or 'missing'}); "
            f"offered: {', '.join(o.plan.name for o in offers.values())}",
            reason="plan",
        )
    try:
        parts = offer.fingerprint.differs_from(fingerprint_of(request.fingerprint))
    except FingerprintError as error:
        raise invalid(str(error)) from None
    if parts:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"fingerprint mismatch in {' and '.join(parts)}: your adapter or edge parts were made "
            "for another model; use an adapter made for this cloud, or a cloud that serves yours",
            reason="fingerprint",
        )
    if request.fingerprint.root != offer.fingerprint.root:
        raise invalid("the fingerprint's root does not follow from its branches, which are right")
    return offer


def agreed_dtypes(request: pb.Open) -> WireDtypes:
    """Return what a session's tensors travel in.

    Raises
    ------
    Refusal
        If it is asked for a dtype that is not ours.
    """
    try:
        return WireDtypes.asked(request)
    except ValueError as error:
        raise invalid(str(error)) from None


def fingerprint_message(fingerprint: Fingerprint) -> pb.Fingerprint:
    """Return a fingerprint as a message."""
    return pb.Fingerprint(
        root=fingerprint.root,
        plan=fingerprint.plan,
        lowrank=fingerprint.lowrank,
        layers=fingerprint.layers,
        edge=fingerprint.edge,
    )


def fingerprint_of(message: pb.Fingerprint) -> Fingerprint:
    """Return a message's fingerprint.

    Raises
    ------
    FingerprintError
        If a branch is no digest.
    """
    return Fingerprint(plan=message.plan, lowrank=message.lowrank, layers=message.layers, edge=message.edge)
