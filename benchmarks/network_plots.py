"""Two plots of what a network costs: speed by round-trip time, and quality by bytes per token.

    python -m benchmarks.network_plots speed       # of what `decode_over_link run --label sweep` has recorded
    python -m benchmarks.network_plots quality     # of the tuning runs, with the wire's bytes by formula

Both only read records. The points of the first are measured ones; those of the second are test scores at the
learning rate that validation rows chose, mean over the seeds, with the 95 % interval of the test rows.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import decode_record
from benchmarks.decode_over_link import RECORD
from benchmarks.decode_record import PLAIN, Answered
from benchmarks.processes import ROOT

TUNING_RECORD = Path(__file__).with_name("tuning_runs.jsonl")
SPEED, QUALITY = ROOT / "docs" / "speed_by_rtt.png", ROOT / "docs" / "quality_by_bytes.png"


@dataclass(frozen=True)
class Speed:
    """One point: tokens/s over a link with this round-trip time (milliseconds)."""

    rtt_ms: float
    tok_s: float


def speeds(rows: Iterable[Answered]) -> dict[str, list[Speed]]:
    """Return the points of every plan in the order of their round-trip times; ``plain`` has but one."""
    groups: dict[tuple[str, str], list[Answered]] = defaultdict(list)
    for row in rows:
        name = f"{row.plan}, drafting" if row.drafted else row.plan
        groups[name, row.preset].append(row)
    lines: dict[str, list[Speed]] = defaultdict(list)
    for (name, _), found in groups.items():
        if one := decode_record.summary(found):
            lines[name].append(Speed(one.rtt_ms, one.tok_s))
    return {name: sorted(points, key=lambda point: point.rtt_ms) for name, points in lines.items()}


# Where a legend hides no point.
BELOW: dict[str, Any] = {
    "fontsize": "small", "loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2,
}  # fmt: skip


def plot_speed(lines: dict[str, list[Speed]], title: str, path: Path) -> None:
    """Draw tokens/s by round-trip time, a line for each plan."""
    figure, axis, close = _figure(1)
    for name, points in sorted(lines.items(), key=lambda line: -line[1][-1].tok_s):
        if name == PLAIN:
            axis[0].axhline(points[0].tok_s, color="grey", linestyle="--", label="whole model, no network")
        else:
            axis[0].plot([p.rtt_ms for p in points], [p.tok_s for p in points], "o-", label=name)
    axis[0].set(xlabel="round-trip time (ms)", ylabel="tokens/s (log)", yscale="log", title=title)
    axis[0].grid(alpha=0.3, which="both")
    axis[0].legend(**BELOW)
    close(figure, path)


@dataclass(frozen=True)
class Quality:
    """One point: what a method reached on a task, and what a decoded token of it sends both ways (bytes).

    ``share`` of the test rows was right, ``low`` and ``high`` are its 95 % interval; 0 bytes: no split.
    """

    task: str
    method: str
    bytes_per_token: int
    share: float
    low: float
    high: float
    seeds: int
    rows: int


def qualities(path: Path = TUNING_RECORD) -> list[Quality]:
    """Return a point for every method that was scored on test rows with labels."""
    from benchmarks.quality import wilson
    from benchmarks.tuning_bench import plan_of
    from benchmarks.tuning_runs import Record, Run
    from benchmarks.tuning_table import chosen, method, setting
    from edge_client.wire_cost import wire_cost
    from shared.models import resolve
    from shared.wire_dtypes import WireDtypes

    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in Record(path):
        if run.spec.stage == "compare" and run.spec.transport == "reference":
            groups[setting(run.spec)].append(run)
    points = []
    for group in groups.values():
        tests = [run.test for run in chosen(group) if run.test and run.test.correct is not None]
        if not tests:
            continue
        spec, rows, sent = group[0].spec, max(test.rows for test in tests), 0
        tests = [test for test in tests if test.rows == rows]
        if spec.method == "privatelora":
            cost = wire_cost(plan_of(spec, resolve(spec.model)), WireDtypes.named(spec.precision))
            sent = cost.up + cost.down
        share = statistics.mean(test.correct or 0 for test in tests) / rows
        # Seeds share their test rows, so they do not make the sample larger.
        points.append(Quality(spec.task, method(spec), sent, share, *wilson(share, rows), len(tests), rows))
    return points


def plot_quality(points: Sequence[Quality], path: Path) -> None:
    """Draw the share of right answers by bytes per token, a panel for each task."""
    tasks = sorted({point.task for point in points})
    figure, axes, close = _figure(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        own = [point for point in points if point.task == task]
        for number, point in enumerate(own):
            share, style = 100 * point.share, {"color": f"C{number}", "label": point.method}
            if not point.bytes_per_token:
                axis.axhline(share, linestyle="--", **style)
                continue
            reach = [[share - 100 * point.low], [100 * point.high - share]]
            axis.errorbar([point.bytes_per_token / 1024], [share], yerr=reach, fmt="o", capsize=3, **style)
        axis.set(xlabel="KiB per decoded token, both ways", title=f"{task}, {own[0].rows} rows")
        axis.grid(alpha=0.3, which="both")
        axis.legend(**BELOW)
    sizes = [point.bytes_per_token / 1024 for point in points if point.bytes_per_token]
    for axis in axes if sizes else ():
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(sizes) / 2, 2 * max(sizes))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_ylabel("right answers (%)")
    close(figure, path)


def _figure(panels: int) -> tuple[Any, Any, Any]:
    """Return a figure, its panels, and what writes it."""
    import matplotlib  # an extra: only plots need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(1 + 5 * panels, 5.5), squeeze=False)

    def close(figure: Any, path: Path) -> None:
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)

    return figure, axes[0], close


def main() -> None:
    """Draw one of the plots and print its points as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plot", choices=("speed", "quality"))
    parser.add_argument("--label", default="sweep", help="of the decoded answers")
    parser.add_argument("--record", type=Path, help="another file to read")
    parser.add_argument("--out", type=Path, help="another file to write")
    options = parser.parse_args()
    if options.plot == "quality":
        points = qualities(options.record or TUNING_RECORD)
        if not points:
            raise SystemExit("the record holds no scored runs yet")
        plot_quality(points, options.out or QUALITY)
        print(json.dumps([asdict(point) for point in points]))
        return
    rows = [r for r in decode_record.read(options.record or RECORD, Answered) if r.label == options.label]
    lines = speeds(rows)
    if not lines:
        raise SystemExit(f"the record holds no answers under the label {options.label!r} yet")
    plot_speed(lines, f"decoding, {rows[0].dtype}, measured on emulated links", options.out or SPEED)
    print(json.dumps({name: [asdict(point) for point in points] for name, points in lines.items()}))


if __name__ == "__main__":
    main()
