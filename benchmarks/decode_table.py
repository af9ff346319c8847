"""The record of answers over links as people read it: a table, and what guesses cost the slowest prompt."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import decode_record
from benchmarks.decode_record import AIM, SLOWDOWN_AIM, Answered, Summary

Group = tuple[str, str, str, bool]  # link, plan, wire, whether tokens were guessed

HEAD = (
    "link", "plan", "guesses", "answers x tokens", "tok/s", "tokens/step", "step, ms", "on loopback, ms",
    "bound, tok/s", "of the bound", "bytes up + down a token", "of the paper's", "steal",
)  # fmt: skip


def show(rows: Sequence[Answered]) -> dict[str, Any]:
    """Print what the answers of one label say; return the same as plain values."""
    groups: dict[Group, list[Answered]] = defaultdict(list)
    for row in rows:
        groups[(row.preset, row.plan, row.wire, row.drafted)].append(row)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    figures: dict[str, Any] = {"groups": [], "slowest": []}
    for group, found in groups.items():
        one = decode_record.summary(found)
        if one is None:
            continue
        print(_line(group, found, one))
        by_kind = {}
        for kind in sorted({row.kind for row in found}):
            part = decode_record.summary([row for row in found if row.kind == kind])
            by_kind[kind] = None if part is None else part.tokens_per_step
        figures["groups"].append({**_facts(group), **asdict(one), "tokens_per_step_by_kind": by_kind})
    for (name, plan, wire, drafted), found in groups.items():
        without = groups.get((name, plan, wire, False))
        if drafted and without is not None:
            figures["slowest"] += _slowest((name, plan, wire, drafted), [*found, *without])
    return figures


def _facts(group: Group) -> dict[str, Any]:
    return dict(zip(("preset", "plan", "wire", "drafted"), group, strict=True))


def _line(group: Group, found: Sequence[Answered], one: Summary) -> str:
    name, plan, wire, drafted = group
    bound, share = "-", "-"
    if one.bound_tok_s is not None and one.against_bound is not None:
        bound = f"{one.bound_tok_s:.2f}"
        share = f"{one.against_bound:.3f}" + ("" if one.against_bound >= AIM else f", below {AIM:g}")
    cells = (
        f"{name} ({one.rtt_ms:.1f} ms)",
        f"{plan}, {wire}",
        "yes" if drafted else "no",
        f"{one.answers} x {found[0].limit}",
        f"{one.tok_s:.2f}",
        f"{one.tokens_per_step:.2f}",
        f"{one.step_ms:.1f}",
        "-" if one.loopback_step_ms is None else f"{one.loopback_step_ms:.1f}",
        bound,
        share,
        f"{one.bytes_up_per_token:.0f} + {one.bytes_down_per_token:.0f}",
        f"{one.of_papers_bytes:.3f}",
        f"at most {one.most_steal:.1%}, {one.quiet} quiet",
    )
    return f"| {' | '.join(cells)} |"


def _slowest(group: Group, rows: Sequence[Answered]) -> list[dict[str, Any]]:
    found = decode_record.slowdowns(rows)
    if not found:
        return []
    measured = max(found, key=lambda one: one.measured)
    at_medians = max(found, key=lambda one: one.at_medians)
    above = [sum(value > SLOWDOWN_AIM for value in values) for values in (
        [one.measured for one in found], [one.at_medians for one in found]
    )]  # fmt: skip
    print(
        f"\n{group[0]}, {group[1]}, {group[2]}: with guesses prompt {measured.prompt} was slowest against "
        f"without: {measured.measured:+.1%} a token as measured, {above[0]} of {len(found)} prompts above "
        f"{SLOWDOWN_AIM:+.0%}; at median step times prompt {at_medians.prompt}, "
        f"{at_medians.at_medians:+.1%}, {above[1]} above"
    )
    return [
        {
            **_facts(group),
            "measured": asdict(measured),
            "at_medians": asdict(at_medians),
            "above_aim": dict(zip(("measured", "at_medians"), above, strict=True)),
        }
    ]
