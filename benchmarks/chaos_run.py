"""One chaos run from its start to its record: who takes part, what happens to them, what is left of them."""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.chaos_clouds import Clouds, Stroke
from benchmarks.chaos_events import Event, schedule
from benchmarks.chaos_expected import reference_for
from benchmarks.chaos_record import Intervals, Record, Steps, event_row, event_rows, failures, is_cloud, kinds
from benchmarks.chaos_settings import Settings
from benchmarks.child import Child
from benchmarks.memory_watch import MemoryWatch
from benchmarks.processes import ProcessError

AIM_S = (
    60.0  # how long an event waits for bytes of a step to pass: it takes edges so long to come back at times
)
LEAST_CALM_S = 0.5  # between two events, so that the second meets steps that the first has not
MEET_S = 10.0  # for edges to come back, before it is said that an event has met no step of theirs
TRIES = 4  # of an aimed event: what it aims at may be the opening of a stream, which looks like a step
SETTLE_S = 20.0  # for sessions to go, beyond the grace period


def say(text: str) -> None:
    """Tell what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Run:
    """One run; made for one use.

    Parameters
    ----------
    settings
        What to do.
    folder
        For logs and files; what is in it afterwards tells about failures.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.strokes: list[tuple[Event, Stroke]] = []
        self._stack = ExitStack()

    def run(self) -> Record:
        """Return the record."""
        with self._stack:
            settings = self.settings
            self.watch = self._stack.enter_context(MemoryWatch())
            self.clouds = self._stack.enter_context(self._clouds())
            before = self.clouds.describe().kv_bytes_used
            self._start_edges()
            self._expect()
            say("all do once what they will do, undisturbed")
            for child in self.decoding:
                child.ask("once", settings.start_s)
            if self.tuning is not None:
                self.tuning.ask("once", settings.start_s)
            for child in self._children():
                child.ask("begin")
            self.began = time.monotonic()
            self._disturb()
            say(f"{settings.tail_s:.0f} s of calm")
            time.sleep(settings.tail_s)
            self.ended = time.monotonic()
            for life in self.watch.lives:
                self.watch.leave(life)
            return self._judged(before)

    # --- set-up -------------------------------------------------------------------------------------------

    def _clouds(self) -> Clouds:
        s = self.settings
        words = ["--kv-bytes", str(s.kv_bytes), "--grace-period-s", str(s.grace_s), "--threads", "1"]
        for plan in s.plans:
            words += ["--plan", plan]
        if s.cache_dir:
            words += ["--cache-dir", s.cache_dir]
        return Clouds(s.model, words, self.folder, self.watch, s.patience_s, s.cloud_env)

    def _start_edges(self) -> None:
        s = self.settings
        common = {
            "cloud": self.clouds.gate.address,
            "step_timeout_s": s.step_timeout_s,
            "connect_timeout_s": s.connect_timeout_s,
            "recover_s": s.recover_s,
            "cache_dir": s.cache_dir,
        }
        self.decoding, self.tuning = list[Child](), None
        first = 0
        for place, plans in enumerate(s.edge_plans):
            folder = self.folder / f"edges-{place}"
            folder.mkdir()
            given = common | {
                "plans": plans,
                "folder": str(folder),
                "first": first,
                "edges": s.edges,
                "seed": s.seed + place,
                "std": s.std,
                "drafting": 4,
            }
            first += s.edges * len(plans)
            self.decoding.append(self._child("benchmarks.chaos_decoding", given, f"edges {place}"))
        if s.tune_plan is not None:
            folder = self.folder / "tuning"
            folder.mkdir()
            given = common | {
                "cloud": self.clouds.gate.other_address,  # aims would hit nobody else: it always sends
                "plan": s.tune_plan,
                "folder": str(folder),
                "steps": s.tune_steps,
                "batch_size": s.tune_batch,
                "micro_batch_tokens": s.micro_batch_tokens,
            }
            self.tuning = self._child("benchmarks.chaos_tuning", given, "tuning")
        for child in self._children():
            child.answer(s.start_s)

    def _child(self, module: str, given: dict[str, Any], name: str) -> Child:
        log = self.folder / f"{name.replace(' ', '-')}.log"
        child = self._stack.enter_context(Child(module, given, log))
        self.watch.add(name, child.pid)
        return child

    def _children(self) -> list[Child]:
        return [*self.decoding, *([self.tuning] if self.tuning is not None else [])]

    def _expect(self) -> None:
        """Let the reference generate what every edge will have to."""
        s = self.settings
        say("the reference generates what the edges will have to")
        prompts = self.decoding[0].ask("prompts", count=s.prompts)
        with reference_for(s.model, s.cache_dir, self.folder, here=s.reference_here) as expect:
            for child in self.decoding:
                for number, adapter in enumerate(child.ask("adapters")):
                    file = f"{adapter}.expected.json"
                    expect(adapter=adapter, prompts=prompts, tokens=s.tokens, file=file)
                    child.ask("expect", group=number, file=file)

    # --- what happens -------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        s = self.settings
        events = schedule(s.seed, s.counts, s.shortest_s, s.longest_s)
        took = 0.0
        for number, event in enumerate(events):
            left = len(events) - number
            mean = took / number if number else 1.0
            calm = (s.seconds - s.tail_s - (time.monotonic() - self.began)) / left - mean
            time.sleep(max(LEAST_CALM_S, event.share * calm))
            if self.clouds.has_died or not all(child.is_alive for child in self._children()):
                say("a process is gone: no more events")
                return
            for _ in range(TRIES if event.aimed else 1):
                since = self.strokes[-1][1].over if self.strokes else self.began
                stroke = self._strike(event)
                took += stroke.over - stroke.before
                self.strokes.append((event, stroke))
                what = f"{event.kind} {event.how}".strip()
                say(f"{stroke.before - self.began:6.0f} s: {what} ({stroke.over - stroke.before:.1f} s)")
                if not event.aimed or self._was_met(event, stroke, since):
                    break
        late = s.seconds - s.tail_s - (time.monotonic() - self.began)
        time.sleep(max(0.0, late))

    def _was_met(self, event: Event, stroke: Stroke, since: float) -> bool:
        """Return whether an event was mid-step, as soon as the edges' notes tell, or that they never do."""
        deadline = time.monotonic() + MEET_S
        while time.monotonic() < deadline and not self.clouds.has_died:
            time.sleep(LEAST_CALM_S)
            if not all(child.is_alive for child in self.decoding):
                return True  # no sense in another; the record will tell
            notes = [edge for child in self.decoding for edge in child.ask("noted", since=since)]
            steps = [Steps(**edge) for edge in notes]
            row = event_row(event, stroke, self.began, steps, [], since=since)
            if row["mid_step"]:
                return True
        return False

    def _strike(self, event: Event) -> Stroke:
        clouds, gate = self.clouds, self.clouds.gate
        aim_s = AIM_S if event.aimed else 0.0
        if event.kind == "kill":
            return clouds.kill(event.hold_s, aim_s)
        if event.kind == "restart":
            return clouds.restart(aim_s)
        if event.kind == "pause":
            return clouds.pause(event.hold_s, aim_s)
        if event.kind == "drain":
            return clouds.drain(aim_s)
        before, after = gate.cut(event.how, aim_s)
        time.sleep(event.hold_s)
        back = time.monotonic()
        gate.restore()
        return Stroke(before, after, back, time.monotonic())

    # --- what was found -----------------------------------------------------------------------------------

    def _judged(self, before: int) -> Record:
        s = self.settings
        unfinished: list[str] = []
        for child in self._children():
            with Forgiving(unfinished, child.module):
                unfinished += [f"edge {n}" for n in child.ask("stop", s.finish_s + 10, patience_s=s.finish_s)]
        edges: list[Record] = []
        tuning: Record | None = None
        for child in self._children():
            with Forgiving(unfinished, child.module):
                report = child.ask("report")
                if child is self.tuning:
                    tuning = report
                else:
                    edges += report
                child.ask("close")
        kv = {"before": before, "after": self._settled(before)}
        self.clouds.stop()
        steps = [Steps(*(edge.pop(what) for what in ("attempts", "wholes", "recoveries"))) for edge in edges]
        batches = tuning.pop("batches") if tuning is not None else []
        events = event_rows(self.strokes, self.began, steps, batches)
        memory, unjudged = self._memory([edge.wholes for edge in steps], batches)
        record: Record = {
            "benchmark": "chaos",
            "model": Path(s.model).name,
            "seed": s.seed,
            "seconds": round(self.ended - self.began, 1),
            "wanted": {
                "events": s.counts,
                "mid_step": s.mid_step,
                "tuning_under_way": s.tuning_under_way,
            },
            "kinds": kinds(events),
            "edges": edges,
            "tuning": tuning,
            "memory": memory,
            "unjudged": unjudged,
            "kv": kv,
            "cloud_faults": self.clouds.faults(),
            "unfinished": unfinished,
            "clouds": self.clouds.lives,
            "events": events,
        }
        record["failures"] = failures(record)
        return record

    def _memory(self, steps: Sequence[Intervals], batches: Intervals) -> tuple[list[Record], list[str]]:
        """Return how each process grew, and who was there too briefly to say.

        A cloud is judged from when it has served everybody once.
        """
        s, found, unjudged = self.settings, list[Record](), list[str]()
        work = [*steps, *([batches] if batches else [])]
        for life in self.watch.lives:
            if is_cloud(life.name):
                born = life.samples[0][0] if life.samples else self.ended
                served = [min((end for _, end in own if end > born), default=self.ended) for own in work]
                growth = life.growth(s.warm_up_s, s.window_s, begin=max(served))
            else:
                growth = life.growth((self.ended - self.began) / 4, s.window_s, begin=self.began)
            if growth is None:
                unjudged.append(life.name)
            else:
                found.append({"name": life.name, **growth})
        return found, unjudged

    def _settled(self, used: int) -> int:
        """Wait until as much of the KV cache is in use as at the start; return what is at last."""
        deadline = time.monotonic() + self.settings.grace_s + SETTLE_S
        while (now := self.clouds.describe().kv_bytes_used) != used and time.monotonic() < deadline:
            time.sleep(0.2)
        return now


class Forgiving:
    """Notes that a child is gone or hangs, and goes on: the rest of the record is of use."""

    def __init__(self, unfinished: list[str], name: str) -> None:
        self._unfinished, self._name = unfinished, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if isinstance(error, ProcessError):
            self._unfinished.append(self._name)
            say(str(error))
            return True
        return False
