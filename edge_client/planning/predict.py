"""What a plan will take: one formula for a step, used for decoding and for each chunk of a prompt.

    step = round trips x RTT  +  message  +  (round trips - 1) x exchange(n)  +  bits / rate
           + layers in the cloud x layer(n)
           + layers on the edge x layer(n)  +  first codes(n)  +  head(n)  +  loop

with n positions; ``exchange`` is what an exchange costs beyond the link's own time, ``message`` what the one
trip that every step has does. Tokens a second are the tokens that a step yields over the time of the step.
Left out: a cloud computes an exchange's base products while the codes travel (a sixth of a layer, in the
packaged model), attention grows with the context, other sessions share the cloud.
"""

from pydantic import BaseModel, Field

from edge_client.chunking import prefill_chunk_tokens
from edge_client.planning.model_shape import EdgeCost, ModelShape, edge_cost
from edge_client.planning.network import LinkFacts
from edge_client.planning.speeds import FROZEN, CloudSpeed, Drafting, EdgeSpeed, Power
from edge_client.session import MAX_TENSOR_BYTES
from edge_client.wire_cost import widest_row, wire_cost
from shared.pb.privatelora.v1.private_lora_pb2 import DTYPE_FLOAT32
from shared.plan import Plan
from shared.wire_dtypes import WireDtypes


class Setting(BaseModel):
    """Everything that a prediction depends on but the plan."""

    model_config = FROZEN

    shape: ModelShape
    edge: EdgeSpeed
    cloud: CloudSpeed
    link: LinkFacts
    wire: WireDtypes = Field(
        default=WireDtypes.all(DTYPE_FLOAT32), description="What each kind of tensor travels in"
    )
    edge_bytes: int = Field(default=4, ge=1, description="Of a number that the edge computes with (bytes)")
    prompt_tokens: int = Field(default=512, ge=1, description="Prompt that the first token waits for (count)")
    context_tokens: int = Field(default=1024, ge=1, description="Positions that a session holds (count)")
    drafting: Drafting = Drafting()
    power: Power = Power()


class StepTime(BaseModel):
    """Where the time of one step goes."""

    model_config = FROZEN

    round_trips: int = Field(description="Times that one side waits for the other (count)")
    latency_s: float = Field(description="Round-trip times of the link (seconds)")
    transfer_s: float = Field(description="Bits over rates (seconds)")
    exchange_s: float = Field(description="Messages and exchanges, beyond the link (seconds)")
    cloud_s: float = Field(description="Decoder layers in the cloud (seconds)")
    edge_s: float = Field(description="Decoder layers on the edge, codes, head and loop (seconds)")

    @property
    def total_s(self) -> float:
        """All of it (seconds)."""
        return self.latency_s + self.transfer_s + self.exchange_s + self.cloud_s + self.edge_s


class Prediction(BaseModel):
    """What one plan will do. Per-token figures are those of decoding, rejected guesses included."""

    model_config = FROZEN

    plan: str = Field(description="Name")
    schedule: str = Field(description="How its exchanges are spread")
    offered: bool = Field(description="Whether the cloud offers it")
    link: str = Field(description="Over which link")
    prefill_tok_s: float = Field(description="Prompt tokens over the time to the first token (tokens/s)")
    time_to_first_token_s: float = Field(description="For the whole prompt (seconds)")
    decode_tok_s: float = Field(description="One session (tokens/s)")
    tokens_per_step: float = Field(description="As was assumed (count)")
    step: StepTime
    round_trips_per_token: float = Field(description="Of decoding (count)")
    bytes_up_per_token: float = Field(description="Edge to cloud, messages and their frames (bytes)")
    bytes_down_per_token: float = Field(description="Cloud to edge, messages and their frames (bytes)")
    edge: EdgeCost
    energy_per_token_j: float = Field(description="Of the edge, from stated powers (joules)")


class UnknownSpeedError(ValueError):
    """A plan asks for something whose speed was not measured."""


def step_bytes(plan: Plan, dtypes: WireDtypes, positions: int, keep: int) -> tuple[int, int]:
    """Return bytes up and down of a step; with one position that it keeps, those of `wire_cost`.

    Parameters
    ----------
    plan
        The split.
    dtypes
        What each kind of tensor travels in.
    positions, keep
        Of the step; hL comes back for the last ``keep``.
    """
    one, hidden = wire_cost(plan, dtypes), dtypes.hidden_bytes(plan)
    codes = (len(plan.exchange_layers) - plan.first_codes_on_edge) * dtypes.codes_bytes(plan)
    residual = len(plan.owners) * dtypes.residual_bytes(plan)
    more = positions - 1
    return one.up + more * (hidden + residual), one.down + more * codes + (keep - 1) * hidden


def step_time(plan: Plan, setting: Setting, positions: int, keep: int) -> StepTime:
    """Return where the time of a step of decoding goes."""
    cloud, edge, link = setting.cloud, setting.edge, setting.link
    return StepTime(
        round_trips=plan.round_trips,
        latency_s=plan.round_trips * link.rtt_s,
        transfer_s=link.transfer_s(*step_bytes(plan, setting.wire, positions, keep)),
        exchange_s=cloud.message_s + (plan.round_trips - 1) * cloud.exchange.at(positions),
        cloud_s=len(plan.cloud_layers) * cloud.layer.at(positions),
        edge_s=edge.loop_s
        + edge.head.at(keep)
        + _codes_s(plan, edge, positions)
        + _resident_s(plan, edge, positions),
    )


def first_token_s(plan: Plan, setting: Setting) -> float:
    """Return the time to the first token of a prompt.

    Layers on the edge take the whole prompt at once. Chunks follow each other through the cloud: after the
    first one, each takes what the slowest of the stages takes: the cloud's layers, either direction of the
    link, or a chunk's whole way over the number that may be under way.
    """
    edge, link, tokens = setting.edge, setting.link, setting.prompt_tokens
    ends = _resident_s(plan, edge, tokens) + edge.head.at(1) + edge.loop_s
    size = chunk_tokens(plan, setting)
    whole, rest = divmod(tokens, size)
    chunks = [size] * whole + ([rest] if rest else [])
    total = 0.0
    for index, positions in enumerate(chunks):
        keep = positions if plan.tail_layers else int(index == len(chunks) - 1)
        step = step_time(plan, setting, positions, keep)
        alone = step.total_s - step.edge_s + _codes_s(plan, edge, positions)
        up, down = step_bytes(plan, setting.wire, positions, keep)
        stages = (step.cloud_s, link.transfer_s(up, 0), link.transfer_s(0, down))
        total += max(*stages, alone / setting.cloud.max_steps_in_flight) if index else alone
    return total + ends


def chunk_tokens(plan: Plan, setting: Setting) -> int:
    """Return how many positions of a prompt travel in one step, as `edge_client.session` cuts it."""
    fits = MAX_TENSOR_BYTES // widest_row(plan, setting.wire, upfront=plan.first_codes_on_edge)
    return max(1, min(prefill_chunk_tokens(plan), setting.cloud.max_step_tokens, fits))


def predict(plan: Plan, setting: Setting, *, offered: bool = True) -> Prediction:
    """Return what ``plan`` will do.

    Raises
    ------
    UnknownSpeedError
        If it keeps layers on the edge, and how fast they run there was not measured.
    """
    drafting, power = setting.drafting, setting.power
    step = step_time(plan, setting, drafting.positions, drafting.positions)
    first = first_token_s(plan, setting)
    up, down = step_bytes(plan, setting.wire, drafting.positions, drafting.positions)
    each = 1 / drafting.tokens_per_step
    waiting = step.total_s - step.edge_s
    return Prediction(
        plan=plan.name,
        schedule=plan.schedule,
        offered=offered,
        link=setting.link.name,
        prefill_tok_s=setting.prompt_tokens / first,
        time_to_first_token_s=first,
        decode_tok_s=drafting.tokens_per_step / step.total_s,
        tokens_per_step=drafting.tokens_per_step,
        step=step,
        round_trips_per_token=plan.round_trips * each,
        bytes_up_per_token=up * each,
        bytes_down_per_token=down * each,
        edge=edge_cost(
            setting.shape, plan, setting.edge_bytes, setting.context_tokens, drafting.positions * each
        ),
        energy_per_token_j=(step.edge_s * power.busy_w + waiting * power.idle_w) * each,
    )


def _codes_s(plan: Plan, edge: EdgeSpeed, positions: int) -> float:
    """Return the time of the residual codes that go up with the hidden states (seconds)."""
    if not plan.first_codes_on_edge:
        return 0.0
    return len(plan.fed_by(plan.exchange_layers[0])) * edge.codes.at(positions)


def _resident_s(plan: Plan, edge: EdgeSpeed, positions: int) -> float:
    if not plan.resident_layers:
        return 0.0
    if edge.layer is None:
        raise UnknownSpeedError(f"plan {plan.name!r} keeps layers here, whose speed was not measured")
    return len(plan.resident_layers) * edge.layer.at(positions)
