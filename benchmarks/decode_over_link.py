"""Decode mixed prompts over emulated links: the speed of every plan against its bound.

    python -m benchmarks.decode_over_link run
    python -m benchmarks.decode_over_link run --label sweep --presets rtt0 rtt20 rtt80 --prompts 3 --tokens 24
    python -m benchmarks.decode_over_link table

For each link one cloud runs on its side, and for each plan two edges, which answer all prompts one after
another: one at the far end, and one beside the cloud with no link in between, which takes the steps of each
answer again at once (`benchmarks.replay`): so the speed and what it is held against are measured a moment
apart. Plans named by ``--fast`` answer all prompts with guesses and without, in turn, so many ``--rounds``
(the first one is taken again, all of them say what guesses cost); those of ``--slow`` fewer prompts and
tokens, without guesses. The whole model in one process is ``plain``. Every answer is a line of the record as
soon as it is there; what is in it under the same label is not run again.
`benchmarks.decode_record` says what is computed. The summary comes as one JSON line last.
"""

import argparse
import datetime
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import decode_record, decode_table
from benchmarks.decode_record import PLAIN, Answered
from benchmarks.edge_drivers import Driver
from benchmarks.edge_options import (
    add_edge_options,
    cloud_words,
    edge_words,
    link_named,
    offers_of,
    whole_words,
    wire_of,
)
from benchmarks.link import Joined, Link, LinkError, end_on_sigterm, say
from benchmarks.processes import CloudProcess, ProcessError
from edge_client.draft_length import DEFAULT_DRAFT_TOKENS

RECORD = Path(__file__).with_name("decode_runs.jsonl")
NOWHERE = "none"  # the link of what needs none
WARM_UP_TOKENS = 3


def prompts_of(model: str, only: str | None = None) -> list[tuple[int, str, list[int]]]:
    """Return the mixed prompts as (number, kind, token ids), those of each kind taking turns."""
    from transformers import AutoTokenizer

    from benchmarks.drafting_answers import prompt_ids
    from benchmarks.mixed_prompts import KINDS, MIXED, REPETITION
    from shared.models import resolve

    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(model).folder, local_files_only=True)
    numbered = list(enumerate(MIXED + REPETITION))
    kinds = [[(n, p) for n, p in numbered if p.kind == kind] for kind in KINDS if only in (None, kind)]
    if only is None:
        kinds = kinds[:-1]  # the mixed set
    turns = [kind[i] for i in range(max(map(len, kinds))) for kind in kinds if i < len(kind)]
    return [(number, prompt.kind, prompt_ids(tokenizer, number)) for number, prompt in turns]


class Course:
    """What is to be decoded, and the record that it goes to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.prompts = prompts_of(options.model, options.kind_of_text)
        self.done = {row.key for row in decode_record.read(options.record, Answered)}

    def wanted(self, preset_name: str, plan: str) -> list[tuple[int, int, str, list[int], int, bool]]:
        """Return what is missing: (round, number, kind, ids, longest answer, whether to draft)."""
        options, fast = self.options, plan in self.options.fast
        few = not fast and plan != PLAIN
        count, limit = (
            (options.slow_prompts, options.slow_tokens) if few else (options.prompts, options.tokens)
        )
        found = []
        taken = [(r, *one) for r in range(options.rounds if fast else 1) for one in self.prompts[:count]]
        for turn, (again, number, kind, ids) in enumerate(taken):
            ways = ([True, False] if options.draft_tokens else [False]) if fast else [False]
            for drafted in ways if (turn + again) % 2 else ways[::-1]:  # neither way always runs first
                key = (
                    options.label,
                    preset_name,
                    plan,
                    drafted,
                    number,
                    limit,
                    options.dtype,
                    self.wire(plan),
                    again,
                )
                if key not in self.done:
                    found.append((again, number, kind, ids, limit, drafted))
        return found

    def wire(self, plan: str) -> str:
        """Return what tensors travel as, in one word."""
        return NOWHERE if plan == PLAIN else wire_of(self.options)

    def decode(self, preset_name: str, rtt_ms: float, plan: str, over: Driver, beside: Driver | None) -> None:
        """Answer with one plan what is missing, and put it into the record."""
        options, wanted = self.options, self.wanted(preset_name, plan)
        layers = int(over.ask("about")["layers"])
        for drafted in sorted({item[-1] for item in wanted}):
            warm_up = {"ids": wanted[0][3], "tokens": WARM_UP_TOKENS}
            for driver in (over, beside):
                if driver is not None:
                    driver.ask("answer", **warm_up, draft_tokens=options.draft_tokens if drafted else 0)
        for again, number, kind, ids, limit, drafted in wanted:
            asked = {"ids": ids, "draft_tokens": options.draft_tokens if drafted else 0}
            answer = over.ask("answer", tokens=limit, **asked)
            replays = beside is not None and not again  # the first round is enough for the bound
            replayed = (
                beside.ask("answer", tokens=limit, again=answer, **asked) if beside and replays else None
            )
            row = row_of(answer, replayed, preset=preset_name, rtt_ms=rtt_ms, plan=plan, layers=layers,
                         drafted=drafted, prompt=number, kind=kind, limit=limit, label=options.label,
                         dtype=options.dtype, wire=self.wire(plan), threads=options.threads,
                         round=again)  # fmt: skip
            decode_record.append(options.record, row)
            self.done.add(row.key)
            if row.tokens:
                loopback = "" if row.loopback_s is None else f", {row.loopback_s:.2f} s on loopback"
                say(
                    f"{preset_name}, {plan}{', drafted' if drafted else ''}, prompt {number} ({kind}): "
                    f"{row.tokens / row.seconds:.2f} tok/s, {row.tokens / row.steps:.2f} tokens/step, "
                    f"{row.seconds:.2f} s{loopback}, steal {row.steal:.1%}"
                )

    def over_link(self, name: str) -> None:
        """Answer with every plan that is wanted over one link."""
        options = self.options
        plans = [plan for plan in (*options.fast, *options.slow) if self.wanted(name, plan)]
        if not plans:
            return
        opened = Link(link_named(name), options.kind)
        with opened as link:
            rtt_ms = opened.checked["rtt_ms"] if opened.checked else 0.0
            with CloudProcess(
                options.model, options.dtype, cloud_words(options, plans),
                host=link.cloud_host, prefix=link.cloud_prefix,
            ) as cloud:  # fmt: skip
                for plan in plans:
                    self._plan_over(name, rtt_ms, plan, link, cloud)

    def _plan_over(self, name: str, rtt_ms: float, plan: str, link: Joined, cloud: CloudProcess) -> None:
        words = edge_words(self.options, plan)
        with ExitStack() as stack:
            far = Driver(["--cloud", link.address(cloud.port), *words], link.edge_prefix)
            over, beside = stack.enter_context(far), None
            if self.options.replay:
                # In the cloud's own namespace its address is one of this host: nothing is in between.
                beside = stack.enter_context(Driver(["--cloud", cloud.address, *words], link.cloud_prefix))
            self.decode(name, rtt_ms, plan, over, beside)

    def plain(self) -> None:
        """Answer with the whole model in one process."""
        if self.options.plain and self.wanted(NOWHERE, PLAIN):
            with Driver(whole_words(self.options)) as whole:
                self.decode(NOWHERE, 0.0, PLAIN, whole, None)


def row_of(answer: dict[str, Any], replayed: dict[str, Any] | None, **facts: Any) -> Answered:
    """Return the line of one answer, and of its steps taken again.

    Raises
    ------
    ProcessError
        If other steps were taken: then their time says nothing.
    """
    steps = answer["steps"]
    if replayed is not None:
        counts = [[step[:2] for step in found["steps"]] for found in (answer, replayed)]
        if counts[0] != counts[1] or answer["tokens"] != replayed["tokens"]:
            raise ProcessError("the steps that were taken again are not the steps of the answer")
    return Answered(
        **facts,
        tokens=sum(tokens for _, tokens, _ in steps),
        steps=len(steps),
        positions=sum(positions for positions, _, _ in steps),
        seconds=round(sum(seconds for _, _, seconds in steps), 5),
        loopback_s=None if replayed is None else round(sum(s for _, _, s in replayed["steps"]), 5),
        round_trips=answer["round_trips"],
        bytes_up=answer["bytes_up"],
        bytes_down=answer["bytes_down"],
        lengths=decode_record.lengths((positions, seconds) for positions, _, seconds in steps),
        first_s=round(answer["first_s"], 4),
        steal=answer["steal"],
        loopback_steal=None if replayed is None else replayed["steal"],
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    add_edge_options(parser)
    parser.add_argument("--presets", nargs="*", default=["5g", "wan", "loopback"], help="or rttN (ms)")
    fast = ["one-trip-lean"]
    parser.add_argument("--fast", nargs="*", default=fast, help="plans for all prompts, both ways")
    parser.add_argument("--slow", nargs="*", default=["grouped", "per-layer"], help="plans for fewer prompts")
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="without the whole model")
    parser.add_argument("--no-replay", dest="replay", action="store_false", help="without the bound")
    parser.add_argument("--prompts", type=int, default=20, help="how many, kinds taking turns")
    parser.add_argument("--kind-of-text", help="prompts of one kind alone; repetition is not among the mixed")
    parser.add_argument("--tokens", type=int, default=128, help="longest answer (tokens)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="times that fast plans answer each prompt; the first has the bound",
    )
    parser.add_argument("--slow-prompts", type=int, default=3)
    parser.add_argument("--slow-tokens", type=int, default=8)
    parser.add_argument(
        "--draft-tokens", type=int, default=DEFAULT_DRAFT_TOKENS, help="longest draft; 0: no drafting"
    )
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further words for the cloud")
    options = parser.parse_args()
    options.offers = offers_of(parser, options, (*options.fast, *options.slow))
    return options


def main() -> int:
    """Run what is missing, or only print; the summary is one JSON line last."""
    options = parsed()
    end_on_sigterm()
    status = 0
    if options.command == "run":
        course = Course(options)
        try:
            for name in options.presets:
                course.over_link(name)
            course.plain()
        except (LinkError, ProcessError, subprocess.TimeoutExpired) as error:
            say(str(error))
            status = 1
    rows = decode_record.read(options.record, Answered)
    print(json.dumps(decode_table.show([row for row in rows if row.label == options.label])))
    return status


if __name__ == "__main__":
    sys.exit(main())
