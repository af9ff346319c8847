"""Streams that each want an answer: the process of an overload run that holds some of them.

Each stream is a thread that opens a session, decodes greedily and closes it, as bare as can be: what is
measured is the cloud. Where the cloud has no room the stream waits for as long as it is told to and asks
again. Tokens are compared with the single-process reference's. Started by `benchmarks.child.Child`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
import transformers

from benchmarks.child import answering, arguments
from benchmarks.prompts import PROMPTS
from edge_client import claims
from edge_client.claims import Claim
from edge_client.connection import Timeouts
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import fingerprint_message
from edge_client.personal import PersonalWeights
from edge_client.pool import SessionLike
from edge_client.spans import Span
from edge_client.streams import SessionError
from shared.adapter import Adapter
from shared.exactness import Greedy, combined, compare

WITHOUT_HINT_S = 1.0  # before a stream asks again that was not told when


@dataclass
class Answer:
    """How one answer came about. Times are monotonic seconds.

    ``refusals`` counts how often there was no room, ``hints`` how often it was said when to ask again.
    ``lost`` counts sessions that ended before the answer was whole.
    """

    stream: int
    asked: float
    times: list[float] = field(default_factory=list)  # of each new token
    tokens: list[int] = field(default_factory=list)
    refusals: int = 0
    hints: int = 0
    lost: int = 0
    error: str | None = None


class Streams:
    """All streams of this process; they share a connection.

    Parameters
    ----------
    given
        ``cloud``, ``plan``, ``folder``, ``cache_dir``, ``adapter`` (file to write a random one to), ``seed``,
        ``std``, ``step_timeout_s``, ``connect_timeout_s`` and ``deadline_s`` (for one answer).
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.model = PrivateLoraForCausalLM.from_cloud(
            given["cloud"],
            plan=given["plan"],
            wire_dtype="float32",
            config_dir=Path(given["folder"]),
            cache_dir=Path(given["cache_dir"]) if given.get("cache_dir") else None,
            timeouts=Timeouts(connect_s=given["connect_timeout_s"], step_s=given["step_timeout_s"]),
        )
        empty = self.model.adapter
        self.adapter = Adapter.random(empty.plan, empty.fingerprint, seed=given["seed"], std=given["std"])
        self.adapter.save(given["adapter"])
        self.model.set_adapter(self.adapter)
        self.personal = PersonalWeights(self.adapter, self.model._first_codes)
        end: Any = self.model.generation_config.eos_token_id
        self._ends = end if isinstance(end, list) else [end] if end is not None else []
        self._deadline_s = float(given["deadline_s"])
        self.expected: list[Greedy] = []

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Return prompts of one length as token ids."""
        tokenizer: Any = self.model.tokenizer
        texts = [" ".join(PROMPTS[at:] + PROMPTS[:at]) for at in range(count)]
        return [tokenizer(text)["input_ids"][:length] for text in texts]

    def expect(self, file: str) -> dict[str, Any]:
        """Read what the reference has generated."""
        self.expected = [Greedy(**one) for one in json.loads(Path(file).read_text())]
        return {}

    def go(self, start: float, streams: list[list[int]]) -> dict[str, Any]:
        """Let streams begin at the time ``start``; return what became of their answers.

        Parameters
        ----------
        start
            Monotonic seconds, the same in all processes.
        streams
            For each, the numbers of the prompts that it answers one after another.
        """
        answers: list[Answer] = []

        def work(number: int, wanted: list[int]) -> None:
            time.sleep(max(0.0, start - time.monotonic()))
            for prompt in wanted:
                expected = self.expected[prompt]
                answer = Answer(number, time.monotonic())
                answers.append(answer)
                try:
                    with claims.answering():
                        claims.state(Claim(1, len(expected.prompt) + len(expected.tokens)))
                        self._answer(answer, list(expected.prompt), len(expected.tokens))
                except Exception as error:  # one stream's failure is a finding, not the end
                    answer.error = f"{type(error).__name__}: {error}"
                    print(f"stream {number}: {answer.error}", file=sys.stderr, flush=True)

        threads = [
            threading.Thread(target=work, args=(number, wanted), daemon=True)
            for number, wanted in enumerate(streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        prompts = [prompt for wanted in streams for prompt in wanted]
        by_stream = sorted(answers, key=lambda answer: (answer.stream, answer.asked))
        verdict = combined([self._compared(p, a) for p, a in zip(prompts, by_stream, strict=True)])
        return {
            "answers": [asdict(answer) for answer in by_stream],
            "ties": verdict.ties,
            "differences": [str(difference) for difference in verdict.differences if not difference.tie],
        }

    def close(self) -> dict[str, Any]:
        """Close the connection."""
        self.model.close()
        return {}

    def _compared(self, prompt: int, answer: Answer) -> Any:
        given = [answer.tokens]

        def continued(ids: list[int], new_tokens: int) -> list[int]:
            if given:
                return given.pop()
            later = Answer(answer.stream, time.monotonic())  # behind a tie the reference's tokens go on
            self._answer(later, ids, new_tokens)
            return later.tokens

        return compare([self.expected[prompt]], continued)

    @torch.inference_mode()
    def _answer(self, answer: Answer, prompt: list[int], tokens: int) -> None:
        """Decode one answer; whatever the cloud has no room for is asked for again until the deadline."""
        session: SessionLike | None = None
        held = 0  # positions that the session holds
        while len(answer.tokens) < tokens:
            try:
                if session is None:
                    session, held = self._opened(), 0
                text = prompt + answer.tokens
                hidden = session.step(self.model._embed(text[held:]), [Span(0, held, len(text) - held, 1)])
            except SessionError as error:
                if session is not None:
                    session.close()
                    answer.lost += bool(answer.tokens)
                    session = None
                if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                answer.refusals += 1
                answer.hints += error.retry_after_s is not None
                if time.monotonic() - answer.asked > self._deadline_s:
                    raise
                time.sleep((error.retry_after_s or WITHOUT_HINT_S) * random.uniform(1.0, 1.2))
                continue
            held = len(text)
            logits = self.model._head(self.model.norm(hidden.to(self.model.lm_head.weight.dtype)))
            logits[:, self._ends] = -torch.inf  # the reference goes on behind an end, too
            answer.tokens.append(int(logits[-1].argmax()))
            answer.times.append(time.monotonic())
        assert session is not None
        session.close()

    def _opened(self) -> SessionLike:
        connection, offer = self.model.connection, self.model.offer
        assert connection is not None and offer is not None and self.model.wire_dtypes is not None
        fingerprint = fingerprint_message(offer.plans[self.adapter.plan.name][1])
        return connection.open_session(self.personal, fingerprint, self.model.wire_dtypes, offer.raw_limits)


def main() -> None:
    """Answer until there are no more questions."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    given = arguments()
    torch.set_num_threads(1)
    streams = Streams(given)
    names = ("prompts", "expect", "go", "close")
    answering({name: getattr(streams, name) for name in names})


if __name__ == "__main__":
    main()
