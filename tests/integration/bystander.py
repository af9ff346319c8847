"""An honest session that generates all the while, and whose tokens must not change whatever others do."""

import threading

import torch
from transformers import PreTrainedModel

from edge_client.connection import Connection
from edge_client.personal import PersonalWeights
from edge_client.spans import Span
from shared.adapter import Adapter
from shared.exactness import Greedy, compare, greedy
from shared.fingerprint import Fingerprint
from shared.lowrank import LowRank
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.plan import Plan
from shared.reference import merged
from shared.wire_dtypes import WireDtypes
from tests.families import prompts
from tests.splits import matrices_for

NEW_TOKENS = 24
NOTHING = Fingerprint(plan=bytes(32), lowrank=bytes(32), layers=bytes(32), edge=bytes(32))


class Bystander:
    """Generates greedily, again and again, on a thread of its own inside the ``with`` block.

    On leaving, every generation must have been what the reference says, and there must be at least
    one that was begun and ended inside the block.
    """

    def __init__(self, address: str, model: PreTrainedModel, plan: Plan, lowrank: LowRank) -> None:
        self.address, self.plan = address, plan
        self.matrices = matrices_for(plan, seed=7)
        self.embed, self.norm, self.head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.expected: list[Greedy] = [
            greedy(merged(model, plan, lowrank, self.matrices), prompt, NEW_TOKENS) for prompt in prompts(2)
        ]
        self.generated = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def __enter__(self) -> "Bystander":
        self.generated, self._error = 0, None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(300)
        assert not self._thread.is_alive(), "the bystander waits for the cloud in vain"
        if self._error is not None:
            raise self._error
        assert self.generated > 0

    def once(self) -> None:
        """Generate once, in a session of its own."""
        connection = Connection(self.address)
        try:
            self._generate(connection)
        finally:
            connection.close()

    def _run(self) -> None:
        try:
            connection = Connection(self.address)
            try:
                while True:
                    self._generate(connection)
                    self.generated += 1
                    if self._stop.is_set():
                        return
            finally:
                connection.close()
        except BaseException as error:
            self._error = error

    @torch.inference_mode()
    def _generate(self, connection: Connection) -> None:
        described = connection.describe()
        offer = next(o for o in described.plans if o.plan_json == self.plan.canonical_json())
        personal = PersonalWeights(Adapter(self.plan, NOTHING, self.matrices))
        session = connection.open_session(
            personal, offer.fingerprint, WireDtypes.all(pb.DTYPE_FLOAT32), described.limits
        )

        def continued(ids: list[int], new_tokens: int) -> list[int]:
            tokens, new, start = list(ids), list(ids), 0
            while len(tokens) < len(ids) + new_tokens:
                hidden = session.step(self.embed(torch.tensor(new)), [Span(0, start, len(new), 1)])
                start = len(tokens)
                new = [int(self.head(self.norm(hidden))[-1].argmax())]
                tokens += new
            return tokens[len(ids) :]

        verdict = compare(self.expected, continued)
        session.close()
        assert verdict.exact, str(verdict)
