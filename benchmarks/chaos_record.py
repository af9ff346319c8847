"""What a chaos run has found: event by event, what must hold and does not, and a table of it.

Needs nothing that runs: a record that somebody wrote by hand is judged like one of a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos_clouds import Stroke
from benchmarks.chaos_events import KINDS, Event

MOST_GROWTH = 0.05  # of any process's memory
Intervals = Sequence[tuple[float, float]]  # (began, ended), monotonic seconds
Record = dict[str, Any]


@dataclass(frozen=True)
class Steps:
    """What one decoding edge has noted, see `benchmarks.step_log`."""

    attempts: Intervals
    wholes: Intervals
    recoveries: Intervals


def under_way(intervals: Intervals, stroke: Stroke, since: float = -math.inf) -> tuple[float, float] | None:
    """Return what had begun (not before ``since``) when an event struck and had not ended just after."""
    return next((one for one in intervals if since <= one[0] < stroke.before and one[1] > stroke.after), None)


def event_rows(
    strokes: Sequence[tuple[Event, Stroke]], began: float, edges: Sequence[Steps], batches: Intervals
) -> list[Record]:
    """Return what each event met, in order; the arguments are those of `event_row`."""
    since = [-math.inf, *(stroke.over for _, stroke in strokes)]
    until = [*(stroke.before for _, stroke in strokes[1:]), math.inf]
    return [
        event_row(event, stroke, began, edges, batches, since=earlier, until=later)
        for (event, stroke), earlier, later in zip(strokes, since, until, strict=False)
    ]


def event_row(
    event: Event,
    stroke: Stroke,
    began: float,
    edges: Sequence[Steps],
    batches: Intervals,
    *,
    since: float = -math.inf,
    until: float = math.inf,
) -> Record:
    """Return what an event met.

    It was *mid-step* if a step of some edge was under way on a stream: sent before the stroke, and without
    its answer just after it (`benchmarks.step_log`; by the edge's own clock, which is the machine's). It must
    have been sent since the event before was over: else that one may be why it has no answer yet. Of a kill,
    a pause and a cut, its hidden states must besides have come only after the cloud could answer again: else
    the answer was on its way already, and nothing was interrupted. Of a restart and a drain, which let a step
    finish, the edge must have found its stream lost or sent away before the next event, and gone on.

    Parameters
    ----------
    event, stroke
        What was meant, and when it happened.
    began
        When the run began (monotonic seconds).
    edges
        Of every decoding edge.
    batches
        Optimiser steps of the tuning one.
    since, until
        When the event before was over, and when the next one struck (monotonic seconds).
    """
    met = [edge for edge in edges if under_way(edge.attempts, stroke, since) is not None]
    found = [under_way(edge.wholes, stroke) for edge in met]
    interrupted = [step for step in found if step is not None and step[1] >= stroke.back]
    moved = [edge for edge in met if any(stroke.before <= at < until for at, _ in edge.recoveries)]
    polite = event.kind in ("restart", "drain")
    return {
        "kind": event.kind,
        "how": event.how,
        "aimed": event.aimed,
        "at_s": round(stroke.before - began, 2),
        "lasted_s": round(stroke.over - stroke.before, 2),
        "steps_under_way": len(met),
        "steps_interrupted": len(interrupted),
        "edges_moved": len(moved),
        "mid_step": bool(moved if polite else interrupted),
        "tuning_under_way": under_way(batches, stroke) is not None,
        "recovered_s": round(
            max((s[1] - stroke.over for s in interrupted if s[1] > stroke.over), default=0.0), 2
        ),
    }


def kinds(events: Sequence[Record]) -> dict[str, Record]:
    """Return counts and the time to recover by kind of event."""
    found = {}
    for kind in KINDS:
        own = [event for event in events if event["kind"] == kind]
        recovered = sorted(event["recovered_s"] for event in own if event["steps_interrupted"])
        found[kind] = {
            "events": len(own),
            "mid_step": sum(event["mid_step"] for event in own),
            "tuning_under_way": sum(event["tuning_under_way"] for event in own),
            "recovered_median_s": recovered[len(recovered) // 2] if recovered else None,
            "recovered_most_s": recovered[-1] if recovered else None,
        }
    return found


def failures(record: Record) -> list[str]:
    """Return what must hold and does not, in words.

    Parameters
    ----------
    record
        ``wanted`` (``events`` by kind, ``mid_step`` and ``tuning_under_way`` of every kind; counts),
        ``kinds``, ``edges``, ``tuning``, ``memory``, ``unjudged``, ``kv``, ``cloud_faults`` and
        ``unfinished``.
    """
    wanted, found = record["wanted"], list(record["cloud_faults"])
    tuning = record["tuning"]
    for kind, counts in record["kinds"].items():
        least_of = {"events": wanted["events"].get(kind, 0), "mid_step": wanted["mid_step"]}
        if tuning is not None:
            least_of["tuning_under_way"] = wanted["tuning_under_way"]
        for name, least in least_of.items():
            if counts[name] < least:
                found.append(f"{kind}: {counts[name]} {name.replace('_', '-')}, {least} wanted")
    found += [f"{name} has not finished what it was at" for name in record["unfinished"]]
    ties = tokens = 0
    for edge in record["edges"]:
        name = f"edge {edge['edge']}"
        ties, tokens = ties + edge["ties"], tokens + edge["tokens"]
        if not edge["generations"]:
            found.append(f"{name} has generated nothing")
        if edge["mismatches"]:
            found.append(f"{name}: {edge['mismatches']} tokens differ: {edge['differences'][0]}")
        if edge["unfinished"]:
            found.append(f"{name}: {edge['unfinished']} generations did not finish: {edge['errors'][0]}")
    if ties > -(-tokens // 5000):
        found.append(f"{ties} ties in {tokens} tokens; one in 5,000 is excused")
    if tuning is not None:
        if not any(counts["tuning_under_way"] for counts in record["kinds"].values()):
            found.append("no event struck while an optimiser step was under way")
        if not tuning["waits"]:
            found.append("tuning never had to wait for the cloud")
        if not tuning["runs"]:
            found.append("no tuning run was finished")
        if tuning["differ"]:
            found.append(f"{tuning['differ']} of {tuning['runs']} adapters differ from the undisturbed one")
        if tuning["unfinished"]:
            found.append(f"tuning: {tuning['unfinished']} runs did not finish: {tuning['errors'][0]}")
    for life in record["memory"]:
        if life["growth"] > MOST_GROWTH:
            megabytes = (life["last_bytes"] - life["first_bytes"]) / 2**20
            found.append(f"{life['name']} grew by {100 * life['growth']:.1f} % ({megabytes:.0f} MiB)")
    found += [
        f"{name} was not seen for long enough to say whether it grows"
        for name in record["unjudged"]
        if not is_cloud(name)
    ]
    if not any(is_cloud(life["name"]) for life in record["memory"]):
        found.append("no cloud lived long enough to see whether it grows")
    kv = record["kv"]
    if kv["after"] != kv["before"]:
        found.append(f"{kv['after']} bytes of KV cache are in use at the end, {kv['before']} at the start")
    return found


def is_cloud(name: str) -> bool:
    """Whether a process whose memory was watched is a cloud: many of them live too briefly to be judged."""
    return name.startswith("cloud")


def table(record: Record) -> str:
    """Return the record for people."""
    lines = [
        f"{'event':<10}{'times':>7}{'mid-step':>10}{'tuning hit':>12}{'recovered in (median, most)':>30}"
    ]
    for kind, row in record["kinds"].items():
        took = "-"
        if row["recovered_median_s"] is not None:
            took = f"{row['recovered_median_s']:.1f} s, {row['recovered_most_s']:.1f} s"
        lines.append(
            f"{kind:<10}{row['events']:>7}{row['mid_step']:>10}{row['tuning_under_way']:>12}{took:>30}"
        )
    edges, tuning = record["edges"], record["tuning"]
    lines.append(
        f"{len(edges)} edges: {sum(e['generations'] for e in edges)} answers, "
        f"{sum(e['tokens'] for e in edges)} tokens, {sum(e['mismatches'] for e in edges)} wrong, "
        f"{sum(e['ties'] for e in edges)} at ties of the reference, "
        f"{sum(e['unfinished'] for e in edges)} unfinished"
    )
    if tuning is not None:
        lines.append(
            f"tuning: {tuning['runs']} adapters in {tuning['steps']} steps, {tuning['differ']} of them "
            f"differ, {tuning['waits']} waits for the cloud, {tuning['unfinished']} unfinished"
        )
    for life in record["memory"]:
        lines.append(
            f"{life['name']:<10} {life['first_bytes'] / 2**20:.0f} -> {life['last_bytes'] / 2**20:.0f} MiB "
            f"({100 * life['growth']:+.1f} %) over {life['seconds']:.0f} s"
        )
    clouds = sum(is_cloud(life["name"]) for life in record["memory"])
    brief = sum(map(is_cloud, record["unjudged"]))
    lines.append(f"{clouds} of {clouds + brief} clouds lived long enough to see whether they grow")
    kv = record["kv"]
    lines.append(f"KV cache in use: {kv['before']} bytes at the start, {kv['after']} at the end")
    lines += [f"DOES NOT HOLD: {failure}" for failure in record["failures"]]
    if not record["failures"]:
        lines.append("all of it holds")
    return "\n".join(lines)
