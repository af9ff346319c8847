"""``python -m tests.integration.halting_edge STEP tune ...``: an edge that halts in the middle of a step.

A test that looks on until a run has got so far, to interrupt it then, comes too late on a machine that lets
it wait: the run is over. This one waits for the test, stopped as a whole (SIGSTOP) when ``STEP`` steps are
done and the next one's batch has been run forward but not back; SIGCONT lets it go on. It halts once.
"""

import os
import signal
import sys
from typing import Any

from edge_client import cli
from edge_client.tuning.stream import TuneStream
from edge_client.tuning.trainer import Trainer


def halting(after: int) -> None:
    """Halt when so many steps are done and the next is under way."""
    step, backward = Trainer._step, TuneStream.backward
    done, halted = -1, False

    def noted(trainer: Trainer) -> None:
        nonlocal done
        done = trainer.state.step
        step(trainer)

    def late(stream: TuneStream, *args: Any) -> Any:
        nonlocal halted
        if done >= after and not halted:
            halted = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return backward(stream, *args)

    Trainer._step, TuneStream.backward = noted, late  # type: ignore[method-assign]


if __name__ == "__main__":
    halting(int(sys.argv.pop(1)))
    cli.main()
