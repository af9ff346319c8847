"""Channels to addresses: one each while it works, a fresh one after it has failed.

A channel that has lost its server keeps its own idea of when to connect again, and one whose TCP connection
is dead without knowing it stays so for as long as keepalive takes. So what has failed is set aside, and
closed when the last stream on it has ended. Used on the connection's thread only.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from edge_client.credentials import Credentials
from edge_client.replicas import Replicas
from edge_client.streams import SessionError

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),  # a hostile cloud cannot make us buffer more
    ("grpc.keepalive_time_ms", 20_000),  # a cloud that is frozen, or a link that is cut, answers no ping
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # its pings delay exchanges; a fixed window does instead
    ("grpc.http2.lookahead_bytes", 2 << 20),  # more than 100 Mbit/s x 80 ms has under way
    ("grpc.max_reconnect_backoff_ms", 5_000),  # a cloud that restarts is found again soon
    ("grpc.use_local_subchannel_pool", 1),  # or a fresh channel would share a dead connection
)


@dataclass(eq=False)
class Route:
    """A channel to one address. ``described`` is what the cloud there stated when it was last asked."""

    address: str
    channel: grpc.aio.Channel
    streams: int = 0  # that have not been closed, and whatever else is under way on it
    described: bytes | None = None


class Routes:
    """The channels of one connection."""

    def __init__(self, credentials: Credentials, replicas: Replicas) -> None:
        self._credentials, self._replicas = credentials, replicas
        self._open: dict[str, Route] = {}
        self._aside: list[Route] = []

    async def to(self, address: str) -> Route:
        """Return the channel in use for an address."""
        await self.tidy()
        route = self._open.get(address)
        if route is None:
            options: list[tuple[str, int | str]] = list(CHANNEL_OPTIONS)
            if (name := self._replicas.certificate_name(address)) is not None:
                options.append(("grpc.ssl_target_name_override", name))
            route = self._open[address] = Route(address, self._credentials.channel(address, options))
        return route

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[Route]:
        """Keep the channel in use for an address from being closed, though it may be set aside meanwhile.

        Another thread's failure sets a channel aside while a handshake of this one is under way on it;
        closed, it would cancel that. A `SessionError` on the way out is told where it happened.
        """
        route = await self.to(address)
        route.streams += 1
        try:
            yield route
        except SessionError as error:
            error.address, error.route = address, route
            raise
        finally:
            route.streams -= 1

    def known(self, address: str) -> Route | None:
        """Return the channel in use for an address, None if there is none."""
        return self._open.get(address)

    async def set_aside(self, route: Route) -> None:
        """Make `to` return a fresh channel from now on."""
        if self._open.get(route.address) is route:
            del self._open[route.address]
            self._aside.append(route)
        await self.tidy()

    async def close(self) -> None:
        """Close every channel."""
        for route in [*self._open.values(), *self._aside]:
            await route.channel.close()
        self._open.clear()
        self._aside.clear()

    async def tidy(self) -> None:
        """Close what is set aside and has no stream any more."""
        while (ended := next((route for route in self._aside if route.streams <= 0), None)) is not None:
            self._aside.remove(ended)  # before the wait, in which somebody else may tidy too
            await ended.channel.close()
