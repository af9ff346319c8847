"""Mutated answers against the edge: sessions, tuning streams, parts and offers of a cloud that lies.

The edge's own connection, sessions and checks run as they are, on their thread; in the place of gRPC's
channel there is one that answers as an honest cloud would, and lies now and then. Whatever it says, a call of
the edge gives a tensor of the right shape or one of the errors that are documented, and soon.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from google.protobuf.message import Message

from benchmarks.fuzz_cases import Failure, Tally, sorts, words
from benchmarks.fuzz_channel import LyingCredentials
from benchmarks.fuzz_clouds import DecodeCloud, TuneCloud
from benchmarks.fuzz_edges import CODES_DTYPES, HIDDEN_DTYPES, TUNE_DTYPES
from benchmarks.fuzz_mutation import Corpus, Mutator, corpus_of
from edge_client.connection import CloudConnectionError, Connection, Timeouts
from edge_client.personal import PersonalWeights
from edge_client.session import Session
from edge_client.spans import Span
from edge_client.streams import SessionError
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes

SILENCE_S = 0.01  # after which a cloud that has lied, and has nothing to say, ends the stream
TIMEOUTS = Timeouts(connect_s=10.0, step_s=10.0)
NOTHING = Fingerprint(plan=bytes(32), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))
LIMITS = pb.Limits(max_context_tokens=256, max_step_tokens=64, max_rows=8, max_steps_in_flight=3)
FAULT = "on this side"  # what an edge says where the fault is its own
Honest: TypeAlias = DecodeCloud | TuneCloud


class Liar:
    """What the cloud does in one case: honest answers, some of them mutated; all that was said."""

    def __init__(self, rng: random.Random, honest: Honest | None, corpus: Corpus, tally: Tally) -> None:
        self.rng, self.honest, self.tally = rng, honest, tally
        self.mutate, self.share = Mutator(rng, corpus), rng.choice((0.05, 0.2, 0.2, 0.6))
        self.said: list[bytes] = []
        self.silence_s = TIMEOUTS.step_s

    def answers(self, raw: bytes) -> list[bytes]:
        """Return what is said to a message, lies included."""
        assert self.honest is not None
        said: list[bytes] = []
        for message in self.honest.answers(raw):
            said += self.lies(message)
        return said

    def lies(self, message: Message) -> list[bytes]:
        """Return a message as it is, or what is said instead."""
        rng, right, mutated = self.rng, message.SerializeToString(), False
        raws = [right]
        if rng.random() < self.share:
            self.silence_s = SILENCE_S
            match rng.randrange(10):
                case 0:
                    raws *= rng.choice((2, 3))
                case 1:
                    raws = []
                case 2:
                    others = self.mutate.corpus[message.DESCRIPTOR.full_name]
                    raws = [rng.choice(others).SerializeToString()]
                case 3 if self.said:
                    raws.append(rng.choice(self.said))
                case _:
                    raws, mutated = [self.mutate(message)], True
        for raw, sort in zip(raws, sorts(raws, right, mutated=mutated), strict=True):
            self.said.append(raw)
            self.tally.count(type(message), raw, sort)
        return raws


class Replay(Liar):
    """Says once more what was said in a case."""

    def __init__(self, said: list[bytes]) -> None:
        super().__init__(random.Random(0), None, {}, Tally())
        self._left, self.silence_s = deque(said), SILENCE_S

    def answers(self, raw: bytes) -> list[bytes]:
        """Return the next message: which it was an answer to is not known any more."""
        return [self._left.popleft()] if self._left else []


class HostileCloud:
    """Cases against one connection of an edge.

    Parameters
    ----------
    plans
        Those that sessions are opened for.
    """

    targets: Mapping[str, type[Message]] = MappingProxyType(
        {
            "edge-session": pb.DecodeResponse,
            "edge-tune": pb.TuneResponse,
            "edge-fetch": pb.FetchEdgePartsResponse,
        }
    )

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.credentials = LyingCredentials()
        self.connection = Connection("fuzz:1", TIMEOUTS, self.credentials)
        self.personal = [PersonalWeights(Adapter.random(plan, NOTHING, 0, 0.5)) for plan in plans]
        self.corpus: Corpus = {}
        said: list[Message] = []
        for number in range(4 * len(plans)):
            for target, kind in self.targets.items():
                liar = self._liar(target, random.Random(f"honest/{number}"), Tally())
                liar.share = 0.0
                outcome = self._act(target, random.Random(f"honest/{number}"), liar)
                if outcome != "OK":
                    raise Failure(f"an honest cloud was answered with {outcome}")
                said += [kind.FromString(raw) for raw in liar.said]
        self.corpus = corpus_of(said)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def case(self, target: str, rng: random.Random, tally: Tally) -> tuple[Callable[[], str], list[bytes]]:
        """Return a case to run, and the list that what was said appears in."""
        liar = self._liar(target, rng, tally)
        return lambda: self._act(target, rng, liar), liar.said

    def replay(self, target: str, case: str, inputs: list[bytes]) -> str:
        """Run a case again in which the cloud says what it said then."""
        rng = random.Random(case)
        self._liar(target, rng, Tally())  # draws what was drawn then
        return self._act(target, rng, Replay(inputs))

    def _liar(self, target: str, rng: random.Random, tally: Tally) -> Liar:
        self._at = rng.randrange(len(self.plans))
        plan = self.plans[self._at]
        if target == "edge-fetch":
            return _Server(rng, None, self.corpus, tally)
        honest = DecodeCloud(rng, plan) if target == "edge-session" else TuneCloud(rng, plan)
        return Liar(rng, honest, self.corpus, tally)

    def _act(self, target: str, rng: random.Random, liar: Liar) -> str:
        object.__setattr__(self.credentials, "liar", liar)  # credentials are frozen; these are none
        acts = {"edge-session": self._session, "edge-tune": self._tune, "edge-fetch": self._fetch}
        try:
            acts[target](random.Random(rng.random()))
        except (SessionError, CloudConnectionError) as error:
            if FAULT in str(error):
                raise Failure(f"{error}: {words(error.__cause__ or error)}") from None
            return type(error).__name__
        return "OK"

    def _session(self, rng: random.Random) -> None:
        kinds = rng.choice(CODES_DTYPES), rng.choice(CODES_DTYPES)
        dtypes = WireDtypes.named(rng.choice(HIDDEN_DTYPES), None, *kinds)
        fingerprint = pb.Fingerprint(root=NOTHING.root, **NOTHING.branches())
        session = self.connection.open_session(self.personal[self._at], fingerprint, dtypes, LIMITS)
        try:
            self._steps(session, rng)
        except SessionError as error:
            if FAULT in str(error) or rng.random() < 0.6:
                raise
            self.connection.resume(session, fingerprint)
            self._steps(session, rng)
        finally:
            session.close()

    def _steps(self, session: Session, rng: random.Random) -> None:
        """Run a few steps on a session."""
        plan, length = session.plan, 0
        for _ in range(rng.randint(1, 4)):
            count = rng.choice((1, 1, 3, 70))
            keep = rng.choice((1, count))
            found = session.step(torch.ones(count, plan.hidden_size), [Span(0, length, count, keep)])
            if found.shape != (keep, plan.hidden_size) or not torch.isfinite(found).all():
                raise Failure(f"a step returned {tuple(found.shape)}, asked was {keep}, or it is not finite")
            length += count

    def _tune(self, rng: random.Random) -> None:
        plan = self.plans[self._at]
        matrices = {layer: torch.randn(plan.groups, plan.r_c2d, plan.r_d2c) for layer in plan.owners}
        fingerprint = pb.Fingerprint(root=NOTHING.root, **NOTHING.branches())
        stream = self.connection.open_tuning(plan, fingerprint, rng.choice(TUNE_DTYPES))
        try:
            for _ in range(rng.randint(1, 2)):
                lengths = [rng.choice((1, 3, 40)) for _ in range(rng.choice((1, 2, 4)))]
                shape, forward_only = (sum(lengths), plan.hidden_size), rng.random() < 0.3
                found = stream.forward(torch.ones(shape), lengths, matrices, forward_only=forward_only)
                if found.shape != shape:
                    raise Failure(f"a batch returned {tuple(found.shape)}, not {shape}")
                if not forward_only:
                    gradients = stream.backward(torch.ones(shape))
                    if {k: g.shape for k, g in gradients.items()} != {
                        k: m.shape for k, m in matrices.items()
                    }:
                        raise Failure("gradients of other shapes than M's")
        finally:
            stream.close()

    def _fetch(self, rng: random.Random) -> None:
        for index, piece in enumerate(self.connection.fetch_part(0)):
            if not isinstance(piece, bytes) or index > 100:
                raise Failure("a piece is no bytes, or they do not end")


class _Server(Liar):
    """Answers a fetch with a few pieces, and ends the stream behind them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.silence_s = 0.0

    def answers(self, raw: bytes) -> list[bytes]:
        """Return pieces, lies among them."""
        pieces: Iterator[Message] = (
            pb.FetchEdgePartsResponse(data=self.rng.randbytes(self.rng.choice((1, 100, 5000))))
            for _ in range(3)
        )
        return [raw for piece in pieces for raw in self.lies(piece)]
