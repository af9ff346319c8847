"""Which of the offered plans to use: the fastest one that this side can hold, and why.

Plans within a twentieth of the fastest count as equally fast; of these the one whose quality was measured
goes first, then the one that asks for less memory. Quality that was not measured is said to be so, never
guessed.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, Field

from edge_client.planning.network import called
from edge_client.planning.predict import Prediction
from edge_client.planning.quality import Quality
from edge_client.planning.speeds import FROZEN
from shared.plan import EDGE_SHARE

EQUAL = 0.05  # of the fastest: less of a difference is below what predictions are worth
WORTH = 1.2  # times as fast: what makes a plan that is not offered worth asking for


class Recommendation(BaseModel):
    """A plan by name, None if this side can hold none, and sentences that say why."""

    model_config = FROZEN

    plan: str | None
    reasons: tuple[str, ...] = Field(description="One sentence each")


def recommend(
    predictions: Sequence[Prediction],
    quality: Mapping[str, Sequence[Quality]],
    memory_bytes: int | None = None,
) -> Recommendation:
    """Return the plan to use.

    Parameters
    ----------
    predictions
        Of every plan, offered or not.
    quality
        What was measured, by plan.
    memory_bytes
        That this side has for a plan; None: enough.
    """
    too_large = [p for p in predictions if not _fits(p, memory_bytes)]
    fitting = [p for p in predictions if p not in too_large]
    offered = [p for p in fitting if p.offered]
    left_out = [f"{p.plan} asks too much of this side ({_asks(p)})." for p in too_large if p.offered]
    if not offered:
        return Recommendation(plan=None, reasons=tuple(left_out))
    fastest = max(p.decode_tok_s for p in offered)
    best = min(
        (p for p in offered if p.decode_tok_s >= (1 - EQUAL) * fastest),
        key=lambda p: (not quality.get(p.plan), p.edge.memory_bytes, -p.decode_tok_s),
    )
    reasons = [_speed(best, offered)]
    faster = [p.plan for p in offered if p.decode_tok_s > best.decode_tok_s]
    if faster:
        measured = quality.get(best.plan) and not quality.get(faster[0])
        why = "its quality was measured" if measured else "it asks for less memory here"
        reasons.append(f"Within {EQUAL:.0%} plans count as equally fast; this one was taken because {why}.")
    waits = best.step.latency_s / best.step.total_s
    reasons.append(
        f"A token waits for {best.round_trips_per_token:.2g} round trips; they are {waits:.0%} of its time."
    )
    found = quality.get(best.plan, ())
    reasons.append(
        f"Quality: {'; '.join(one.line() for one in found)}."
        if found
        else "Quality after tuning under this plan: not measured."
    )
    others = [p for p in fitting if not p.offered and p.decode_tok_s >= WORTH * best.decode_tok_s]
    if others:
        other = max(others, key=lambda p: p.decode_tok_s)
        reasons.append(
            f"A cloud that offered {other.plan} would give {other.decode_tok_s:.3g} tok/s; this one does not."
        )
    return Recommendation(plan=best.plan, reasons=(*reasons, *left_out))


def _fits(prediction: Prediction, memory_bytes: int | None) -> bool:
    small = memory_bytes is None or prediction.edge.memory_bytes <= memory_bytes
    edge = prediction.edge
    # One layer is allowed whatever it is of a small model, as `Plan.one_trip` has it.
    return small and (edge.resident_layers <= 1 or edge.backbone_share <= EDGE_SHARE)


def _asks(prediction: Prediction) -> str:
    edge = prediction.edge
    return f"{edge.memory_bytes / 2**20:.0f} MiB, {edge.backbone_share:.0%} of the backbone's operations"


def _speed(best: Prediction, offered: Sequence[Prediction]) -> str:
    said = f"{best.plan} is predicted to decode at {best.decode_tok_s:.3g} tok/s over {called(best.link)}"
    others = [p for p in offered if p.plan != best.plan]
    if not others:
        return f"{said}; it is the only plan there is to choose."
    slower = max(others, key=lambda p: p.decode_tok_s)
    ways = f"{slower.round_trips_per_token:.2g} round trips a token"
    return f"{said}, {slower.plan} at {slower.decode_tok_s:.3g} ({ways})."
