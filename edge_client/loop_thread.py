"""An event loop on a thread of its own, for callers on other threads that wait for what it does.

Ends in order: whoever still waits when it is closed, or asks later, is told so and waits no more. Its loop
then waits for the next thread: gRPC keeps every loop that it has seen, 250 KB each, for as long as the
process has any channel or server, so there are never more than were in use at a time.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
END_S = 5.0  # for what is cancelled to be over
_idle: list[asyncio.AbstractEventLoop] = []  # loops that no thread runs


class ClosedError(RuntimeError):
    """Something was asked of a connection that has been closed."""

    def __init__(self) -> None:
        super().__init__(
            "this connection to the cloud was closed (`close()`, or the end of a `with` block); make a new "
            "one, such as with `PrivateLoraForCausalLM.from_cloud`"
        )


class LoopThread:
    """A running event loop.

    Parameters
    ----------
    name
        Of its thread.
    """

    def __init__(self, name: str) -> None:
        self.loop = _take_loop()
        self._closed, self._closing = False, threading.Lock()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread is there: in a fork it is not."""
        return self._thread.is_alive()

    def wait(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine there and return its result.

        Raises
        ------
        ClosedError
            If the thread has ended, or ends meanwhile.
        concurrent.futures.TimeoutError
            If it takes longer than ``timeout_s`` (seconds); the coroutine is cancelled.
        """
        with self._closing:  # what is submitted after the last look of `close` would never run
            if self._closed:
                coroutine.close()
                raise ClosedError
            future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except CancelledError:
            if self._closed:
                raise ClosedError from None
            raise
        finally:
            future.cancel()  # if it is not done

    def close(self) -> None:
        """Cancel whatever is under way, and end the thread."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=END_S)
        if not self._thread.is_alive():
            _idle.append(self.loop)


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=END_S)


def _take_loop() -> asyncio.AbstractEventLoop:
    try:
        return _idle.pop()
    except IndexError:
        return _new_loop()


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform == "win32":
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


if hasattr(os, "register_at_fork"):  # what the parent's loops poll is not the child's
    os.register_at_fork(after_in_child=_idle.clear)
