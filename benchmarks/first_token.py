"""Time to the first token of a long prompt over emulated links, pipelined and not, against the ideal.

    python -m benchmarks.first_token run --presets wan 5g --rounds 5
    python -m benchmarks.first_token table

A prompt travels in chunks that follow each other through the layers, so that the link and both sides work at
the same time. Each round takes every chunk size in turn, with as many steps under way as the cloud allows,
and the largest chunk with one step under way, where nothing overlaps; before each of them the whole model
runs a prompt of the same length in one process. Prompts are random tokens, never the same twice. Sessions
are open before and hold nothing of the prompt. `benchmarks.first_token_record` says what is computed. The
summary comes as one JSON line last.
"""

import argparse
import datetime
import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import decode_record, first_token_record
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
from benchmarks.first_token_record import FirstToken
from benchmarks.link import Joined, Link, LinkError, end_on_sigterm, say
from benchmarks.link_check import tcp_s
from benchmarks.processes import CloudProcess, ProcessError

RECORD = Path(__file__).with_name("first_token_runs.jsonl")
PIPELINED = 8  # steps under way, as a cloud allows by default
LOWEST_TOKEN = 10  # those below are special
WARM_UP_TOKENS = 32


class Prompts:
    """Random prompts: no two begin alike, so that no session holds part of one."""

    def __init__(self, vocab: int) -> None:
        self._vocab, self._random = vocab, random.Random(7)

    def next(self, tokens: int) -> list[int]:
        """Return token ids."""
        return [self._random.randrange(LOWEST_TOKEN, self._vocab) for _ in range(tokens)]


def ways(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return what is compared: (chunk, steps under way), the unpipelined one last."""
    return [*((chunk, PIPELINED) for chunk in options.chunks), (options.tokens, 1)]


def measure(
    options: argparse.Namespace,
    name: str,
    rtt_ms: float,
    plan: str,
    link: Joined,
    edge: Driver,
    whole: Driver,
) -> list[FirstToken]:
    """Measure one plan over one link, and put it into the record."""
    about, prompts = edge.ask("about"), Prompts(int(whole.ask("about")["vocabulary"]))
    rows = []
    whole.ask("first", ids=prompts.next(options.tokens))
    for turn in range(options.rounds):
        taken = ways(options)
        for chunk, in_flight in taken if turn % 2 else taken[::-1]:
            edge.ask("limit", chunk=chunk, in_flight=in_flight)
            edge.ask("first", ids=prompts.next(WARM_UP_TOKENS))  # opens the session
            local = whole.ask("first", ids=prompts.next(options.tokens))
            found = edge.ask("first", ids=prompts.next(options.tokens))
            row = FirstToken(
                label=options.label,
                preset=name,
                rtt_ms=rtt_ms,
                up_mbit_s=link_named(name).up_mbit_s,
                plan=plan,
                resident=about["resident"],
                round_trips=about["round_trips"],
                dtype=options.dtype,
                wire=wire_of(options),
                threads=options.threads,
                tokens=options.tokens,
                chunk=chunk,
                in_flight=in_flight,
                embeddings_bytes=options.tokens * about["hidden_bytes"],
                bytes_up=found["bytes_up"],
                bytes_down=found["bytes_down"],
                seconds=round(found["seconds"], 4),
                local_s=round(local["seconds"], 4),
                steal=found["steal"],
                local_steal=local["steal"],
                tcp_s=round(tcp_s(link, found["bytes_up"], found["bytes_down"]), 4),
                date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
            decode_record.append(options.record, row)
            rows.append(row)
            say(
                f"{name}, {plan}, chunks of {chunk}, {in_flight} under way: {row.seconds:.2f} s, ideal "
                f"{row.ideal_s:.2f} s, ratio {row.ratio:.2f}, over plain sockets {row.tcp_s:.2f} s, "
                f"steal {row.steal:.1%} and {row.local_steal:.1%}"
            )
    return rows


def over_link(options: argparse.Namespace, name: str) -> None:
    """Measure every plan over one link."""
    opened = Link(link_named(name), options.kind)
    with opened as link:
        rtt_ms = opened.checked["rtt_ms"] if opened.checked else 0.0
        with CloudProcess(
            options.model,
            options.dtype,
            cloud_words(options, options.plans),
            host=link.cloud_host,
            prefix=link.cloud_prefix,
        ) as cloud:
            for plan in options.plans:
                with _edge(options, plan, link, cloud) as edge, Driver(whole_words(options)) as alone:
                    measure(options, name, rtt_ms, plan, link, edge, alone)


def _edge(options: argparse.Namespace, plan: str, link: Joined, cloud: CloudProcess) -> Driver:
    return Driver(["--cloud", link.address(cloud.port), *edge_words(options, plan)], link.edge_prefix)


def table(rows: Sequence[FirstToken]) -> list[dict[str, Any]]:
    """Print what a record says; return the same as plain values."""
    groups: dict[tuple[str, str, str, str, int, int, int], list[FirstToken]] = defaultdict(list)
    for row in rows:
        groups[(row.preset, row.plan, row.dtype, row.wire, row.tokens, row.chunk, row.in_flight)].append(row)
    print(
        "| link | plan | dtype | prompt | chunks | first token, s | ideal, s | local prefill, s | ratio "
        "| range | aim | bytes over plain sockets, s | ratio with these | counted | bytes up, down |\n|"
        + "---|"
        * 15
    )
    figures = []
    for (name, plan, dtype, wire, tokens, chunk, in_flight), found in groups.items():
        one = first_token_record.summary(found)
        facts = {"preset": name, "plan": plan, "dtype": dtype, "wire": wire, "tokens": tokens}
        figures.append({**facts, "chunk": chunk, "in_flight": in_flight, **asdict(one)})
        chunks = f"of {chunk}" if in_flight > 1 else "one after another"
        print(
            f"| {name} ({found[0].rtt_ms:.1f} ms) | {plan} {wire} | {dtype} | {tokens} | {chunks} "
            f"| {one.seconds:.2f} | {one.ideal_s:.2f} | {one.local_s:.2f} | {one.ratio:.2f} "
            f"| {one.lowest:.2f} to {one.highest:.2f} | {one.aim or 'ruled out'} | {_or_not(one.tcp_s)} "
            f"| {_or_not(one.tcp_ratio)} | {one.counted} of {one.tried} | {one.bytes_up}, {one.bytes_down} |"
        )
    return figures


def _or_not(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    add_edge_options(parser)
    parser.add_argument("--presets", nargs="*", default=["wan", "5g"], help="or rttN (ms)")
    parser.add_argument("--plans", nargs="*", default=["one-trip-lean", "grouped", "per-layer"])
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 256, 128, 64], help="sizes to try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further words for the cloud")
    options = parser.parse_args()
    options.offers = offers_of(parser, options, options.plans)
    return options


def main() -> int:
    """Run, or only print; the summary is one JSON line last."""
    options = parsed()
    end_on_sigterm()
    status = 0
    if options.command == "run":
        try:
            for name in options.presets:
                over_link(options, name)
        except (LinkError, ProcessError, subprocess.TimeoutExpired) as error:
            say(str(error))
            status = 1
    rows = [row for row in decode_record.read(options.record, FirstToken) if row.label == options.label]
    print(json.dumps(table(rows)))
    return status


if __name__ == "__main__":
    sys.exit(main())
