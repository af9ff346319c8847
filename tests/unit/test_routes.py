"""A channel that has failed one stream is closed when nothing is under way on it, and not before.

And of several addresses the first is taken that answers.
"""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from edge_client.credentials import Credentials
from edge_client.describing import CloudConnectionError, Describing
from edge_client.replicas import Replicas
from edge_client.routes import Route, Routes

WAIT_S = 300.0  # only what hangs takes as long, however slow the machine
Describe = Callable[[bytes, grpc.aio.ServicerContext], Awaitable[bytes]]


async def serving(describe: Describe) -> tuple[grpc.aio.Server, str]:
    """Start a server that answers one method; return it and its address."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(describe)
    service = grpc.method_handlers_generic_handler("privatelora.v1.PrivateLoraService", {"Describe": handler})
    server.add_generic_rpc_handlers((service,))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    return server, address


async def test_what_is_under_way_on_a_channel_outlives_its_being_set_aside() -> None:
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def describe(raw: bytes, context: object) -> bytes:
        asked.set()
        await may_answer.wait()
        return b"here"

    server, address = await serving(describe)
    replicas = Replicas(address)
    routes = Routes(Credentials(), replicas)
    describing = Describing(routes, replicas, tls=False, patience_s=WAIT_S)
    try:
        answer = asyncio.create_task(describing.at_once(address))
        await asyncio.wait_for(asked.wait(), WAIT_S)
        route = routes.known(address)
        assert route is not None
        await routes.set_aside(route)  # as another session's failure does
        may_answer.set()
        assert await asyncio.wait_for(answer, WAIT_S) == b"here"
        fresh = await routes.to(address)
        assert fresh is not route and route.streams == fresh.streams == 0
        assert route.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    finally:
        await routes.close()
        await server.stop(None)


async def test_two_that_tidy_at_once_close_each_channel_once() -> None:
    addresses = ["127.0.0.1:1", "127.0.0.1:2"]
    routes = Routes(Credentials(), Replicas(",".join(addresses)))
    closed: list[str] = []

    def slow_to_close(route: Route) -> None:
        close = route.channel.close

        async def slowly(grace: float | None = None) -> None:
            closed.append(route.address)
            await asyncio.sleep(0)  # somebody else's turn
            await close(grace)

        route.channel.close = slowly  # type: ignore[method-assign]

    async with routes.use(addresses[0]) as one, routes.use(addresses[1]) as two:
        for route in (one, two):
            slow_to_close(route)
            await routes.set_aside(route)
    await asyncio.gather(routes.to("127.0.0.1:3"), routes.to("127.0.0.1:3"))
    assert closed == addresses
    await routes.close()


async def test_one_that_refuses_does_not_keep_an_edge_from_the_others() -> None:
    asked: list[str] = []

    async def refuse(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        asked.append("refused")
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        raise AssertionError("abort raises")

    async def answer(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        asked.append("answered")
        return b"here"

    (one, refusing), (two, good), (three, another) = [await serving(d) for d in (refuse, answer, refuse)]
    try:
        replicas = Replicas(f"{refusing},{good}")
        routes = Routes(Credentials(), replicas)
        assert await Describing(routes, replicas, tls=False, patience_s=WAIT_S).first() == b"here"
        assert asked == ["refused", "answered"] and replicas.current == good
        await routes.close()

        asked.clear()
        replicas = Replicas(f"{refusing},{another}")
        routes = Routes(Credentials(), replicas)
        with pytest.raises(CloudConnectionError, match=f"{refusing}: UNAUTHENTICATED: no token"):
            await Describing(routes, replicas, tls=False, patience_s=WAIT_S).first()
        assert asked == ["refused"] * 2, "once each: it does not become right by waiting"
        await routes.close()
    finally:
        for server in (one, two, three):
            await server.stop(None)


async def test_one_that_says_nothing_does_not_keep_an_edge_from_the_others() -> None:
    async def say_nothing(raw: bytes, context: object) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def answer(raw: bytes, context: object) -> bytes:
        return b"here"

    (one, silent), (two, mute), (three, good) = [await serving(d) for d in (say_nothing, say_nothing, answer)]
    replicas = Replicas(f"{silent},{mute},{good}")
    routes = Routes(Credentials(), replicas)
    try:  # one after the other, this would take hours
        assert await Describing(routes, replicas, tls=False, patience_s=36_000.0).first() == b"here"
        assert replicas.current == good
        assert not [route for route in map(routes.known, replicas.own) if route is not None and route.streams]
    finally:
        await routes.close()
        for server in (one, two, three):
            await server.stop(None)


async def test_one_that_comes_up_late_is_found_though_another_says_nothing() -> None:
    asked = 0

    async def say_nothing(raw: bytes, context: object) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def answer_the_third(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        nonlocal asked
        asked += 1
        if asked < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "still loading")
        return b"here"

    (one, silent), (two, late) = [await serving(d) for d in (say_nothing, answer_the_third)]
    replicas = Replicas(f"{silent},{late}")
    routes = Routes(Credentials(), replicas)
    try:
        assert await Describing(routes, replicas, tls=False, patience_s=36_000.0).first() == b"here"
        assert asked == 3 and replicas.current == late
    finally:
        await routes.close()
        for server in (one, two):
            await server.stop(None)


async def test_where_nobody_answers_in_time_all_addresses_are_named() -> None:
    async def say_nothing(raw: bytes, context: object) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    server, silent = await serving(say_nothing)
    replicas = Replicas(f"{silent},127.0.0.1:1")
    routes = Routes(Credentials(), replicas)
    try:
        with pytest.raises(CloudConnectionError, match=rf"no cloud answers at {silent} or 127\.0\.0\.1:1"):
            await Describing(routes, replicas, tls=False, patience_s=0.5).first()
    finally:
        await routes.close()
        await server.stop(None)
