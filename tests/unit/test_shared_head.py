"""A head that threads share: everybody gets their own rows' result, whoever computed it."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from edge_client.shared_head import MOST_ROWS, SharedHead

WAIT_S = 300.0  # only what hangs takes as long, however slow the machine


class Gate:
    """A head that tells when it runs and goes on when it is let; it doubles."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.entered, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.fault: BaseException | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        self.runs.append(len(rows))
        self.entered.release()
        assert self.open.acquire(timeout=WAIT_S)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        return rows * 2


class Caller(threading.Thread):
    """Asks for the head of some rows in a thread of its own."""

    def __init__(self, head: SharedHead, rows: Tensor, inference: bool = False) -> None:
        super().__init__(daemon=True)
        self.head, self.rows, self.inference = head, rows, inference
        self.result: Tensor | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            with torch.inference_mode(self.inference):
                self.result = self.head(self.rows)
        except BaseException as error:
            self.error = error

    def ended(self) -> "Caller":
        self.join(WAIT_S)
        assert not self.is_alive()
        return self


def waiting(head: SharedHead, count: int) -> None:
    """Wait until so many calls are in line, the one that runs among them."""
    while len(head._waiting) != count:
        time.sleep(0.001)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.release(100)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed))


def test_calls_that_come_while_it_runs_are_run_as_one(gate: Gate) -> None:
    head = SharedHead(gate)
    given = [rows(i, 1 + i % 2, 1) for i in range(5)]  # (batch, positions, hidden_size)
    callers = [Caller(head, given[0])]
    assert gate.entered.acquire(timeout=WAIT_S)
    for i, more in enumerate(given[1:]):
        callers.append(Caller(head, more))
        waiting(head, 2 + i)
    gate.open.release(2)
    for caller, mine in zip(callers, given, strict=True):
        result = caller.ended().result
        assert result is not None
        assert torch.equal(result, mine * 2)
    assert gate.runs == [1, 6]
    assert not head._running
    assert not head._waiting


def test_results_are_ordinary_tensors_whoever_computed_them(gate: Gate) -> None:
    head = SharedHead(gate)
    first = Caller(head, rows(0, 1), inference=True)
    assert gate.entered.acquire(timeout=WAIT_S)
    leader = Caller(head, rows(1, 1), inference=True)
    waiting(head, 2)
    follower = Caller(head, rows(2, 1))
    waiting(head, 3)
    gate.open.release(2)
    for caller in (first, leader, follower):
        result = caller.ended().result
        assert result is not None
        result += 1  # refused for a tensor that was made in inference mode
    assert gate.runs == [1, 2]


def test_an_error_reaches_everybody_it_concerns_and_nobody_after_them(gate: Gate) -> None:
    head = SharedHead(gate)
    first = Caller(head, rows(0, 1))
    assert gate.entered.acquire(timeout=WAIT_S)
    others = [Caller(head, rows(i, 1)) for i in (1, 2)]
    waiting(head, 3)
    gate.open.release()
    first.ended()
    assert gate.entered.acquire(timeout=WAIT_S)
    gate.fault = MemoryError("no room")
    gate.open.release()
    assert all(isinstance(other.ended().error, MemoryError) for other in others)
    gate.open.release()
    assert torch.equal(head(rows(3, 1)), rows(3, 1) * 2)


def test_those_behind_an_interrupted_thread_go_on(gate: Gate) -> None:
    head = SharedHead(gate)
    interrupted = Caller(head, rows(0, 1))
    assert gate.entered.acquire(timeout=WAIT_S)
    others = [Caller(head, rows(i, 1)) for i in (1, 2)]
    waiting(head, 3)
    gate.fault = KeyboardInterrupt()
    gate.open.release(2)
    assert isinstance(interrupted.ended().error, KeyboardInterrupt)
    for i, other in enumerate(others, 1):
        result = other.ended().result
        assert result is not None
        assert torch.equal(result, rows(i, 1) * 2)
    assert gate.runs == [1, 2]


def test_an_interrupt_while_another_thread_runs_my_rows_with_its_own(gate: Gate) -> None:
    head = SharedHead(gate)
    callers = [Caller(head, rows(0, 1))]
    assert gate.entered.acquire(timeout=WAIT_S)
    callers.append(Caller(head, rows(1, 1)))
    waiting(head, 2)
    callers.append(Caller(head, rows(2, 1)))
    waiting(head, 3)
    gate.open.release()
    callers[0].ended()
    assert gate.entered.acquire(timeout=WAIT_S)  # the second now runs its own rows and the third's
    gate.fault = KeyboardInterrupt()
    gate.open.release(2)
    assert isinstance(callers[1].ended().error, KeyboardInterrupt)
    result = callers[2].ended().result
    assert result is not None
    assert torch.equal(result, rows(2, 1) * 2)
    assert gate.runs == [1, 2, 1]


def test_a_prompts_logits_are_nobody_elses_business(gate: Gate) -> None:
    head = SharedHead(gate)
    long = Caller(head, rows(0, MOST_ROWS + 1))
    assert gate.entered.acquire(timeout=WAIT_S)
    short = Caller(head, rows(1, 1))
    assert gate.entered.acquire(timeout=WAIT_S)  # does not wait for the long one
    gate.open.release(2)
    assert torch.equal(long.ended().result, rows(0, MOST_ROWS + 1) * 2)  # type: ignore[arg-type]
    assert torch.equal(short.ended().result, rows(1, 1) * 2)  # type: ignore[arg-type]
    assert sorted(gate.runs) == [1, MOST_ROWS + 1]


def after_a_run_of(gate: Gate, count: int) -> SharedHead:
    """Return a head that was used by so many threads at a time, and is idle."""
    head = SharedHead(gate)
    callers = [Caller(head, rows(0, 1))]
    assert gate.entered.acquire(timeout=WAIT_S)
    for i in range(1, count):
        callers.append(Caller(head, rows(i, 1)))
        waiting(head, 1 + i)
    gate.open.release(2 if count > 1 else 1)
    for caller in callers:
        caller.ended()
    while gate.entered.acquire(blocking=False):
        pass
    gate.runs.clear()
    return head


def test_those_who_came_together_are_waited_for_the_next_time(gate: Gate) -> None:
    head = after_a_run_of(gate, 3)
    head._run_s = WAIT_S
    gate.open.release()
    callers = []
    for i in range(3):
        assert not gate.runs
        callers.append(Caller(head, rows(i, 1)))
        if i < 2:
            waiting(head, 1 + i)
    for i, caller in enumerate(callers):
        assert torch.equal(caller.ended().result, rows(i, 1) * 2)  # type: ignore[arg-type]
    assert gate.runs == [3]


def test_nobody_is_waited_for_longer_than_a_run_takes(gate: Gate) -> None:
    head = after_a_run_of(gate, 3)
    head._run_s = 0.01
    gate.open.release(2)
    for i in range(2):  # nor at all, once somebody has come alone
        assert torch.equal(Caller(head, rows(i, 1)).ended().result, rows(i, 1) * 2)  # type: ignore[arg-type]
        head._run_s = 2 * WAIT_S
    assert gate.runs == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5, 15, 16, 70])
def test_a_linear_head_gives_each_row_its_own_logits(count: int, bias: bool, dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(4, 11, bias=bias, dtype=dtype)
    given = rows(count, count).to(dtype)
    found = SharedHead(linear)._run(given)
    assert found.shape == (count, 11) and found.dtype == dtype and found.is_contiguous()
    torch.testing.assert_close(found, torch.cat([linear(row[None]) for row in given]).detach())
