"""Fetches of parts over a real channel: edges that do not read, that leave, and too many of them."""

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud_server.allowance import Allowances
from cloud_server.config.identity import IdentityLimits
from cloud_server.part_service import PIECE_BYTES, PartService
from shared.edge_parts import EdgePart
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

Code = grpc.StatusCode
PATIENCE_S = 300.0  # only what hangs takes as long, however slow the machine
SIZE = 12 * PIECE_BYTES + 5  # more than the buffers between two processes hold


def run(folder: Path, act: Callable[[PartService, Any], Awaitable[None]], **options: Any) -> None:
    """Serve one large part to what ``act`` does with the method."""
    path = folder / "edge.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256) + b"the e"[: SIZE % 256])
    service = PartService(
        [EdgePart(path.name, path, SIZE, bytes(32))], **{"most": 2, "patience_s": PATIENCE_S} | options
    )

    async def serve() -> None:
        server = grpc.aio.server()
        handlers = {"Fetch": grpc.unary_stream_rpc_method_handler(service.fetch)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                await asyncio.wait_for(act(service, channel.unary_stream("/t/Fetch")), PATIENCE_S)
        finally:
            await server.stop(0)

    asyncio.run(serve())


def asking(offset: int = 0, index: int = 0) -> bytes:
    return pb.FetchEdgePartsRequest(part_index=index, offset_bytes=offset).SerializeToString()


async def read(call: AsyncIterator[bytes]) -> bytes:
    return b"".join([pb.FetchEdgePartsResponse.FromString(raw).data async for raw in call])


async def ended(call: Any) -> tuple[Code, str]:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await read(call)
    return await call.code(), await call.details()


def test_a_part_arrives_whole_and_from_anywhere(tmp_path: Path) -> None:
    async def act(service: PartService, fetch: Any) -> None:
        whole = (tmp_path / "edge.safetensors").read_bytes()
        for offset in (0, PIECE_BYTES + 3, SIZE - 1, SIZE):
            assert await read(fetch(asking(offset))) == whole[offset:]
        assert service.under_way == 0

    run(tmp_path, act)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (asking(index=1), "part 1 does not exist; there are 1"),
        (asking(offset=SIZE + 1), f"offset {SIZE + 1} is beyond the {SIZE} bytes of edge.safetensors"),
        (b"\xff\xff", "2 bytes that are not a FetchEdgePartsRequest"),
    ],
)
def test_what_is_not_there(tmp_path: Path, raw: bytes, words: str) -> None:
    async def act(service: PartService, fetch: Any) -> None:
        assert await ended(fetch(raw)) == (Code.INVALID_ARGUMENT, words)

    run(tmp_path, act)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file"),
            Code.DATA_LOSS,
            "cannot be read on the cloud's disk",
        ),
        (OSError(errno.EMFILE, "Too many open files"), Code.RESOURCE_EXHAUSTED, "too many files"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_words(
    tmp_path: Path, error: OSError, code: Code, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault of the server, and no path of its disk is told."""
    path = tmp_path / "edge.safetensors"
    error.filename = str(path)

    async def act(service: PartService, fetch: Any) -> None:
        def fail(*_: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", fail)
            found, message = await ended(fetch(asking()))
        assert found is code and words in message and str(tmp_path) not in message
        assert service.under_way == 0
        assert len(await read(fetch(asking()))) == SIZE

    run(tmp_path, act)


def test_edges_that_do_not_read_make_room_after_a_while(tmp_path: Path) -> None:
    async def act(service: PartService, fetch: Any) -> None:
        silent = [fetch(asking()) for _ in range(2)]
        while service.under_way < 2:
            await asyncio.sleep(0.01)
        code, message = await ended(fetch(asking()))
        assert code is Code.RESOURCE_EXHAUSTED and "2 edges fetch parts already" in message
        for call in silent:
            call.cancel()
        while service.under_way:
            await asyncio.sleep(0.01)

        service.patience_s = 0.1  # with those that never read, and with nobody else
        asked = service.traffic.messages_in
        silent = [fetch(asking()) for _ in range(2)]
        while service.traffic.messages_in < asked + 2 or service.under_way:
            await asyncio.sleep(0.01)
        service.patience_s = PATIENCE_S
        assert len(await read(fetch(asking()))) == SIZE
        for call in silent:
            call.cancel()

    run(tmp_path, act)


def test_an_edge_that_leaves_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def act(service: PartService, fetch: Any) -> None:
        for pause in (0.0, 0.001, 0.003, 0.01, 0.03):
            calls = [fetch(asking()) for _ in range(20)]
            await asyncio.sleep(pause)
            for call in calls:
                call.cancel()
        while service.under_way:
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING):
        run(tmp_path, act, most=1000)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


def test_an_identity_fetches_so_many_at_a_time_and_no_more(tmp_path: Path) -> None:
    async def act(service: PartService, fetch: Any) -> None:
        silent = fetch(asking())
        while service.under_way < 1:
            await asyncio.sleep(0.01)
        code, message = await ended(fetch(asking()))
        assert code is Code.RESOURCE_EXHAUSTED and "1 fetches of parts at a time" in message
        silent.cancel()
        while service.under_way:
            await asyncio.sleep(0.01)
        assert len(await read(fetch(asking()))) == SIZE

    allowances = Allowances(IdentityLimits(max_fetches=1))
    run(tmp_path, act, most=10, allowances=allowances)
    assert allowances.of("").fetches == 0
