"""Asking clouds what they are: the first of several that answers, or one that has failed, at once.

The answer is kept with the channel, so that a channel which has one is known to lead to a cloud that lives.
Used on the connection's thread only.
"""

import asyncio
import contextlib
from typing import Any

import grpc

from edge_client.credentials import tls_problem
from edge_client.plain import one_line
from edge_client.replicas import Replicas
from edge_client.routes import Route, Routes
from edge_client.streams import SessionError
from shared import PROTOCOL_VERSION
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

Code = grpc.StatusCode
DESCRIBE = "/privatelora.v1.PrivateLoraService/Describe"
PAUSE_S = 0.2  # before an address that nobody answers at is asked again
HEAD_START_S = 1.0  # of each address before the next, as in RFC 8305: one that says nothing costs no more
AWAY = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


class CloudConnectionError(ConnectionError):
    """The cloud cannot be reached, or refused; the message says what to do."""


class Describing:
    """Asks the clouds of one connection.

    Parameters
    ----------
    routes, replicas
        Of the connection.
    tls
        Whether it is encrypted.
    patience_s
        Longest wait for an answer (seconds).
    """

    def __init__(self, routes: Routes, replicas: Replicas, *, tls: bool, patience_s: float) -> None:
        self._routes, self._replicas, self._tls, self._patience_s = routes, replicas, tls, patience_s

    async def first(self) -> bytes:
        """Return what the first address states that answers; it is the current one from now on.

        Raises
        ------
        CloudConnectionError
            If none does in time.
        """
        if len(self._replicas.own) > 1:
            return await self._one_of_several()
        target = self._replicas.current
        async with self._routes.use(target) as route:
            if self._tls:  # only without waiting does gRPC say what is wrong
                try:
                    return await self._ask(route)
                except grpc.aio.AioRpcError as error:
                    if problem := tls_problem(error.details() or "", target):
                        raise _wrong_certificate(target, problem) from None
            raw: bytes = await self.translated(self._ask(route, wait_for_ready=True))
            return raw

    async def at_once(self, address: str) -> bytes:
        """Return what an address states; ask it if it is new, or has failed since it was asked.

        Raises
        ------
        SessionError
            If it does not answer.
        """
        async with self._routes.use(address) as route:
            try:
                return route.described if route.described is not None else await self._ask(route)
            except grpc.aio.AioRpcError as error:
                details = error.details() or ""
                name = self._replicas.certificate_name(address)
                problem = tls_problem(
                    details, address if name is None else f"{name}:{address.rpartition(':')[2]}"
                )
                if problem is not None and problem.startswith("its certificate"):  # does not pass by itself
                    self._replicas.forget(address)
                    words = f"{address}: {problem}; nothing was sent"
                    raise SessionError(words, Code.UNAUTHENTICATED) from None
                raise SessionError(
                    f"{address} does not answer ({one_line(details)[:200]})", error.code()
                ) from None

    async def translated(self, awaitable: Any) -> Any:
        """Wait for a call; say in words why it failed."""
        target = self._replicas.current
        try:
            return await awaitable
        except grpc.aio.AioRpcError as error:
            if error.code() in AWAY:
                raise self._nobody() from None
            raise _refusal(target, error) from None

    async def _one_of_several(self) -> bytes:
        """Return what the first address states that answers.

        Who refuses is asked no more: neither a token nor a certificate becomes right by waiting. It is the
        end only if no other answers.
        """
        loop, refusals = asyncio.get_running_loop(), list[CloudConnectionError]()
        until, before = loop.time() + self._patience_s, asyncio.Event()
        before.set()
        asking: dict[asyncio.Task[bytes], str] = {}
        for number, address in enumerate(self._replicas.own):
            away = asyncio.Event()
            asking[loop.create_task(self._in_turn(address, before, number * HEAD_START_S, away))] = address
            before = away
        try:
            while asking and (left_s := until - loop.time()) > 0:
                done, _ = await asyncio.wait(asking, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    address = asking.pop(task)
                    try:
                        found = task.result()
                    except CloudConnectionError as refusal:
                        refusals.append(refusal)
                    else:
                        self._replicas.current = address
                        return found
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        raise refusals[0] if refusals else self._nobody()

    async def _in_turn(
        self, address: str, before: asyncio.Event, longest_wait_s: float, away: asyncio.Event
    ) -> bytes:
        """Ask one address until it answers or refuses.

        Begins when nobody is at the one ``before``, or after so long; says ``away`` to the next.
        """
        with contextlib.suppress(asyncio.TimeoutError):  # not the built-in one before Python 3.11
            await asyncio.wait_for(before.wait(), longest_wait_s or None)
        try:
            while True:
                try:
                    async with self._routes.use(address) as route:
                        return await self._ask(route)
                except grpc.aio.AioRpcError as error:
                    if self._tls and (problem := tls_problem(error.details() or "", address)):
                        raise _wrong_certificate(address, problem) from None
                    if error.code() not in AWAY:
                        raise _refusal(address, error) from None
                await self._routes.set_aside(route)
                away.set()
                await asyncio.sleep(PAUSE_S)
        finally:
            away.set()

    def _nobody(self) -> CloudConnectionError:
        encrypted = "" if self._tls else " Or does it serve TLS? Then give --tls-ca or --tls"
        return CloudConnectionError(
            f"no cloud answers at {' or '.join(self._replicas.own)} (waited up to "
            f"{self._patience_s:.0f} s); is `privatelora-cloud serve` running there, and is the "
            f"address right?{encrypted}"
        )

    async def _ask(self, route: Route, **options: Any) -> bytes:
        request = pb.DescribeRequest(protocol_version=PROTOCOL_VERSION).SerializeToString()
        call = route.channel.unary_unary(DESCRIBE, _as_bytes, _as_bytes)
        route.described = bytes(await call(request, timeout=self._patience_s, **options))
        return route.described


def _wrong_certificate(address: str, problem: str) -> CloudConnectionError:
    return CloudConnectionError(f"{address}: {problem}; nothing was sent")


def _refusal(address: str, error: grpc.aio.AioRpcError) -> CloudConnectionError:
    return CloudConnectionError(f"{address}: {error.code().name}: {one_line(error.details() or '')}")


def _as_bytes(raw: bytes) -> bytes:
    return raw
