"""An edge that answers one request after another: the process behind `benchmarks.edge_drivers.Driver`.

    python -m benchmarks.edge_driver --cloud HOST:PORT --plan one-trip
    python -m benchmarks.edge_driver --plain smollm2-135m-instruct --dtype bfloat16

Uses the edge's Python interface, as an application would; with ``--plain`` the whole model in this process,
with nothing of ours. Reads a JSON object a line from stdin, writes one a line to stdout, ends with stdin.
Every answer begins with a session that holds nothing, so that no prompt profits from the one before.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LogitsProcessorList

from benchmarks.replay import Forced, Replay, StepWatch
from edge_client.drafting import Drafter
from edge_client.model import PrivateLoraForCausalLM
from edge_client.session import Session
from edge_client.streams import Traffic
from shared.models import resolve
from shared.pb.privatelora.v1 import private_lora_pb2 as pb

WIRE_KINDS = ("wire_dtype", "hidden_wire_dtype", "codes_wire_dtype", "residual_codes_wire_dtype")
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class Answering:
    """A model, split or whole, and how it answers.

    Parameters
    ----------
    model
        A `PrivateLoraForCausalLM`, or a whole causal model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._split = isinstance(model, PrivateLoraForCausalLM)

    def _traffic(self) -> Traffic:
        return self.model.traffic() if self._split else Traffic()

    def answer(
        self, ids: list[int], tokens: int, draft_tokens: int = 0, again: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return tokens, steps and traffic of one greedy answer.

        Parameters
        ----------
        ids
            The prompt (token ids).
        tokens
            Longest answer (tokens).
        draft_tokens
            Most tokens guessed ahead (count), by a drafter without experience.
        again
            What this has returned for the same request before: the same steps are taken again.
        """
        if self._split:
            self.model.set_adapter(self.model.adapter)  # forgets what sessions hold
        drafter = Drafter(draft_tokens) if draft_tokens else None
        processors = LogitsProcessorList()
        if again is not None:
            text = [*ids, *again["tokens"]]
            processors.append(Forced(text))
            tokens = len(again["tokens"])
            if draft_tokens:
                drafter = Replay(text, [(positions, count) for positions, count, _ in again["steps"]])
        marks: list[Traffic] = []
        watch = StepWatch(
            self.model.positions if self._split else None, lambda: marks.append(self._traffic())
        )
        prompt = torch.tensor([ids])
        options = {"drafter": drafter} if drafter else {}
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            streamer=watch,
            logits_processor=processors,
            pad_token_id=0,
            **GREEDY,
            **options,
        )
        spent = self._traffic() - marks[0]
        return {
            "tokens": watch.tokens,
            "first_s": watch.steps[0].seconds,
            "first_tokens": watch.steps[0].tokens,
            "steps": [(step.positions, step.tokens, step.seconds) for step in watch.steps[1:]],
            "bytes_up": spent.bytes_up,
            "bytes_down": spent.bytes_down,
            "round_trips": spent.round_trips,
        }

    def about(self) -> dict[str, Any]:
        """Return what the model and its plan are like."""
        config = self.model.config
        facts = {"layers": config.num_hidden_layers, "vocabulary": config.vocab_size}
        if self._split:
            plan, dtypes = self.model.adapter.plan, self.model.wire_dtypes
            facts |= {"resident": bool(plan.resident_layers), "round_trips": plan.round_trips}
            facts |= {"hidden_bytes": dtypes.hidden_bytes(plan)}
        return facts

    def limit(self, chunk: int, in_flight: int) -> dict[str, Any]:
        """Open sessions from now on as if the cloud had stated these limits, which must not be above its own.

        Parameters
        ----------
        chunk
            Positions that travel in one step (count); a message may hold fewer.
        in_flight
            Steps under way at a time (count).
        """
        connection = self.model.connection

        def described(address: str) -> pb.DescribeResponse:
            stated: pb.DescribeResponse = type(connection).described(connection, address)
            stated.limits.max_step_tokens, stated.limits.max_steps_in_flight = chunk, in_flight
            return stated

        def open_session(*given: Any) -> Session:
            personal, message, dtypes, limits, address = given[:5]
            opened: Session = type(connection).open_session(
                connection, personal, message, dtypes, limits, address, chunk
            )
            return opened

        connection.open_session = open_session
        connection.described = described  # sessions take their limits from what is stated as they open
        self.model.set_adapter(self.model.adapter)  # closes the sessions there are
        return {}

    def first(self, ids: list[int]) -> dict[str, Any]:
        """Return how long one forward takes that wants the last logits only, in the session there is."""
        prompt = torch.tensor([ids])
        before, started = self._traffic(), time.perf_counter()
        with torch.inference_mode():
            token = int(self.model(prompt, logits_to_keep=1).logits[0, -1].argmax())
        seconds, spent = time.perf_counter() - started, self._traffic() - before
        return {
            "token": token,
            "seconds": seconds,
            "bytes_up": spent.bytes_up,
            "bytes_down": spent.bytes_down,
        }


def opened(options: argparse.Namespace) -> Any:
    """Return the model that the options ask for."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.plain is not None:
        dtype = getattr(torch, options.dtype)
        return AutoModelForCausalLM.from_pretrained(resolve(options.plain).folder, dtype=dtype)
    kinds = {name: getattr(options, name) for name in WIRE_KINDS}
    return PrivateLoraForCausalLM.from_cloud(options.cloud, options.adapter, options.plan, **kinds)


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cloud", help="HOST:PORT")
    parser.add_argument("--plan", help="the split to use")
    parser.add_argument("--adapter", help="file of personal weights; without, M = 0")
    parser.add_argument("--plain", help="a whole model in this process instead")
    parser.add_argument("--dtype", default="bfloat16", help="of the whole model")
    parser.add_argument("--threads", type=int, help="torch threads; all cores by default")
    for name in WIRE_KINDS:
        parser.add_argument(f"--{name.replace('_', '-')}", help="what tensors travel as")
    answering = Answering(opened(parser.parse_args()))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        does = {name: getattr(answering, name) for name in ("about", "answer", "first", "limit")}
        print(json.dumps(does[request.pop("do")](**request)), flush=True)
    if isinstance(answering.model, PrivateLoraForCausalLM):
        answering.model.close()


if __name__ == "__main__":
    main()
