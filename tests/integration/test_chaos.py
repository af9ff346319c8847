"""A minute of chaos on a tiny model: whatever becomes of cloud and link, no token changes, and no bit."""

import json
from pathlib import Path

from benchmarks.chaos_run import Run
from benchmarks.chaos_settings import Settings
from tests.families import build, tokenizer

PLANS = (
    '{"name": "r8", "r_c2d": 8, "r_d2c": 8}',
    '{"name": "trip", "r_c2d": 8, "r_d2c": 8, "one_trip": true}',
)


def settings(folder: Path, **changes: object) -> Settings:
    """Return a run of four tiny layers under two plans, which takes about a minute."""
    model = folder / "model"
    build("llama").save_pretrained(model)
    tokenizer().save_pretrained(model)
    facts = {
        "model": str(model),
        "cache_dir": str(folder / "cache"),
        "plans": PLANS,
        "edge_plans": (("r8", "trip"),),
        "reference_here": True,
        "tune_plan": "r8",
        "prompts": 4,
        "tokens": 32,
        "std": 0.3,
        "seed": 165,  # kill, restart and drain come last: the first cloud lives long enough to see it grow
        "seconds": 34.0,
        "counts": {"kill": 1, "restart": 1, "drain": 1, "pause": 3, "cut": 3},
        "mid_step": 0,  # of every kind is too much to ask of so few; the test says of which
        "tuning_under_way": 0,  # likewise
        "shortest_s": 0.2,
        "longest_s": 2.0,
        "step_timeout_s": 3.0,
        "connect_timeout_s": 3.0,
        "start_s": 600.0,
        "patience_s": 300.0,
        "finish_s": 300.0,
        "grace_s": 2.0,
        "tail_s": 8.0,
        "warm_up_s": 3.0,
        "window_s": 2.0,
        "kv_bytes": 4 << 20,
    }
    return Settings(**(facts | changes))


def test_a_minute_of_chaos_changes_nothing(tmp_path: Path) -> None:
    record = Run(settings(tmp_path), tmp_path).run()
    assert not record["failures"], json.dumps(record, indent=1)[:6000]
    interrupted = {event["kind"] for event in record["events"] if event["steps_interrupted"]}
    assert {"kill", "cut"} <= interrupted, json.dumps(record["events"], indent=1)
