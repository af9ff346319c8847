"""The record of tuning runs as people read it: markdown tables and a plot."""

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import wilson
from benchmarks.tuning_runs import Found, Record, Run, Spec, best

BYTES_PER_VALUE = 2  # on the wire, at 16 bits
Setting = tuple[object, ...]
Place = tuple[str, str, int, int, int]


def markdown(record: Record) -> str:
    """Return all tables of a record."""
    parts = [*_comparisons(record), *_sweeps(record)]
    return "\n\n".join(parts) if parts else "no runs yet"


def setting(spec: Spec) -> Setting:
    """Return everything of a spec but learning rate, seed and how many test rows there are."""
    return tuple(v for k, v in vars(spec).items() if k not in ("lr", "seed", "test_rows"))


def _settled(spec: Spec) -> Setting:
    """Return what shares a choice of learning rate: the wire takes the reference's."""
    return setting(replace(spec, transport="reference"))


def chosen(runs: list[Run]) -> list[Run]:
    """Return, of one setting's runs, those scored on test at the rate that validation chose with seed 0."""
    scores = {run.spec.lr: run.score for run in runs if run.spec.seed == 0}
    if not scores:
        return []
    rate = best(scores)
    picked = (run for run in runs if run.spec.lr == rate and run.test is not None)
    return sorted(picked, key=lambda run: run.spec.seed)


def _by_setting(runs: list[Run]) -> list[list[Run]]:
    groups: dict[Setting, list[Run]] = defaultdict(list)
    for run in runs:
        groups[setting(run.spec)].append(run)
    return list(groups.values())


def method(spec: Spec) -> str:
    """Return what people call the method of a run."""
    names = {
        "base": "untuned",
        "majority": "majority class",
        "lora": f"LoRA r={spec.rank}, alpha={spec.alpha}",
    }
    layout = f"lagged({spec.lag})" if spec.lag else spec.layout.replace("_", " ")
    where = ", over the wire" if spec.transport == "wire" else ""
    return names.get(spec.method, f"PrivateLoRA {layout} {spec.initialiser} r={spec.rank}{where}")


def _nats(tests: list[Found]) -> str:
    values = [test.nats for test in tests if test.nats is not None]
    if len(values) < len(tests):
        return "diverged"
    if len(values) > 1:
        return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
    return f"{values[0]:.4f}"


def _accuracy(tests: list[Found]) -> str:
    counts = [test.correct for test in tests if test.correct is not None]
    if len(counts) < len(tests):
        return "-"
    share, rows = statistics.mean(counts) / tests[0].rows, tests[0].rows
    # Seeds share their test rows, so they do not make the sample larger.
    low, high = wilson(share, rows)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _perplexity(tests: list[Found]) -> str:
    values = [test.perplexity for test in tests if test.perplexity is not None]
    return f"{statistics.mean(values):.2f}" if values else "-"


def _speed(runs: list[Run]) -> str:
    seconds = sum(run.seconds for run in runs)
    return f"{sum(run.tokens for run in runs) / seconds:.0f}" if seconds else "-"


def _wire(run: Run) -> str:
    return "-" if run.wire is None else f"{run.wire * BYTES_PER_VALUE / 1024:.1f}"


def _rates(group: list[Run]) -> str:
    """Return what each learning rate gave: nats per answer, and the rows that were right."""
    said: dict[float, str] = {}
    for run in sorted((run for run in group if run.spec.seed == 0), key=lambda run: run.spec.lr):
        found = run.validation
        right = "" if found is None or found.correct is None else f" ({found.correct} of {found.rows} right)"
        said[run.spec.lr] = f"{run.spec.lr:g} gave {run.score:.4f} nats{right}"
    return ", ".join(said.values())


def _rows(found: list[Found]) -> str:
    return str(found[0].rows) if found else "0"


def _place(run: Run) -> Place:
    """Return what must be equal for two runs to share a table."""
    spec = run.spec
    return spec.model, spec.task, spec.words, spec.test_words, spec.test_rows


def _is_at(run: Run, place: Place) -> bool:
    """Whether a run belongs to a table; one that only chose a learning rate belongs to every one."""
    return run.spec.test_rows in (0, place[-1]) and _place(run)[:-1] == place[:-1]


def _comparisons(record: Record) -> list[str]:
    tables = []
    compared = [run for run in record if run.spec.stage == "compare"]
    for place in sorted({_place(run) for run in compared if run.test is not None}):
        runs = [run for run in compared if _is_at(run, place)]
        lines: list[str] = []
        notes: list[str] = []
        tested = [run.test for run in runs if run.test is not None]
        precisions = sorted({run.spec.precision for run in runs if run.spec.method != "majority"})
        majority = next((r.test for r in runs if r.spec.method == "majority" and r.test), None)
        for group in _by_setting(runs):
            if group[0].spec.steps:
                notes.append(f"{method(group[0].spec)}, seed 0 on validation rows: {_rates(group)}.")
            picked = chosen(group)
            tests = [run.test for run in picked if run.test is not None]
            if not tests:
                continue
            spec, tuned = picked[0].spec, bool(picked[0].spec.steps)
            tried = len({run.spec.lr for run in runs if _settled(run.spec) == _settled(spec)})
            done = f"{spec.steps} x {spec.batch} | {spec.lr:g} of {tried} | {len(tests)}"
            run = done if tuned else "- | - | -"
            lines.append(
                f"| {method(spec)} | {picked[0].trained / 1000:.0f} k | {run} | {_nats(tests)} "
                f"| {_perplexity(tests)} | {_accuracy(tests)} | {_speed(picked)} | {_wire(picked[0])} |"
            )
            if spec.method == "lora" and majority and majority.correct is not None:
                share = statistics.mean(t.correct or 0 for t in tests) / tests[0].rows
                if wilson(share, tests[0].rows)[0] <= majority.correct / majority.rows:
                    notes.append(
                        f"LoRA at {spec.steps} x {spec.batch} does not beat the majority class beyond its "
                        "interval: accuracy on this task says little at this model size."
                    )
        tables.append(
            f"**{place[1]}**, {place[0]}, texts of at most {place[2]} words ({place[3]} in test), "
            f"{_rows(tested)} test rows, layers in {' or '.join(precisions)}\n\n"
            "| method | trained | steps x batch | learning rate | seeds | nats per answer | perplexity "
            "| accuracy, % [95 %] | tokens/s | wire, KiB/token |\n"
            "|---|---|---|---|---|---|---|---|---|---|\n" + "\n".join([*lines, *[f"\n{n}" for n in notes]])
        )
    return tables


def _sweeps(record: Record) -> list[str]:
    tables = []
    swept = [run for run in record if run.spec.stage == "sweep"]
    for task in sorted({run.spec.task for run in swept}):
        runs = [run for run in swept if run.spec.task == task]
        runs.sort(key=lambda run: (-run.spec.steps, run.score))
        lines = [
            f"| {r.spec.steps} x {r.spec.batch} | {r.spec.layout.replace('_', ' ')} | {r.spec.initialiser} "
            f"| {r.spec.rank} | {r.spec.lr:g} | {r.score:.4f} | {_wire(r)} | {r.trained / 1000:.0f} k |"
            for r in runs
        ]
        judged = _rows([run.validation for run in runs if run.validation])
        tables.append(
            f"**Sweep on {task}**, judged on {judged} validation rows\n\n"
            "| steps x batch | layout | initialiser | r | learning rate | nats per answer | wire, KiB/token "
            "| trained |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
        )
    return tables


def plot(record: Record, path: Path) -> None:
    """Draw held-out likelihood and its standard error against bytes on the wire, each round a panel."""
    import matplotlib  # an extra: only this function needs it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    runs = [r for r in record if r.spec.stage == "sweep" and r.wire is not None and r.score < 100]
    rounds = sorted({(r.spec.task, r.spec.steps) for r in runs})
    if not rounds:
        raise SystemExit("the record holds no sweep yet")
    figure, axes = plt.subplots(1, len(rounds), figsize=(4 * len(rounds), 4), squeeze=False, sharex=True)
    sizes = set[float]()
    colours = {"gaussian": "tab:blue", "orthonormal": "tab:orange", "svd": "tab:green"}
    for axis, (task, steps) in zip(axes[0], rounds, strict=True):
        for run in (r for r in runs if (r.spec.task, r.spec.steps) == (task, steps)):
            assert run.wire is not None and run.validation is not None
            size = run.wire * BYTES_PER_VALUE / 1024
            sizes.add(size)
            axis.errorbar(
                size, run.score, run.validation.nats_error, alpha=0.7, elinewidth=0.5,
                fmt="o" if run.spec.layout == "fused" else "^",
                color=colours.get(run.spec.initialiser, "black"),
            )  # fmt: skip
        axis.set(xscale="log", xlabel="KiB per token on the wire (16 bit)", title=f"{task}, {steps} steps")
    axes[0][0].xaxis.set_minor_locator(ticker.NullLocator())  # of all: the axis is shared
    axes[0][0].set_xticks(sorted(sizes), [f"{size:.1f}" for size in sorted(sizes)])
    axes[0][0].set_ylabel("held-out nats per answer")
    for name, colour in colours.items():
        axes[0][-1].plot([], [], "s", color=colour, label=name)
    axes[0][-1].plot([], [], "k^", label="per projection")
    axes[0][-1].plot([], [], "ko", label="fused")
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def plot_persona(record: Record, path: Path, task: str = "persona") -> None:
    """Draw the held-out perplexity of one writer's answers, before tuning and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in record if run.spec.stage == "compare" and run.spec.task == task]
    bars: list[tuple[str, float]] = []
    for group in _by_setting(runs):
        for run in chosen(group)[:1]:
            if run.test and run.test.perplexity is not None:
                bars.append((method(run.spec), run.test.perplexity))
    if not bars:
        raise SystemExit(f"the record holds no scored runs of {task} yet")
    bars.sort(key=lambda bar: -bar[1])
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.6 * len(bars)))
    drawn = axis.barh([name.replace(", over", ",\nover") for name, _ in bars], [value for _, value in bars])
    axis.bar_label(drawn, fmt=" %.1f")
    axis.margins(x=0.12)
    axis.set_xlabel("held-out perplexity of an answer's token")
    axis.set_title(
        f"{task}: {_rows([r.test for r in runs if r.test])} answers of one writer", fontsize="medium"
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
