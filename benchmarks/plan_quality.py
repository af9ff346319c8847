"""Write what tuning has reached, for ``privatelora-edge plan`` to state: from the record of runs.

    python -m benchmarks.plan_quality

Of every plan and task in ``benchmarks/tuning_runs.jsonl``: the test scores at the learning rate that
validation rows chose, all seeds. Run it again when the record has grown.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.tuning_runs import Record, Run
from benchmarks.tuning_table import chosen, setting

RECORD = Path(__file__).parent / "tuning_runs.jsonl"
TABLE = Path(__file__).parent.parent / "edge_client" / "planning" / "quality.json"


def entries(record: Record) -> list[dict[str, Any]]:
    """Return one entry for each plan, task and amount of tuning that was scored on test rows."""
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in record:
        spec = run.spec
        # No plan on offer is lagged.
        if (spec.method, spec.stage, spec.transport, spec.lag) == ("privatelora", "compare", "reference", 0):
            groups[setting(run.spec)].append(run)
    found = []
    for group in groups.values():
        # Tasks with right and wrong answers alone: perplexity of a persona compares with nothing else.
        scored = [run for run in chosen(group) if run.test and run.test.correct is not None]
        runs = [run for run in scored if run.test and run.test.nats is not None]
        rows = max((run.test.rows for run in runs if run.test), default=0)
        runs = [run for run in runs if run.test and run.test.rows == rows]
        if not runs:
            continue
        spec = runs[0].spec
        found.append(
            {
                "backbone": spec.model, "layout": spec.layout, "rank": spec.rank,
                "initialiser": spec.initialiser, "task": spec.task, "rows": rows, "steps": spec.steps,
                "batch": spec.batch, "lr": spec.lr,
                "seeds": [
                    {"seed": run.spec.seed, "nats": run.test.nats, "correct": run.test.correct}
                    for run in runs if run.test
                ],
                "source": f"benchmarks/{RECORD.name}",
            }
        )  # fmt: skip
    return found


def main() -> None:
    """Write the table."""
    found = entries(Record(RECORD))
    TABLE.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps({"entries": len(found), "file": TABLE.name}))


if __name__ == "__main__":
    main()
