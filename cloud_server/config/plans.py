"""Settings of the plans on offer: by name for those that most want, in full for all others."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.plan import SHARING_LAYERS, Initialiser, Layout


class PlanConfig(BaseModel):
    """A plan that the cloud offers; A and B are made for it on first use."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(default="per-layer-r64", description="Name edges ask for it by")
    r_c2d: int = Field(default=64, ge=1, description="Width of one group of codes (elements)")
    r_d2c: int = Field(default=64, ge=1, description="Width of one group of residual codes (elements)")
    layout: Layout = Field(default="per_projection", description="One A-M-B per projection, or one fused")
    initialiser: Initialiser = Field(default="orthonormal", description="How A and B are made")
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Layers in the cloud that are adapted (indices); if absent all, or none where "
        "the edge keeps layers",
    )
    exchange_layers: tuple[int, ...] | None = Field(
        default=None,
        description="Layers where codes are sent, for themselves and those after them (indices); the adapted "
        "ones if absent",
    )
    share_residual_codes: int = Field(
        default=1,
        ge=1,
        description="Adapted layers in a row, of those that one exchange feeds, that share one M and the "
        "residual codes (count)",
    )
    one_trip: bool = Field(
        default=False,
        description="Fill in layers, exchange_layers, head_layers and tail_layers for one round trip a token",
    )
    edge_tail: bool = Field(
        default=True,
        description="Whether one_trip gives edges last layers too; if not, a prompt's hidden states need not "
        "come back",
    )
    head_layers: int = Field(default=0, ge=0, description="First decoder layers that edges run (count)")
    tail_layers: int = Field(default=0, ge=0, description="Last decoder layers that edges run (count)")
    lora_rank: int = Field(
        default=16, ge=0, description="Rank of the LoRA in the layers that edges run (elements); 0: none"
    )
    scale: float = Field(default=1.0, gt=0, description="Factor on the residual (no unit)")

    @model_validator(mode="after")
    def _one_trip_stands_alone(self) -> "PlanConfig":
        filled_in = ("layers", "exchange_layers", "head_layers", "tail_layers")
        twice = [name for name in filled_in if getattr(self, name) not in (None, 0)]
        if self.one_trip and twice:
            raise ValueError(f"one_trip fills in {', '.join(twice)}: leave them out, or one_trip")
        if not self.one_trip and not self.edge_tail:
            raise ValueError("edge_tail is about one_trip; without that say tail_layers")
        return self


NAMED_PLANS = {
    "per-layer": PlanConfig(),
    "one-trip": PlanConfig(name="one-trip-r64", one_trip=True),
    "one-trip-shared": PlanConfig(
        name="one-trip-shared-r64", one_trip=True, share_residual_codes=SHARING_LAYERS
    ),
    "one-trip-lean": PlanConfig(
        name="one-trip-lean-r64",
        one_trip=True,
        edge_tail=False,
        layout="fused",
        share_residual_codes=SHARING_LAYERS,
    ),
}


def plan_config(text: str) -> PlanConfig:
    """Return the plan that ``text`` names or describes as JSON.

    Raises
    ------
    ValueError
        If it does neither.
    """
    if text in NAMED_PLANS:
        return NAMED_PLANS[text]
    if not text.lstrip().startswith("{"):
        raise ValueError(f"no plan is called {text!r}; give {' or '.join(NAMED_PLANS)}, or a plan as JSON")
    return PlanConfig.model_validate_json(text)
