"""Claim: drafting yields more tokens a step, and never makes a prompt slower than none by more than 5 %.

Replays the recorded greedy answers (`benchmarks.drafting_answers`, plain Hugging Face code) through the
drafter that the command line uses. That is exact for the counts: a greedy answer is the same with and
without drafts, whatever the network and the split, so a draft is right where it equals the answer.

What a step takes is computed, not measured: ``RTT + step * (1 + slope * drafted)``, as in a plan with one
round trip a token. The drafter is not told: it sees these times on its clock, with noise, and starts each
prompt without experience. Speeds against no drafting are by the same formula, without the noise.

``python -m benchmarks.drafting`` takes seconds. The figures come as one JSON line last.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator

from benchmarks.drafting_answers import PROMPTS, Recorded, prompt_ids, read_record
from benchmarks.mixed_prompts import DOCUMENTS
from edge_client.datastore import Datastore
from edge_client.draft_length import DEFAULT_DRAFT_TOKENS
from edge_client.drafting import Drafter
from shared.models import DEFAULT_MODEL, resolve

LINKS_MS = {"loopback": 0.0, "wifi": 4.0, "5g": 20.0, "wan": 80.0}  # RTT
LIMIT = 2048  # positions that a row may have
STALL_SHARE, STALL = 0.02, 5.0  # of the steps; how many times longer they take

# Given the clock and how long prompt and answer are together, the `CandidateGenerator` of one answer.
Maker = Callable[["Clock", int], Any]


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by its drafted tokens."""

    rtt_s: float
    step_s: float
    slope: float

    def of(self, drafted: int) -> float:
        """Return the seconds of a step with one token and ``drafted`` more."""
        return self.rtt_s + self.step_s * (1 + self.slope * drafted)


class Clock:
    """Seconds that pass only with steps, with noise."""

    def __init__(self, jitter: float, seed: int) -> None:
        self.now, self._jitter, self._rng = 0.0, jitter, np.random.default_rng(seed)

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def step(self, seconds: float) -> None:
        """Let a step pass that takes this long but for noise and stalls."""
        noise = float(np.exp(self._rng.normal(0.0, self._jitter))) if self._jitter else 1.0
        if self._jitter and self._rng.random() < STALL_SHARE:
            noise *= STALL
        self.now += seconds * noise


@dataclass(frozen=True)
class Outcome:
    """One replayed answer, after its first token: counts, and seconds by the formula."""

    kind: str
    prompt: int
    tokens: int
    steps: int
    drafted: int
    accepted: int
    seconds: float
    plain_s: float

    @property
    def slowdown(self) -> float:
        """How much longer it took than without drafts; below 0 it was faster."""
        return self.seconds / self.plain_s - 1


def replay(prompt: list[int], row: Recorded, cost: Cost, make: Maker, clock: Clock) -> Outcome:
    """Let drafts be made for a recorded answer, and check each as transformers' loop would."""
    right = [*prompt, *row.tokens]
    generator = make(clock, len(prompt) + len(row.tokens))
    done, steps, drafted, accepted, seconds = len(prompt), 0, 0, 0, 0.0
    while done < len(right):
        ids = torch.tensor([right[:done]])
        candidates, _ = generator.get_candidates(ids)
        guess, answer = candidates[0, done:].tolist(), right[done:-1]  # the last one comes undrafted
        matches = 0
        while matches < min(len(guess), len(answer)) and guess[matches] == answer[matches]:
            matches += 1
        clock.step(cost.of(len(guess)))
        if steps:  # the first one is the prompt's
            seconds += cost.of(len(guess))
            drafted, accepted = drafted + len(guess), accepted + matches
        done, steps = done + matches + 1, steps + 1
        generator.update_candidate_strategy(torch.tensor([right[:done]]), torch.empty(0), matches)
    tokens = len(row.tokens) - 1
    kind = PROMPTS[row.prompt].kind
    return Outcome(kind, row.prompt, tokens, steps - 1, drafted, accepted, seconds, tokens * cost.of(0))


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    """Return the figures of several answers."""
    drafted = sum(o.drafted for o in outcomes)
    return {
        "tokens_per_step": round(sum(o.tokens for o in outcomes) / sum(o.steps for o in outcomes), 3),
        "drafted": drafted,
        "accepted": sum(o.accepted for o in outcomes),
        "speedup": round(sum(o.plain_s for o in outcomes) / sum(o.seconds for o in outcomes), 3),
        "worst_slowdown": round(max(o.slowdown for o in outcomes), 4),
    }


def ways(tokenizer: Any, most: int) -> Iterator[tuple[str, Maker]]:
    """Yield what is compared."""
    for fixed in (4, 8):

        def lookup(clock: Clock, longest: int, count: int = fixed) -> CandidateGenerator:
            return PromptLookupCandidateGenerator(num_output_tokens=count, max_length=longest)

        yield f"transformers' prompt lookup, always {fixed}", lookup
    root = Path(__file__).resolve().parents[1]
    documents = Datastore.read([root / name for name in DOCUMENTS], tokenizer)
    for name, given in (("session", None), ("session and documents", documents)):

        def ours(clock: Clock, longest: int, given: Datastore | None = given) -> CandidateGenerator:
            return Drafter(most, given, clock).begin(min(longest - 1, LIMIT), LIMIT)

        yield f"{name}, at most {most}", ours


def main() -> None:
    """Replay every way on every link, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draft-tokens", type=int, default=DEFAULT_DRAFT_TOKENS, help="longest draft")
    parser.add_argument("--step-ms", type=float, default=35.0, help="a step of one position, no network")
    parser.add_argument("--slope", type=float, default=0.25, help="of that, for each further position")
    parser.add_argument("--jitter", type=float, default=0.1, help="of a step's time (standard deviation)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--each", action="store_true", help="print every prompt")
    options = parser.parse_args()
    record = read_record()
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(DEFAULT_MODEL).folder, local_files_only=True)
    prompts = {number: prompt_ids(tokenizer, number) for number in record}
    figures: list[dict[str, Any]] = []
    print(f"{'':46}{'tokens/step':>22}{'speed-up':>20}{'slowest':>9}")
    print(f"{'':46}{'mixed':>11}{'repeated':>11}{'mixed':>10}{'repeated':>10}{'prompt':>9}")
    for link, rtt_ms in LINKS_MS.items():
        cost = Cost(rtt_ms / 1e3, options.step_ms / 1e3, options.slope)
        for way, make in ways(tokenizer, options.draft_tokens):
            outcomes = [
                replay(prompts[n], row, cost, make, Clock(options.jitter, options.seed + n))
                for n, row in sorted(record.items())
            ]
            kinds = sorted({o.kind for o in outcomes})
            parts = {kind: summary([o for o in outcomes if o.kind == kind]) for kind in kinds}
            mixed = summary([o for o in outcomes if o.kind != "repetition"])
            repeated = parts.get("repetition", mixed)
            about = [o for o in outcomes if PROMPTS[o.prompt].about_documents]
            if about:
                parts["about documents"] = summary(about)
            figures.append({"link": link, "way": way, "mixed": mixed, "kinds": parts})
            slowest = max(mixed["worst_slowdown"], repeated["worst_slowdown"])
            print(
                f"{link:10}{way:36}{mixed['tokens_per_step']:11.2f}{repeated['tokens_per_step']:11.2f}"
                f"{mixed['speedup']:10.2f}{repeated['speedup']:10.2f}{slowest:+9.1%}",
                flush=True,
            )
            if options.each:
                for o in outcomes:
                    print(f"    {o.prompt:3} {o.kind:11}{o.tokens / o.steps:6.2f}{o.slowdown:+8.1%}")
    settings = {k: v for k, v in vars(options).items() if k != "each"}
    print(json.dumps({"benchmark": "drafting", "answers": len(record), **settings, "figures": figures}))


if __name__ == "__main__":
    main()
