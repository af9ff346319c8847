"""Who uses what was closed is told so at once, and who still waits waits no more."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edge_client.connection import ClosedError, Connection
from edge_client.loop_thread import LoopThread
from tests.families import prompts, save
from tests.replicas import Fleet, edge

PROMPT = torch.tensor([prompts(1)[0]])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(save("llama", tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


async def for_ever(started: threading.Event) -> None:
    started.set()
    await asyncio.Event().wait()


async def running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_closed_model_says_so(fleet: Fleet, tmp_path: Path) -> None:
    model = edge(fleet.replica().address, tmp_path)
    kept = model(PROMPT, use_cache=True).past_key_values
    model.close()
    with pytest.raises(ClosedError, match="was closed.*from_cloud"):
        model.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(ClosedError):
        model(PROMPT[:, :1], past_key_values=kept)
    model.close()


def test_a_closed_connection_answers_no_question(fleet: Fleet) -> None:
    connection = Connection(fleet.replica().address)
    connection.describe()
    connection.close()
    for ask in (connection.describe, lambda: connection.described(connection.target)):
        with pytest.raises(ClosedError):
            ask()
    with pytest.raises(ClosedError):
        next(connection.fetch_part(0))


def test_a_model_closed_by_another_thread_ends_what_is_under_way(fleet: Fleet, tmp_path: Path) -> None:
    model = edge(fleet.replica().address, tmp_path)
    under_way, ends = threading.Event(), list[BaseException]()

    class Streamer:
        def put(self, value: object) -> None:
            under_way.set()

        def end(self) -> None:
            pass

    def generate() -> None:
        try:
            while True:
                model.generate(PROMPT, max_new_tokens=50, streamer=Streamer())
        except BaseException as error:
            ends.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    under_way.wait()
    model.close()
    thread.join()
    assert isinstance(ends[0], ClosedError | ConnectionError), ends


def test_who_waits_when_the_thread_ends_is_told(tmp_path: Path) -> None:
    thread, started, ends = LoopThread("test"), threading.Event(), list[BaseException]()

    def wait() -> None:
        try:
            thread.wait(for_ever(started))
        except BaseException as error:
            ends.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    started.wait()
    thread.close()
    waiting.join()
    assert isinstance(ends[0], ClosedError) and not thread.is_alive
    with pytest.raises(ClosedError):
        thread.wait(for_ever(started))


def test_loops_are_used_again() -> None:
    """Else gRPC keeps each for as long as another connection is there: 250 KB."""
    kept, loops = LoopThread("test"), set[asyncio.AbstractEventLoop]()
    for _ in range(3):
        threads = [LoopThread("test"), LoopThread("test")]
        for thread in threads:
            assert thread.wait(running_loop()) is thread.loop
            loops.add(thread.loop)
        for thread in threads:
            thread.close()
    kept.close()
    assert len(loops) == 2 and kept.loop not in loops


def test_what_takes_too_long_is_cancelled() -> None:
    thread, cancelled = LoopThread("test"), threading.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        thread.wait(work(), timeout_s=0.01)
    assert cancelled.wait(600)
    thread.close()
