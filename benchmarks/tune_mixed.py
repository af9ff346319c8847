"""Tuning and decoding at once: two edges tune while four sessions decode, against either alone.

The cloud is one process, each tuning edge another, and the four sessions a fourth. First decoding alone and
tuning alone are timed, then both together. M stays as it is, so every batch of a tuning edge must give the
bits that it gave alone, and every answer the tokens that it had alone.

Tuning's speed is read from what its stream has carried, which grows with the rows that have run; so part of a
batch counts.

    python -m benchmarks.tune_mixed
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import hashlib
import json
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from benchmarks.loopback import Stopwatch
from benchmarks.processes import CloudProcess
from benchmarks.prompts import PROMPTS
from benchmarks.tune_edge import Load, TuningEdge
from edge_client.model import PrivateLoraForCausalLM
from shared.adapter import Adapter
from shared.models import DEFAULT_MODEL

STD = 0.05  # of M's elements: changes nearly every answer and leaves it fluent
LOADS = (Load((64,) * 6, 8), Load((96, 31, 70, 59, 128), 8))  # one a tuning edge: a whole piece each


def tuning_edge(address: str, number: int, talk: Connection) -> None:
    """Tune in a process of its own: runs until told to stop, then says what its gradients were.

    Answers ``begin`` (tune without end), ``progress`` ((seconds, batches so far, parts included)) and
    ``stop`` (after the batch under way; a digest of each batch's gradients).
    """
    load = LOADS[number]
    with PrivateLoraForCausalLM.from_cloud(address) as model:
        edge = TuningEdge(model)
        adapter = Adapter.random(model.adapter.plan, model.adapter.fingerprint, seed=number, std=STD)
        examples, digests = load.examples(edge.vocab, seed=number), list[str]()
        over = threading.Event()

        def tune() -> None:
            while not over.is_set():
                gradients = edge.learner.gradients(examples, adapter.matrices).gradients
                raw = b"".join(gradients[layer].numpy().tobytes() for layer in sorted(gradients))
                digests.append(hashlib.sha256(raw).hexdigest())

        edge.learner.gradients(examples, adapter.matrices)
        assert edge.stream is not None
        carried = edge.stream.traffic
        whole = carried.bytes_down + carried.bytes_up
        talk.send("ready")
        while (asked := talk.recv()) != "end":
            if asked == "begin":
                over.clear()
                digests.clear()
                thread = threading.Thread(target=tune)
                thread.start()
            elif asked == "progress":
                talk.send((time.monotonic(), (carried.bytes_down + carried.bytes_up) / whole))
            else:
                over.set()
                thread.join()
                talk.send(list(digests))
        edge.close()


class Tuning:
    """Two tuning edges, each a process."""

    def __init__(self, address: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.talks: list[Connection] = []
        self._processes = []
        for number in range(len(LOADS)):
            mine, theirs = context.Pipe()
            process = context.Process(target=tuning_edge, args=(address, number, theirs), daemon=True)
            process.start()
            self.talks.append(mine)
            self._processes.append(process)
        for talk in self.talks:
            if not talk.poll(180) or talk.recv() != "ready":
                raise RuntimeError("a tuning edge did not start")

    def say(self, word: str) -> None:
        """Tell both."""
        for talk in self.talks:
            talk.send(word)

    def progress(self) -> list[tuple[float, float]]:
        """Return (seconds, batches) of each edge."""
        self.say("progress")
        return [talk.recv() for talk in self.talks]

    def stop(self) -> list[list[str]]:
        """Return the digests of each edge's gradients, batch by batch."""
        self.say("stop")
        return [talk.recv() for talk in self.talks]

    def end(self) -> None:
        """End both processes."""
        self.say("end")
        for process in self._processes:
            process.join(30)


def speed(begin: list[tuple[float, float]], end: list[tuple[float, float]]) -> list[float]:
    """Return each edge's tokens/s in between."""
    return [load.tokens * (b[1] - a[1]) / (b[0] - a[0]) for load, a, b in zip(LOADS, begin, end, strict=True)]


class Decoding:
    """Four sessions of one edge process, each with a question of its own, greedy."""

    def __init__(self, model: PrivateLoraForCausalLM, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        tokenizer: Any = model.tokenizer
        self.chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            for text in PROMPTS[:4]
        ]  # fmt: skip
        model.generation_config.eos_token_id = None  # every answer has the same length

    def round(self) -> tuple[float, list[list[int]]]:
        """Return tokens/s of all four while all of them decode, and what each said."""
        watches = [Stopwatch() for _ in self.chats]
        said: list[list[int]] = [[] for _ in self.chats]

        def answer(index: int) -> None:
            chat = self.chats[index]
            out = self.model.generate(
                chat, attention_mask=torch.ones_like(chat), do_sample=False, max_new_tokens=self.tokens,
                stopping_criteria=StoppingCriteriaList([watches[index]]), pad_token_id=0,
            )  # fmt: skip
            said[index] = out[0, chat.shape[1] :].tolist()

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(self.chats))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(len(tokens) != self.tokens for tokens in said):
            raise RuntimeError("a session ended before its time")
        begin, end = max(w.times[0] for w in watches), min(w.times[-1] for w in watches)
        return sum(1 for w in watches for t in w.times if begin < t <= end) / (end - begin), said


def main() -> None:
    """Run the benchmark and print its figures as one JSON line last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3, help="of decoding alone, and of both together")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a session and round")
    parser.add_argument("--seconds", type=float, default=20.0, help="that tuning alone is watched for")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the cloud's tuning, NAME=VALUE")
    arguments = parser.parse_args()
    environment = dict(setting.split("=", 1) for setting in arguments.set)
    environment = {f"PRIVATELORA_CLOUD_TUNING__{name.upper()}": value for name, value in environment.items()}
    with (
        CloudProcess(arguments.model, env=environment) as cloud,
        PrivateLoraForCausalLM.from_cloud(cloud.address) as model,
    ):
        decoding, tuning = Decoding(model, arguments.tokens), Tuning(cloud.address)
        _, expected = decoding.round()
        rounds = [decoding.round() for _ in range(arguments.rounds)]

        tuning.say("begin")
        before = tuning.progress()
        time.sleep(arguments.seconds)
        alone = speed(before, tuning.progress())
        undisturbed = tuning.stop()

        tuning.say("begin")
        decoding.round()
        before = tuning.progress()
        both = [decoding.round() for _ in range(arguments.rounds)]
        beside = speed(before, tuning.progress())
        disturbed = tuning.stop()

        rounds.append(decoding.round())  # alone once more: the machine's own speed drifts
        tuning.end()
    decode_alone, decode_both = (statistics.median(rate for rate, _ in found) for found in (rounds, both))
    figures = {
        "set": arguments.set,
        "decode_alone": [round(rate, 2) for rate, _ in rounds],
        "decode_beside": [round(rate, 2) for rate, _ in both],
        "decode_kept": round(decode_both / decode_alone, 3),
        "tune_alone": [round(rate, 1) for rate in alone],
        "tune_beside": [round(rate, 1) for rate in beside],
        "tune_kept": round(sum(beside) / sum(alone), 3),
        "sessions_whose_tokens_differ": sum(
            said != wanted
            for _, found in (*rounds, *both)
            for said, wanted in zip(found, expected, strict=True)
        ),
        "batches_compared": [len(found) for found in disturbed],
        "gradients_differ": sum(
            digest != ours[0]
            for ours, theirs in zip(undisturbed, disturbed, strict=True)
            for digest in (*ours, *theirs)
        ),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
