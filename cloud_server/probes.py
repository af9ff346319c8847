"""A port for the probes of a container or a cluster: gRPC's health check alone, in clear, to everybody.

Probes know neither certificates nor tokens, and the health check is open to all in any case: it tells no more
than whether the server takes requests. Readiness is the whole server's (the empty service name, or the
service's own); `LIVENESS` is a service that is well for as long as anything is answered, while draining too.
"""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from cloud_server.addresses import cannot_answer_probes

LIVENESS = "liveness"
MAX_MESSAGE_BYTES = 4096
OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES))


def handlers(health: HealthServicer) -> grpc.GenericRpcHandler:
    """Return the handler of `Check` alone: nothing that could be held open."""
    from cloud_server.open_method import in_brief  # imports torch, which `privatelora-cloud health` does not

    async def check(request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service == LIVENESS:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
        return await health.Check(request, context)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=health_pb2.HealthCheckRequest.FromString,
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": in_brief(handler)})


async def open_probes(address: str | None, health: HealthServicer) -> grpc.aio.Server | None:
    """Answer probes at HOST:PORT until the server that is returned is stopped; None answers none.

    Raises
    ------
    OSError
        If the port is taken or the address is not ours.
    """
    if address is None:
        return None
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((handlers(health),))
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise cannot_answer_probes(address) from None
    await server.start()
    return server


def health_of(address: str, service: str = "", timeout_s: float = 5.0) -> str:
    """Return what a health check in clear says: SERVING, NOT_SERVING, or why it says nothing."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
