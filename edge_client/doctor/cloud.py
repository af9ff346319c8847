"""What the cloud says when it is asked: whether it is ready, takes this edge, and serves what was meant."""

import asyncio
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import grpc

from edge_client import trust
from edge_client.adapters import StoreError, resolve_adapter
from edge_client.config import EdgeConfig
from edge_client.connection import as_bytes
from edge_client.credentials import tls_problem
from edge_client.doctor.finding import Exam, Finding, failed, ok, warning
from edge_client.offer import CloudOffer, OfferError
from edge_client.plain import one_line
from edge_client.trust import TrustError
from shared import PROTOCOL_VERSION, __version__
from shared.adapter import Adapter, AdapterError
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

DESCRIBE = "/privatelora.v1.PrivateLoraService/Describe"
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = b"\x08\x01"  # HealthCheckResponse; its stubs come with the cloud's side only
CLOCK_S = 30.0  # certificates and logs stand a difference up to here
OPTIONS = (("grpc.max_receive_message_length", 4 << 20),)  # whoever answers is not trusted yet
NOT_ONE = "check the port: a PrivateLoRA cloud listens on 50051 unless told otherwise"


def service(exam: Exam) -> Finding:
    """Ask the health check, which is open to everybody, whether the cloud takes requests."""
    try:
        answer = asyncio.run(_call(exam, HEALTH, b""))
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), one_line(error.details() or "")
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return failed(f"gRPC answers at {exam.target}, but not with a health check", NOT_ONE)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:  # whoever speaks something else says so, or hangs up
            waited_s = exam.settings.connect_timeout_s
            return failed(
                f"{exam.target} takes connections, and answers nothing within {waited_s:g} s: it hangs, is "
                "paused or far too busy, or does not speak gRPC",
                f"look at the cloud's log and its machine, or take another of its replicas; else {NOT_ONE}",
            )
        meaning = tls_problem(details, exam.target) if exam.credentials.tls else None
        return failed(f"no gRPC at {exam.target}: {code.name}: {meaning or details}", NOT_ONE)
    if answer != SERVING:
        return warning(
            "the cloud is not ready: it is stopping, or moving its sessions elsewhere",
            "wait, or take another of its replicas",
        )
    return ok("gRPC answers, and is ready")


def token(exam: Exam) -> Finding:
    """Ask what is offered, for which a closed cloud wants to know who asks; then again without a token."""
    request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString()
    exam.asked_at = time.time()
    try:
        raw = asyncio.run(_call(exam, DESCRIBE, request))
        exam.answered_at = time.time()
        exam.response = pb.DescribeResponse.FromString(raw)
    except grpc.aio.AioRpcError as error:
        return _not_let_in(exam, error)
    except ValueError:  # protobuf's DecodeError
        return failed(f"{exam.target} does not speak this protocol", NOT_ONE)
    by = "by its certificate" if exam.credentials.client_cert is not None else "without a token"
    if exam.credentials.token is None:
        return ok(f"the cloud lets this edge in {by}")
    try:
        asyncio.run(_call(exam, DESCRIBE, request, with_token=False))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return ok("the cloud takes this edge's token")
        return ok(f"the cloud lets this edge in; whether by its token cannot be told ({error.code().name})")
    if exam.credentials.client_cert is not None:
        return ok(f"the cloud lets this edge in {by}, and asks for no token")
    return warning(
        "this cloud lets everybody in: it asks neither for this edge's token nor for a certificate",
        "ask its operator to close it (`privatelora-cloud serve --tokens FILE`), if that is not meant",
    )


def clock(exam: Exam) -> Finding:
    """Compare both clocks, to within half of the time that the answer took."""
    assert exam.response is not None
    return compared(exam.response.unix_time_ms, exam.asked_at, exam.answered_at)


def compared(cloud_ms: int, asked_at: float, answered_at: float) -> Finding:
    """Say how far this clock is from the cloud's.

    Parameters
    ----------
    cloud_ms
        The cloud's clock when it answered (milliseconds since 1970); 0 if it does not say.
    asked_at, answered_at
        This machine's clock before and after (seconds since 1970).
    """
    if not cloud_ms:
        return Finding("skipped", "this cloud does not state its time")
    ahead_s = cloud_ms / 1e3 - (asked_at + answered_at) / 2
    unsure_s = (answered_at - asked_at) / 2
    facts = {"cloud_ahead_s": round(ahead_s, 3), "uncertainty_s": round(unsure_s, 3)}
    if abs(ahead_s) <= CLOCK_S + unsure_s:
        return ok(f"both clocks agree to within {abs(ahead_s) + unsure_s:.1f} s", **facts)
    order = "behind" if ahead_s > 0 else "ahead of"
    return warning(
        f"this machine's clock is {abs(ahead_s):.0f} s {order} the cloud's",
        "set the one that is wrong (NTP): certificates count as expired or not valid yet by it",
        **facts,
    )


def versions(exam: Exam) -> Finding:
    """Compare the protocol, which has to be the same, and the versions, which should."""
    assert exam.response is not None
    theirs, version = exam.response.protocol_version, one_line(exam.response.server_version[:64])
    facts = {"edge": __version__, "cloud": version, "protocol": PROTOCOL_VERSION, "cloud_protocol": theirs}
    if theirs != PROTOCOL_VERSION:
        older = "cloud" if theirs < PROTOCOL_VERSION else "edge"
        return failed(
            f"the cloud ({version}) speaks protocol {theirs}, this edge ({__version__}) {PROTOCOL_VERSION}",
            f"update the {older}",
            **facts,
        )
    if version != __version__:
        return warning(
            f"edge {__version__}, cloud {version}; both speak protocol {theirs}",
            "they work together; update the older one when it suits",
            **facts,
        )
    return ok(f"edge and cloud are both {version}, protocol {theirs}", **facts)


def model(exam: Exam) -> Finding:
    """Check what is offered, and whether it is what was seen here before; nothing is remembered."""
    assert exam.response is not None
    try:
        exam.offer = CloudOffer.check(exam.target, exam.response)
        plan, fingerprint = exam.offer.plan(exam.settings.plan)
        with contextlib.suppress(AdapterError, StoreError):  # `adapter` says so; it decides on the plan
            chosen = _adapter_for(exam.offer, exam.settings)[1]
            plan, fingerprint = chosen.plan, chosen.fingerprint
        new = trust.check_known(
            exam.offer, plan, fingerprint, expected=exam.settings.fingerprint, remember=False
        )
    except (OfferError, TrustError) as error:
        return failed(str(error), "`privatelora-edge info` shows what the cloud offers; --plan NAME chooses")
    seen = "seen here for the first time" if new else "as it was when first used"
    facts = {
        "backbone": plan.backbone,
        "plans": list(exam.offer.plans),
        "fingerprint": fingerprint.root.hex(),
    }
    return ok(f"{plan.backbone}, {seen}; plans: {', '.join(exam.offer.plans)}", **facts)


def adapter(exam: Exam) -> Finding:
    """Compare the adapter that would be used with what the cloud serves."""
    assert exam.offer is not None
    try:
        file, exam.adapter = _adapter_for(exam.offer, exam.settings)
    except (AdapterError, StoreError, OfferError) as error:
        return failed(str(error), "--adapter NAME takes another (`adapter list`), none the base model")
    plan = exam.adapter.plan.name
    if file is None:
        return ok(f"none in use: the base model under plan {plan!r}", plan=plan)
    return ok(f"{exam.adapter.name!r} was made for plan {plan!r} of this model", plan=plan)


def _adapter_for(offer: CloudOffer, settings: EdgeConfig) -> tuple[Path | None, Adapter]:
    """Return the adapter that would be used and its file, if there is one, as `connect.open_model` does."""
    file = resolve_adapter(settings.adapter)
    wanted = offer.plan(settings.plan)[0] if settings.plan is not None else None
    return file, offer.adapter_for(wanted, file)


async def _call(exam: Exam, method: str, request: bytes, *, with_token: bool = True) -> bytes:
    credentials = exam.credentials if with_token else replace(exam.credentials, token=None)
    async with credentials.channel(exam.target, OPTIONS) as channel:
        call = channel.unary_unary(method, as_bytes, as_bytes)
        return bytes(await call(request, timeout=exam.settings.connect_timeout_s))


def _not_let_in(exam: Exam, error: grpc.aio.AioRpcError) -> Finding:
    """Say why the cloud does not answer this edge."""
    code, details = error.code(), one_line(error.details() or "")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return failed(f"the gRPC server at {exam.target} is no PrivateLoRA cloud", NOT_ONE)
    if code is not grpc.StatusCode.UNAUTHENTICATED:
        return failed(f"{code.name}: {details}", "try again later, or ask the cloud's operator")
    ask = "ask the operator for one (`privatelora-cloud token add NAME --tokens FILE` makes it)"
    if exam.credentials.token is None and exam.credentials.tls:
        return failed(f"this edge shows no token: {details}", f"give --token-file FILE; {ask}")
    if exam.credentials.token is None:
        return failed(
            f"the cloud asks for a token, and this edge speaks in clear: {details}",
            "a token is sent over TLS only: serve TLS there, and give --tls-ca FILE and --token-file FILE",
        )
    return failed(f"the cloud does not take this edge's token: {details}", f"give another; {ask}")
