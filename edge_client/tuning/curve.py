"""The loss curve as a picture: how the loss fell, and which point was kept.

Knows nothing about tuning but its numbers; matplotlib is imported when a picture is drawn, not before.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from shared.cache import replacing

Point = tuple[int, float]  # step (count), loss (nats per token)

WIDTH_INCH, HEIGHT_INCH, DOTS_PER_INCH = 8.0, 4.5, 120
SMOOTHED_OVER = 20  # part of the run that the bold line averages over: 1/20, a few steps at least


def save_curve(
    path: Path | str,
    train: Sequence[Point],
    validation: Sequence[Point] = (),
    best_step: int | None = None,
    title: str = "",
) -> None:
    """Write a PNG file (mode 0600), replacing ``path`` in one step or not at all.

    Parameters
    ----------
    path
        Its folder must exist.
    train
        Loss of each step, in order: drawn light, with its running mean in bold.
    validation
        Loss on the held-out rows, where it was measured.
    best_step
        Step whose personal weights were kept; marked if it is among the points.
    title
        Shown as it is.

    Raises
    ------
    ValueError
        If there is no finite loss to draw.
    """
    if not any(math.isfinite(loss) for _, loss in [*train, *validation]):
        raise ValueError("there is no finite loss to draw")
    # Without pyplot, which keeps figures in a global list and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCH, HEIGHT_INCH), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps = [step for step, _ in train]
        marker = "o" if len(train) == 1 else ""
        axes.plot(steps, [loss for _, loss in train], color="#9ecae1", linewidth=1, marker=marker)
        smooth = smoothed([loss for _, loss in train])
        axes.plot(steps, smooth, color="#08519c", linewidth=2.2, label="train (running mean)")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o--", color="#d94801", label="validation")
    best = dict(train) | dict(validation)
    if best_step in best and math.isfinite(best[best_step]):
        at = (best_step, best[best_step])
        axes.plot(*at, "*", color="black", markersize=15, zorder=5, label=f"kept: step {at[0]}, {at[1]:.4g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title, parse_math=False)
    with warnings.catch_warnings(), replacing(Path(path)) as file:
        warnings.simplefilter("ignore", UserWarning)  # a title in a script that the font lacks
        figure.savefig(file, format="png", metadata={"Software": None})


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential running mean, unbiased from the first step on; other than finite is skipped."""
    keep = 1 - 1 / max(3.0, len(losses) / SMOOTHED_OVER)
    total = weight = 0.0
    means = []
    for loss in losses:
        if math.isfinite(loss):
            total, weight = keep * total + loss, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means
