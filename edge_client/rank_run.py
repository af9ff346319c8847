"""One ranking, from a cloud's offer and a data file to a document: a model is opened for each plan in turn.

The same rows, in the same order, under every plan: they are made into examples once. Nothing is written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_client.config import EdgeConfig
from edge_client.connection import Connection, Timeouts
from edge_client.credentials import Credentials
from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import CloudOffer, OfferError
from edge_client.opened import opened
from edge_client.rank_report import advice, layer_rows, plan_rows
from edge_client.ranking import PlanWorth, Ranking, RowLosses, held_out, rank_layers, tune_briefly
from edge_client.tune_progress import Progress
from edge_client.tuning.examples import Example, make_examples
from edge_client.tuning.learner import Learner
from edge_client.tuning.rows import Row
from edge_client.tuning.run import learner_for, precision_for, wire_for
from edge_client.tuning.weights import Weights, joined, start_weights
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


@dataclass(frozen=True)
class _Shared:
    """What all plans share: examples to learn and to judge by, the latter's loss without tuning."""

    train: list[Example]
    held: list[Example]
    untuned: RowLosses
    dtypes: WireDtypes


class RankRun:
    """Measures layers and plans.

    Parameters
    ----------
    settings
        Whose ``tune`` says how the short runs are done, and ``plan`` whose layers are ranked: None is the one
        that adapts most.
    data, rows
        The file, for messages, and what it holds.
    held_out_rows
        At most so many to judge by (count).
    progress
        Hears of everything.
    """

    def __init__(
        self, settings: EdgeConfig, data: Path, rows: list[Row], held_out_rows: int, progress: Progress
    ) -> None:
        self.settings, self.data, self.rows = settings, data, rows
        self._most_held, self._progress = held_out_rows, progress
        self._shared: _Shared | None = None

    def document(
        self, adapter: Path | None, round_trips: int, *, layers_only: bool = False
    ) -> dict[str, Any]:
        """Return all that was measured and what to do next, as plain values; names carry units.

        Parameters
        ----------
        adapter
            Whose layers are ranked; None is those of a short run.
        round_trips
            Of the plan to suggest, at most (count a token).
        layers_only
            Whether to leave the other plans out.

        Raises
        ------
        OfferError, AdapterError, DataError, TuningError, SessionError, CloudConnectionError
            Each says what was wrong.
        """
        plans, ranked = self._plans(adapter)
        worth, ranking, name = self._first(ranked, adapter, tune=adapter is None or not layers_only)
        worths = [worth] if worth is not None else []
        left_out = []
        for plan in () if layers_only else plans:
            if not (plan.adapted_layers or plan.lora):
                left_out.append(f"plan {plan.name} has no personal weights: there is nothing to tune in it")
            elif plan != ranked:
                worths.append(self._other(plan))
        stands_alone = ranked.owners == ranked.exchange_layers == ranked.adapted_layers
        if not stands_alone:
            left_out.append(
                f"layers of plan {ranked.name} share an M or take codes from another layer: what one is "
                "worth there says nothing about a plan of its own, so none is suggested"
            )
        assert self._shared is not None
        untuned, dtypes, tune = self._shared.untuned, self._shared.dtypes, self.settings.tune
        return {
            "cloud": self.settings.cloud,
            "data_rows": len(self.rows),
            "held_out_rows": len(untuned.targets),
            "held_out_tokens": int(untuned.targets.sum()),
            "steps": tune.steps,
            "batch_size": tune.batch_size,
            "seed": tune.seed,
            "untuned_nats_per_token": untuned.mean().nats,
            "layers_of": ranked.name,
            "layers_stand_alone": stands_alone,
            "weights": name,
            "layers_nats_per_token": ranking.whole.mean().nats,
            "layers": layer_rows(ranking),
            "plans": plan_rows(worths, dtypes),
            "left_out": left_out,
            "round_trips": round_trips,
            "recommended": advice(ranking, ranked, plans, round_trips, dtypes, self.data)
            if stands_alone
            else None,
        }

    def _plans(self, file: Path | None) -> tuple[list[Plan], Plan]:
        """Return the plans on offer, and the one whose layers are ranked."""
        waits = Timeouts(self.settings.connect_timeout_s, self.settings.step_timeout_s)
        connection = Connection(self.settings.cloud, waits, Credentials.of(self.settings))
        try:
            described = connection.describe()
            offer = CloudOffer.check(connection.target, described)
        finally:
            connection.close()
        plans = [plan for plan, _ in offer.plans.values()]
        named = offer.plan(self.settings.plan)[0] if self.settings.plan is not None else None
        if file is not None:
            ranked = offer.adapter_for(named, file).plan
        else:
            # Of equals, the one with most exchanges: there a layer's worth says most about that layer.
            ranked = named or max(plans, key=lambda p: (len(p.adapted_layers), len(p.exchange_layers)))
        if not ranked.adapted_layers:
            raise OfferError(f"plan {ranked.name!r} has no layer with an M, so there are none to rank")
        return plans, ranked

    def _first(self, plan: Plan, file: Path | None, *, tune: bool) -> tuple[PlanWorth | None, Ranking, str]:
        """Return what a short run under ``plan`` gains, and the ranking of its layers and whose they are."""
        with opened(self.settings.model_copy(update={"plan": plan.name}), file) as model:
            learner, dtype = self._learner(model)
            try:
                worth, weights = self._tuned(learner, plan, dtype) if tune else (None, Weights())
                name = f"after {self.settings.tune.steps} steps"
                if file is not None:
                    name = f"adapter {model.adapter.name}"
                    given = joined(model.adapter.matrices, model.adapter.factors)
                    weights = {key: tensor.to(dtype) for key, tensor in given.items()}
                assert self._shared is not None
                count = len(plan.owners)
                self._progress.note(f"ranking {count} layers of plan {plan.name}")
                self._progress.measuring("ranking layers", 1 + count)
                held, advance = self._shared.held, self._progress.advance
                return worth, rank_layers(learner, plan, held, weights, advance), name
            finally:
                learner.close()

    def _other(self, plan: Plan) -> PlanWorth:
        """Return what a short run under another plan gains."""
        # A fingerprint from outside is that of one plan. What the others share with it is pinned by now.
        settings = self.settings.model_copy(update={"plan": plan.name, "fingerprint": None})
        with opened(settings, None) as model:
            learner, dtype = self._learner(model)
            try:
                return self._tuned(learner, plan, dtype)[0]
            finally:
                learner.close()

    def _learner(self, model: PrivateLoraForCausalLM) -> tuple[Learner, torch.dtype]:
        """Return what gets losses under the model's plan, and what weights are tuned in."""
        assert model.offer is not None
        dtype = precision_for(model.offer)
        on_wire = wire_for(self.settings.wire_dtype, model.offer.compute_dtype)
        learner = learner_for(model, on_wire, self._progress.waiting)
        try:
            limits, config = learner.limits(), self.settings.tune
            settled = config.settled(model.adapter.plan, limits.max_batch_tokens, limits.max_sequence_tokens)
            assert settled.micro_batch_tokens is not None and settled.max_tokens is not None
            learner.micro_batch_tokens = settled.micro_batch_tokens
            if self._shared is None:
                train, held = self._examples(model, settled.max_tokens)
                start = start_weights(model.adapter.plan, config.seed, dtype)
                untuned = RowLosses.measure(learner, held, start)
                self._shared = _Shared(train, held, untuned, model.wire_dtypes)
        except BaseException:
            learner.close()
            raise
        return learner, dtype

    def _examples(
        self, model: PrivateLoraForCausalLM, max_tokens: int
    ) -> tuple[list[Example], list[Example]]:
        assert model.tokenizer is not None
        config = self.settings.tune
        self._progress.reading(len(self.rows))
        examples = make_examples(
            self.rows,
            model.tokenizer,
            max_tokens=max_tokens,
            loss_on=config.loss_on,
            truncate=config.truncate,
            source=str(self.data),
            advance=self._progress.advance,
        )
        return held_out(examples, config.validation, self._most_held, config.seed)

    def _tuned(self, learner: Learner, plan: Plan, dtype: torch.dtype) -> tuple[PlanWorth, Weights]:
        """Return what a short run gains, and the weights that it ends with."""
        assert self._shared is not None
        shared, progress = self._shared, self._progress
        progress.note(f"tuning under plan {plan.name}")
        weights, lr = tune_briefly(
            learner, plan, self.settings.tune, shared.train, dtype, progress, progress.training, shared.held
        )
        after = RowLosses.measure(learner, shared.held, weights)
        return PlanWorth(plan, after.mean(), shared.untuned.above(after), lr), weights
