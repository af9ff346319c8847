"""How a stream's end is put in words where gRPC itself has lost what the cloud said (real channel)."""

from concurrent.futures import ThreadPoolExecutor

import grpc

from edge_client.backoff import may_pass
from edge_client.streams import failure


async def test_a_stream_that_ended_while_a_message_was_sent() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/s/m")()
            # what gRPC does when it cannot hand a message down, since the stream has just ended
            call._cython_call.set_internal_error("a batch failed")
            error = await failure(call)
    finally:
        server.stop(None)
    assert "ended while a message was being sent" in str(error)
    assert may_pass(error)
