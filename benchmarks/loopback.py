"""Loopback: the split model against plain Hugging Face ``generate`` on the same cores, alternating.

One process is the driver: it holds the edge and, for comparison, the whole model. The other is the
cloud. Every figure is a ratio of medians of runs taken in turn, of which those count that the host did
not disturb (`benchmarks.quiet`). Sessions are streams of the driver, which share a head as the reference's
rows do; with ``--separate-heads`` neither shares, as if each session's edge were a machine of its own.

    python -m benchmarks.loopback --dtype float32 --sessions 1 4 16
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import statistics
import threading
import time
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.processes import CloudProcess, memory_bytes
from benchmarks.quiet import Pairs, compared, in_turn
from edge_client.model import PrivateLoraForCausalLM
from edge_client.shared_head import SharedHead
from shared.models import resolve


class Stopwatch(StoppingCriteria):
    """Notes when each step of a ``generate`` ends; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Note the time of a step."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class RowByRow(nn.Module):
    """A head that computes its rows one at a time, as separate edges would."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``(rows, positions, vocab)``."""
        return torch.cat([self.head(row[None]) for row in hidden])


class Prompts:
    """Seeded random prompts, never one twice: an edge would continue from what the cloud still holds."""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.generator = vocab, torch.Generator().manual_seed(7)

    def next(self, count: int, length: int) -> Tensor:
        """Return ``(count, length)`` token ids."""
        return torch.randint(10, self.vocab, (count, length), generator=self.generator)


def decode(model: Any, prompts: Tensor, tokens: int) -> list[float]:
    """Run one greedy ``generate`` and return when each of its steps ended."""
    watch = Stopwatch()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList([watch]),
        pad_token_id=0,
    )
    return watch.times


def rate(times: list[float], rows: int = 1) -> float:
    """Return tokens/s after the first token."""
    return rows * (len(times) - 1) / (times[-1] - times[0])


def decode_many(model: Any, prompts: Tensor, tokens: int) -> tuple[float, float]:
    """Return aggregate tokens/s of one thread per session, and the slowest's share of the median."""
    runs: list[list[float]] = []

    def session(prompt: Tensor) -> None:
        if len(prompts) > 1:
            torch.set_num_threads(1)  # of this thread: the sessions share the cores among themselves
        runs.append(decode(model, prompt[None], tokens))

    threads = [threading.Thread(target=session, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(len(times) != tokens for times in runs):
        raise RuntimeError("a run ended before its time")
    if len(runs) != len(threads):
        raise RuntimeError(f"{len(threads) - len(runs)} of {len(threads)} sessions failed")
    # From the last session's first token on, so that all decode; up to the first one's end.
    begin, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    done = sum(1 for times in runs for t in times if begin < t <= end)
    rates = [rate(times) for times in runs]
    return done / (end - begin), min(rates) / statistics.median(rates)


@torch.inference_mode()
def prefill(model: Any, prompt: Tensor) -> float:
    """Return tokens/s of one forward that wants the last logits only."""
    started = time.perf_counter()
    model(prompt, logits_to_keep=1)
    return prompt.shape[1] / (time.perf_counter() - started)


def bytes_per_token(split: PrivateLoraForCausalLM, prompts: Prompts) -> dict[str, float]:
    """Return what one decoded token sends, as the protocol counts it and as loopback's TCP does.

    Two runs of different length share a prompt's cost, so their difference is decoding alone. TCP is
    both directions with headers and acknowledgements, and whatever else loopback carries meanwhile.
    """
    short, long = 8, 40

    def spent(tokens: int) -> tuple[int, int, int]:
        before, tcp = split.traffic(), psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        decode(split, prompts.next(1, 32), tokens)
        used = split.traffic() - before
        return used.bytes_up, used.bytes_down, psutil.net_io_counters(pernic=True)["lo"].bytes_sent - tcp

    first, second = spent(short), spent(long)
    each = [(b - a) / (long - short) for a, b in zip(first, second, strict=True)]
    return {name: round(value) for name, value in zip(("up", "down", "tcp_both_ways"), each, strict=True)}


def main() -> None:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a run")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--separate-heads", action="store_true", help="one product for each session's head")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layout", default="per_projection", choices=("per_projection", "fused"))
    arguments = parser.parse_args()
    checkpoint = resolve(arguments.model)
    serve = ["--rank", str(arguments.rank), "--layout", arguments.layout, "--kv-bytes", str(400 << 20)]
    names = ("dtype", "rank", "layout", "separate_heads")
    figures: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    with (
        CloudProcess(arguments.model, arguments.dtype, serve) as cloud,
        PrivateLoraForCausalLM.from_cloud(cloud.address) as split,
    ):
        assert split.connection is not None
        figures["edge_rss_mib"] = memory_bytes()[0] >> 20
        plain = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=getattr(torch, arguments.dtype))
        figures["edge_and_reference_rss_mib"] = memory_bytes()[0] >> 20
        for model in (split, plain):  # every run has the same length
            model.generation_config.eos_token_id = None
        vocab = checkpoint.geometry.vocab_size
        prompts = Prompts(vocab)
        figures["bytes_per_token"] = bytes_per_token(split, prompts)
        figures["prefill"] = compared(
            in_turn(
                arguments.rounds,
                lambda: prefill(split, prompts.next(1, arguments.prefill_tokens)),
                lambda: prefill(plain, prompts.next(1, arguments.prefill_tokens)),
            )
        )
        for count in arguments.sessions:

            def ours(count: int = count) -> tuple[float, float]:
                return decode_many(split, prompts.next(count, arguments.prompt_tokens), arguments.tokens)

            def theirs(count: int = count) -> float:
                return rate(
                    decode(plain, prompts.next(count, arguments.prompt_tokens), arguments.tokens), count
                )

            head = plain.lm_head
            if arguments.separate_heads and count > 1:
                # the bound method: a module could not be taken back by what is none
                plain.lm_head, split._head = RowByRow(head), split.lm_head.forward
            before = split.connection.describe()
            pairs = in_turn(arguments.rounds, ours, theirs)
            after = split.connection.describe()
            plain.lm_head, split._head = head, SharedHead(split.lm_head)
            figures[f"decode_{count}"] = compared(
                Pairs([mine for mine, _ in pairs.ours], pairs.theirs, pairs.steal)
            )
            shares = [share for _, share in pairs.quiet().ours]
            figures[f"decode_{count}"]["slowest_of_median"] = round(min(shares), 3)
            steps, batches = after.batched_steps - before.batched_steps, after.batches - before.batches
            figures[f"decode_{count}"]["mean_batch"] = round(steps / batches, 2)
        figures["cloud_rss_mib"] = memory_bytes(cloud.pid)[0] >> 20
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
