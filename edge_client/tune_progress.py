"""What a person sees while tuning: a bar with loss, speed and time left; in a log, a line now and then.

Shows numbers only. What a cloud says of itself is stripped of anything that could steer a terminal.
"""

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from edge_client.tuning.checkpoint import State
from edge_client.tuning.trainer import Trainer, Watcher

MEMORY = 0.9  # of the running means that are shown
LINE_EVERY_S = 30.0  # in a log


class Progress(Watcher):
    """A bar in a terminal, lines in a log; from ``with`` to `close`.

    Parameters
    ----------
    file
        Where to.
    """

    def __init__(self, file: TextIO) -> None:
        self._console = Console(file=file, highlight=False, markup=False)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._loss = self._tokens = self._seconds = self._weight = 0.0
        self._validation = ""
        self._last_line_s = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; more than once does no harm."""
        self._bars.stop()

    def reading(self, rows: int) -> None:
        """Begin with the rows."""
        self._begin("reading rows", rows)

    def advance(self) -> None:
        """Note one row more."""
        assert self._task is not None
        self._bars.advance(self._task)

    def measuring(self, what: str, total: int) -> None:
        """Go on with something else, of which `advance` counts ``total``."""
        self._begin(what, total)

    def note(self, text: str) -> None:
        """Say what begins."""
        self._console.print(text, soft_wrap=True)

    def training(self, trainer: Trainer) -> None:
        """Go on with the steps."""
        state, self._total = trainer.state, trainer.total_steps
        self._begin("tuning", self._total, state.step)
        held = f", {len(trainer.validation):,} held out" if trainer.validation else ""
        begun = f", from step {state.step}" if state.step else ""
        self._console.print(
            f"{len(trainer.train):,} to learn from{held}; {self._total:,} steps of up to "
            f"{trainer.config.batch_size} examples, learning rate {trainer.lr:g}{begun}"
        )

    def stepped(self, state: State, loss: float, tokens: int, seconds: float) -> None:
        """Show one step."""
        keep = MEMORY
        self._loss, self._weight = keep * self._loss + loss, keep * self._weight + 1
        self._tokens, self._seconds = keep * self._tokens + tokens, keep * self._seconds + seconds
        rate = self._tokens / max(self._seconds, 1e-9)
        figures = f"loss {self._loss / self._weight:.3f}{self._validation}, {rate:.0f} tok/s"
        if self._task is not None:
            self._bars.update(self._task, completed=state.step, figures=figures)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line_s > LINE_EVERY_S:
            self._last_line_s = now
            left = (self._total - state.step) * self._seconds / self._weight
            self._console.print(f"step {state.step}/{self._total}: {figures}, {left / 60:.1f} min left")

    def validated(self, state: State, loss: float) -> None:
        """Show one validation."""
        self._validation = f", validation {loss:.3f}"
        best = " (best)" if state.best_step == state.step else ""
        self._console.print(f"step {state.step}: validation loss {loss:.4f}{best}")

    def waiting(self, error: Exception, seconds: float) -> None:
        """Say why nothing happens."""
        words = "".join(c if c.isprintable() else " " for c in str(error))[:300]
        self._console.print(f"{words}; trying again in {seconds:.0f} s", soft_wrap=True)

    def _begin(self, text: str, total: int, done: int = 0) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total, completed=done, figures="")
