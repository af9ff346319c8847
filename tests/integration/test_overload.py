"""More streams than there is room for, on a tiny model: all are served in the end, with the right tokens."""

import json
from pathlib import Path

from benchmarks.overload import Overload, Settings, failures
from tests.families import build, tokenizer


def test_twelve_streams_on_room_for_three(tmp_path: Path) -> None:
    model = tmp_path / "model"
    build("llama").save_pretrained(model)
    tokenizer().save_pretrained(model)
    settings = Settings(
        model=str(model),
        plan='{"name": "r8", "r_c2d": 8, "r_d2c": 8}',
        plan_name="r8",
        streams=12,
        room=3,
        processes=1,
        prompts=4,
        prompt_tokens=40,
        tokens=24,
        std=0.3,
        deadline_s=300.0,
        cache_dir=str(tmp_path / "cache"),
        reference_here=True,
    )
    with Overload(settings, tmp_path) as overload:
        rounds = [overload.run(settings.room), overload.run(settings.streams)]
        faults = overload.faults()
    assert not faults + failures(rounds, settings), json.dumps(rounds, indent=1)[:6000]
