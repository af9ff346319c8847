"""Overload: 64 streams at once on a KV budget for 16, against 16 streams that never have to wait.

Both do the same work, 64 answers, each in a session of its own: 64 streams one answer each, or 16
streams four answers each, one after another. They run in turn, so that both meet the same machine. An
admitted session should keep its speed, all together theirs, and whoever finds no room should wait or be
told when to ask again, and be served in the end. What was found comes as one JSON line last; exit status
1 if anything does not hold.

    python -m benchmarks.overload
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.chaos_expected import reference_for
from benchmarks.child import Child
from benchmarks.link import end_on_sigterm
from benchmarks.processes import CloudProcess
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

DESCRIBE = "/privatelora.v1.PrivateLoraService/Describe"
BLOCK_TOKENS = 32  # stated here anew: positions of one block of the KV cache
BAD_WORDS = ("Traceback", "never retrieved")
SPEED_KEPT, THROUGHPUT_KEPT = 0.8, 0.9
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """A run: ``streams`` on room for ``room``; counts, tokens and seconds.

    ``reference_here``: whether the reference runs in this process, which has to have torch anyway.
    """

    model: str = "smollm2-135m-instruct"
    plan: str = "per-layer"
    plan_name: str = "per-layer-r64"
    streams: int = 64
    room: int = 16
    processes: int = 4
    prompts: int = 8
    prompt_tokens: int = 40
    tokens: int = 24
    rounds: int = 3
    std: float = 0.05
    deadline_s: float = 300.0
    step_timeout_s: float = 120.0
    connect_timeout_s: float = 20.0
    cache_dir: str | None = None
    reference_here: bool = False
    cloud_words: tuple[str, ...] = ()
    cloud_env: dict[str, str] = field(default_factory=dict)

    @property
    def kv_bytes(self) -> int:
        """A budget in which ``room`` answers fit to the byte (float32)."""
        cache_dir = None if self.cache_dir is None else Path(self.cache_dir)
        geometry = resolve(self.model, cache_dir=cache_dir, progress=False).geometry
        block = 2 * geometry.num_layers * geometry.kv_dim * 4 * BLOCK_TOKENS
        return self.room * block * -(-(self.prompt_tokens + self.tokens) // BLOCK_TOKENS)


class Overload:
    """A cloud, and the processes whose streams want answers of it, inside the ``with`` block."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._stack = ExitStack()

    def __enter__(self) -> "Overload":
        s = self.settings
        try:
            words = ["--kv-bytes", str(s.kv_bytes), "--threads", "1", "--plan", s.plan, *s.cloud_words]
            if s.cache_dir:
                words += ["--cache-dir", s.cache_dir]
            self.cloud = self._stack.enter_context(
                CloudProcess(s.model, arguments=words, env=s.cloud_env, log=self.folder / "cloud.log")
            )
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        s = self.settings
        self.children = []
        for place in range(s.processes):
            folder = self.folder / f"streams-{place}"
            folder.mkdir()
            given = {
                "cloud": self.cloud.address,
                "plan": s.plan_name,
                "folder": str(folder),
                "cache_dir": s.cache_dir,
                "adapter": str(folder / "adapter.safetensors"),
                "seed": 0,
                "std": s.std,
                "step_timeout_s": s.step_timeout_s,
                "connect_timeout_s": s.connect_timeout_s,
                "deadline_s": s.deadline_s,
            }
            child = Child("benchmarks.overload_streams", given, self.folder / f"streams-{place}.log")
            self.children.append(self._stack.enter_context(child))
        for child in self.children:
            child.answer()
        prompts = self.children[0].ask("prompts", count=s.prompts, length=s.prompt_tokens)
        file, adapter = str(self.folder / "expected.json"), str(self.folder / "streams-0/adapter.safetensors")
        with reference_for(s.model, s.cache_dir, self.folder, here=s.reference_here) as expect:
            expect(adapter=adapter, prompts=prompts, tokens=s.tokens, file=file)
        for child in self.children:
            child.ask("expect", file=file)

    def kv_used(self) -> int:
        """Return the bytes of the KV cache in use."""
        with grpc.insecure_channel(self.cloud.address) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(DESCRIBE)
            raw = call(b"", timeout=30)
        return int(pb.DescribeResponse.FromString(raw).kv_bytes_used)

    def run(self, streams: int) -> Record:
        """Let so many streams, as many in each process, do the work; return what became of it.

        The figures are tokens/s: the median of what each answer had after its first token, and all tokens
        over the time that no stream had run out of work; ``under_way`` is the mean number of answers
        between their first and last token meanwhile, and says whether room stood empty.
        """
        s = self.settings
        numbers = [number % s.prompts for number in range(s.streams)]
        work = [numbers[at::streams] for at in range(streams)]
        start = time.monotonic() + 0.5
        for place, child in enumerate(self.children):
            child.say({"do": "go", "start": start, "streams": work[place :: s.processes]})
        replies = [child.answer(s.deadline_s + 60) for child in self.children]
        answers = [answer for reply in replies for answer in reply["answers"]]
        speeds = [
            (len(a["times"]) - 1) / (a["times"][-1] - a["times"][0]) for a in answers if len(a["times"]) > 1
        ]
        served = [a for a in answers if len(a["tokens"]) == s.tokens and a["error"] is None]
        times = sorted(at for a in answers for at in a["times"])
        # From when the last of the first ones has begun on, to when the last answer of all begins.
        begins = sorted(a["times"][0] for a in answers if a["times"])
        window = (begins[min(s.room, len(begins)) - 1], begins[-1]) if begins else (0.0, 0.0)
        inside = sum(window[0] < at <= window[1] for at in times)
        spans = [
            (max(a["times"][0], window[0]), min(a["times"][-1], window[1])) for a in answers if a["times"]
        ]
        busy_s = sum(max(0.0, end - begin) for begin, end in spans)
        return {
            "streams": streams,
            "served": len(served),
            "answers": len(answers),
            "speed": round(statistics.median(speeds), 3) if speeds else 0.0,
            "throughput": round(inside / (window[1] - window[0]), 3) if window[1] > window[0] else 0.0,
            "under_way": round(busy_s / (window[1] - window[0]), 1) if window[1] > window[0] else 0.0,
            "seconds": round(times[-1] - start, 2) if times else 0.0,
            "waited": sum(a["asked"] < window[0] < a["times"][0] for a in answers if a["times"]),
            "longest_wait_s": round(max((a["times"][0] - a["asked"] for a in served), default=0.0), 2),
            "refusals": sum(a["refusals"] for a in answers),
            "hints": sum(a["hints"] for a in answers),
            "lost": sum(a["lost"] for a in answers),
            "ties": sum(reply["ties"] for reply in replies),
            "differences": [one for reply in replies for one in reply["differences"]][:20],
            "errors": [a["error"] for a in answers if a["error"]][:20],
        }

    def faults(self) -> list[str]:
        """Return what nobody may do, in words; ends the streams' connections."""
        found = [f"process {place} is gone" for place, c in enumerate(self.children) if not c.is_alive]
        for child in self.children:
            child.ask("close")
        deadline = time.monotonic() + 20
        while (used := self.kv_used()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if used:
            found.append(f"{used} bytes of KV cache are in use when all have gone")
        log = self.cloud.logs()
        return found + [f"the cloud's log has {word!r}" for word in BAD_WORDS if word in log]


def failures(rounds: list[Record], settings: Settings) -> list[str]:
    """Return what must hold of every round and does not, in words; says nothing about speed."""
    found = []
    for one in rounds:
        name = f"{one['streams']} streams"
        if one["served"] != settings.streams:
            found.append(f"{name}: {one['served']} of {settings.streams} answers were served")
        found += [f"{name}: {error}" for error in one["errors"] + one["differences"]]
        if one["hints"] != one["refusals"]:
            found.append(f"{name}: {one['refusals'] - one['hints']} refusals did not say when to ask again")
        if one["streams"] == settings.streams and not one["waited"]:
            found.append(f"{name}: nobody had to wait, so this was no overload")
        if one["streams"] == settings.room and one["refusals"]:
            found.append(f"{name}: {one['refusals']} refusals where there was room for all")
    return found


def main() -> int:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=Settings.model)
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="of both cases")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="new tokens of an answer")
    options = parser.parse_args()
    end_on_sigterm()
    settings = Settings(**vars(options))
    alone: list[Record] = []
    crowded: list[Record] = []
    with Overload(settings, Path(tempfile.mkdtemp(prefix="privatelora-overload-"))) as overload:
        overload.run(settings.room)  # warms up
        for turn in range(settings.rounds):
            order = [(settings.room, alone), (settings.streams, crowded)]
            for streams, rows in order if turn % 2 == 0 else order[::-1]:
                rows.append(overload.run(streams))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        faults = overload.faults()
    kept = {
        name: round(
            statistics.median(r[name] for r in crowded)
            / max(statistics.median(r[name] for r in alone), 1e-9),
            3,
        )
        for name in ("speed", "throughput")
    }
    found = faults + failures([*alone, *crowded], settings)
    for name, least in (("speed", SPEED_KEPT), ("throughput", THROUGHPUT_KEPT)):
        if kept[name] < least:
            found.append(f"{name} kept: {kept[name]}, at least {least} wanted")
    print(
        f"{'case':<12}{'tok/s a session':>17}{'tok/s in all':>14}{'waited':>8}{'refusals':>10}"
        f"{'longest wait':>14}"
    )
    for name, rows in (("with room", alone), ("crowded", crowded)):
        for row in rows:
            print(
                f"{name:<12}{row['speed']:>17.2f}{row['throughput']:>14.1f}{row['waited']:>8}"
                f"{row['refusals']:>10}{row['longest_wait_s']:>12.1f} s"
            )
    print(f"kept: speed {kept['speed']}, throughput {kept['throughput']}")
    for failure in found:
        print(f"DOES NOT HOLD: {failure}")
    figures = {
        "benchmark": "overload",
        "streams": settings.streams,
        "room": settings.room,
        "speed_kept": kept["speed"],
        "throughput_kept": kept["throughput"],
        "alone": alone,
        "crowded": crowded,
        "failures": found,
    }
    print(json.dumps(figures))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
