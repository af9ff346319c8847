"""Edges that decode all the while: the process of a chaos or overload run that holds some of them.

Each edge is a thread with sessions of its own; those of one process share a connection, as the requests
of one application do. What each generates is compared token by token with what the single-process
reference says (`shared.exactness`), and every step is noted (`benchmarks.step_log`). Started by
`benchmarks.child.Child`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.child import answering, arguments
from benchmarks.prompts import PROMPTS
from benchmarks.step_log import StepLogs, note_in, watch
from edge_client.connection import Timeouts
from edge_client.drafting import Drafter
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter
from shared.exactness import Comparison, Greedy, combined, compare, continuation


class Edge:
    """One edge: generates until it is stopped, and remembers what went wrong."""

    def __init__(self, number: int, model: PrivateLoraForCausalLM, drafts: bool) -> None:
        self.number, self.model = number, model
        self.logs, self.verdicts = StepLogs(), list[Comparison]()
        self.errors: list[str] = []
        self._options: dict[str, Any] = {"drafter": Drafter(4)} if drafts else {}
        self._thread: threading.Thread | None = None
        self.over = threading.Event()

    def once(self, expected: Greedy) -> None:
        """Generate one answer and compare it."""
        try:
            self.verdicts.append(compare([expected], continuation(self.model, **self._options)))
        except Exception as error:  # whatever it is, this generation has not finished
            self.errors.append(f"{type(error).__name__}: {error}")
            print(f"edge {self.number}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            time.sleep(0.5)

    def begin(self, expected: list[Greedy]) -> None:
        """Generate on a thread of its own, one answer after another."""

        def run() -> None:
            note_in(self.logs)
            turn = self.number
            while not self.over.is_set():
                self.once(expected[turn % len(expected)])
                turn += 1

        self.over.clear()
        self._thread = threading.Thread(target=run, name=f"edge-{self.number}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Let it finish the answer it is at; whether it has."""
        self.over.set()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def report(self) -> dict[str, Any]:
        """Return what it has done so far."""
        total = combined(self.verdicts)
        return {
            "edge": self.number,
            "generations": len(self.verdicts),
            "tokens": total.tokens,
            "ties": total.ties,
            "mismatches": total.mismatches,
            "differences": [str(difference) for difference in total.differences][:20],
            "unfinished": len(self.errors),
            "errors": list(dict.fromkeys(self.errors))[:10],  # each once
            "attempts": self.logs.attempts.intervals(),
            "wholes": self.logs.wholes.intervals(),
            "recoveries": self.logs.recoveries.intervals(),
        }


class Group:
    """The edges of one connection: one plan, one adapter.

    Parameters
    ----------
    given
        As for `Decoding`.
    place
        Which of its plans.
    """

    def __init__(self, given: dict[str, Any], place: int) -> None:
        self.model = model = PrivateLoraForCausalLM.from_cloud(
            given["cloud"],
            plan=given["plans"][place],
            wire_dtype="float32",
            config_dir=Path(given["folder"]),
            cache_dir=Path(given["cache_dir"]) if given.get("cache_dir") else None,
            timeouts=Timeouts(
                *(given[f"{name}_s"] for name in ("connect_timeout", "step_timeout", "recover"))
            ),
        )
        empty = model.adapter
        adapter = Adapter.random(empty.plan, empty.fingerprint, seed=given["seed"] + place, std=given["std"])
        self.file = Path(given["folder"]) / f"adapter-{place}.safetensors"
        adapter.save(self.file)
        model.set_adapter(adapter)
        first, every = given["first"] + place * given["edges"], given.get("drafting", 0)
        self.edges = [
            Edge(number, model, drafts=bool(every) and number % every == every - 1)
            for number in range(first, first + given["edges"])
        ]
        self.expected: list[Greedy] = []


class Decoding:
    """All edges of this process.

    Parameters
    ----------
    given
        ``cloud`` (host:port), ``plans`` (names; a connection each), ``first`` (number of the first edge),
        ``edges`` (of each connection, count), ``folder`` (for pins and adapters), ``seed``, ``std`` (of M),
        ``step_timeout_s``, ``connect_timeout_s``, ``recover_s``, ``cache_dir``, and ``drafting`` (every
        how-manieth edge guesses ahead; 0: none).
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.groups = [Group(given, place) for place in range(len(given["plans"]))]
        self.edges = [edge for group in self.groups for edge in group.edges]

    def prompts(self, count: int) -> list[list[int]]:
        """Return prompts as token ids, made by this side's tokenizer and chat template."""
        tokenizer: Any = self.groups[0].model.tokenizer
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
            for text in PROMPTS[:count]
        ]

    def adapters(self) -> list[str]:
        """Return the file of each connection's adapter."""
        return [str(group.file) for group in self.groups]

    def expect(self, group: int, file: str) -> dict[str, Any]:
        """Read what the reference has generated with the adapter of one connection."""
        self.groups[group].expected = [Greedy(**one) for one in json.loads(Path(file).read_text())]
        return {}

    def once(self) -> dict[str, Any]:
        """Let every edge generate one answer while nothing disturbs it."""
        threads = [
            threading.Thread(target=edge.once, args=(group.expected[edge.number % len(group.expected)],))
            for group in self.groups
            for edge in group.edges
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {}

    def begin(self) -> dict[str, Any]:
        """Let every edge generate without end."""
        for group in self.groups:
            for edge in group.edges:
                edge.begin(group.expected)
        return {}

    def stop(self, patience_s: float) -> list[int]:
        """Let every edge finish its answer; return those that have not."""
        deadline = time.monotonic() + patience_s
        for edge in self.edges:
            edge.over.set()
        return [e.number for e in self.edges if not e.stop(max(0.1, deadline - time.monotonic()))]

    def report(self) -> list[dict[str, Any]]:
        """Return what every edge has done."""
        return [edge.report() for edge in self.edges]

    def noted(self, since: float) -> list[dict[str, Any]]:
        """Return what every edge has noted of its steps that ended since then (monotonic seconds)."""
        return [edge.logs.since(since) for edge in self.edges]

    def close(self) -> dict[str, Any]:
        """Close every session and connection, in order."""
        for group in self.groups:
            group.model.close()
        return {}


def main() -> None:
    """Answer until there are no more questions."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    given = arguments()
    torch.set_num_threads(1)
    watch()
    decoding = Decoding(given)
    names = ("prompts", "adapters", "expect", "once", "begin", "stop", "report", "noted", "close")
    answering({name: getattr(decoding, name) for name in names})


if __name__ == "__main__":
    main()
