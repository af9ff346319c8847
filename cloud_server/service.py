"""The gRPC face of the cloud: everything behind its four RPCs put together, and what it says of itself.

``Describe`` is answered here; ``Decode``, ``Tune`` and ``FetchEdgeParts`` have files of their own. No model
code. Requests arrive as bytes and are parsed behind each RPC, so that bytes which are no message get a clear
status too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from cloud_server.allowance import Allowances
from cloud_server.config.cloud import CloudConfig
from cloud_server.decode_service import DecodeService
from cloud_server.drain import Drain
from cloud_server.engine import Engine
from cloud_server.guard import Guard
from cloud_server.handshake import Offer, fingerprint_message
from cloud_server.part_service import PartService
from cloud_server.reception import Reception
from cloud_server.refusal import Refusal
from cloud_server.roster import Roster
from cloud_server.session import Limits
from cloud_server.streams import Context, abort, parse
from cloud_server.tune_service import TuneService
from shared import PROTOCOL_VERSION, __version__, wire
from shared.edge_parts import EdgePart
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

SERVICE_NAME = "privatelora.v1.PrivateLoraService"


@dataclass(eq=False)
class Service:
    """Everything behind the RPCs of one server process."""

    config: CloudConfig
    engine: Engine
    offers: dict[bytes, Offer]  # by the fingerprint's plan digest
    edge_parts: list[EdgePart]
    limits: Limits
    guard: Guard = field(default_factory=Guard)
    close: Callable[[], object] = lambda: None  # ends what was started for this service

    def __post_init__(self) -> None:
        """Let edges fetch parts, decode, and tune on the same engine."""
        self.allowances = Allowances(self.config.per_identity)
        self.part_service = PartService(
            self.edge_parts, self.config.max_fetches, self.config.write_timeout_s, self.allowances
        )
        self.drain = Drain(self.config.successor)
        self.roster = Roster(self.config, self.engine.cache, self.guard.may_still)
        self.sessions, self.admission = self.roster.sessions, self.roster.admission
        self.reception = Reception(
            self.config, self.engine, self.offers, self.limits, self.allowances, self.drain, self.roster
        )
        self.decoding = DecodeService(
            self.reception, self.roster, self.allowances, self.drain, self.config.write_timeout_s
        )
        self.tuning = TuneService(self.config, self.engine, self.offers, self.allowances, self.drain)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return handlers that exchange raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Describe": grpc.unary_unary_rpc_method_handler(self.describe),
                "FetchEdgeParts": grpc.unary_stream_rpc_method_handler(self.part_service.fetch),
                "Decode": grpc.stream_stream_rpc_method_handler(self.decoding.decode),
                "Tune": grpc.stream_stream_rpc_method_handler(self.tuning.tune),
            },
        )

    def end(self) -> int:
        """Free what sessions there still are, at the very end; return the bytes of KV cache left in use."""
        for session in list(self.sessions.values()):
            self.roster.forget(session, "stopped")
        return self.engine.cache.bytes_used

    async def describe(self, raw: bytes, context: Context) -> bytes:
        """State what this cloud serves."""
        try:
            parse(pb.DescribeRequest, raw)
        except Refusal as refusal:
            await abort(context, refusal)
        response = pb.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            server_version=__version__,
            plans=[
                pb.PlanOffer(
                    plan_json=o.plan.canonical_json(), fingerprint=fingerprint_message(o.fingerprint)
                )
                for o in self.offers.values()
            ],
            edge_parts=[
                pb.EdgePart(name=part.name, size_bytes=part.size, sha256=part.sha256)
                for part in self.edge_parts
            ],
            limits=pb.Limits(
                max_context_tokens=self.limits.max_context_tokens,
                max_step_tokens=self.limits.max_step_tokens,
                max_rows=self.limits.max_rows,
                max_steps_in_flight=self.limits.max_steps_in_flight,
                grace_period_ms=int(self.config.grace_period_s * 1000),
            ),
            compute_dtype=wire.DTYPE_NAMES[self.config.dtype],
            kv_bytes_used=self.engine.cache.bytes_used,
            kv_bytes_total=self.engine.cache.bytes_total,
            batches=self.engine.batches.count,
            batched_steps=self.engine.batches.steps,
            load=pb.Load(
                sessions=len(self.sessions),
                max_sessions=self.config.max_sessions,
                kv_bytes_claimed=self.admission.claimed_bytes,
                waiting=self.admission.waiting,
                max_waiting=self.config.queue.max_waiting,
                tuning_streams=len(self.tuning.sessions),
                max_tuning_streams=self.config.tuning.max_streams,
            ),
            unix_time_ms=time.time_ns() // 1_000_000,
        )
        return response.SerializeToString()
