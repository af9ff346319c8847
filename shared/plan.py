"""The plan: one frozen value that describes how a model is split.

A plan says which decoder layers exchange codes, which get a residual, on which projections, at what
ranks and in which layout. It is part of every fingerprint, so two sides with equal fingerprints
agree on all of it. Knows nothing about tensors, sessions or the wire's element type.
"""

import json
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Target = Literal["q", "k", "v"]
Layout = Literal["per_projection", "fused"]
Schedule = Literal["per_layer", "subset", "grouped", "resident"]
Initialiser = Literal["gaussian", "orthonormal", "svd"]

TARGET_ORDER: tuple[Target, ...] = ("q", "k", "v")
SHARING_LAYERS = 4  # in a row with one M, in the named plan of one trip that shares
EDGE_SHARE = 0.15  # of the layers, at most, that a plan of one round trip asks of the edge
MAX_PLAN_BYTES = 64 * 1024  # a plan is a few hundred bytes; more is not a plan

Layers = tuple[Annotated[int, Field(ge=0, lt=4096)], ...]
Rank = Annotated[int, Field(ge=1, le=8192)]


class PlanError(ValueError):
    """A plan that is malformed or contradicts itself."""


class Projection(BaseModel):
    """A product inside a resident layer that gets a LoRA: ``y += scale * (x down) up``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z_]{1,32}\.[a-z_]{1,32}$", description="Its place inside a decoder layer")
    d_in: int = Field(ge=1, le=1 << 22, description="Width of x (elements)")
    d_out: int = Field(ge=1, le=1 << 22, description="Width of y (elements)")


class Plan(BaseModel):
    """The frozen description of a split (arXiv 2311.14030, section 3).

    Shapes that follow from it, with ``G = groups`` and ``d_out`` summed over the targets:
    ``A (hidden_size, G * r_c2d)``, ``M (G, r_c2d, r_d2c)``, ``B (r_d2c, d_out)``. A resident layer gets,
    for each product in ``lora``, ``down (d_in, lora_rank)`` and ``up (lora_rank, d_out)`` (arXiv 2106.09685).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", str_max_length=256)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="Name a cloud offers it under")
    backbone: str = Field(min_length=1, description="Id of the model whose decoder layers are the backbone")
    num_layers: int = Field(ge=1, le=4096, description="Decoder layers of the whole model (count)")
    hidden_size: int = Field(ge=1, le=1 << 20, description="Width of hidden states (elements)")
    head_layers: int = Field(
        default=0, ge=0, description="First decoder layers that live on the edge (count)"
    )
    tail_layers: int = Field(default=0, ge=0, description="Last decoder layers that live on the edge (count)")
    exchange_layers: Layers = Field(description="Layers where codes are emitted (indices)")
    adapted_layers: Layers = Field(description="Layers that get a residual (indices)")
    owner_layers: Layers = Field(
        default=(),
        description="Adapted layers with an M of their own, whose residual codes serve those up to the next "
        "(indices); all of them if empty",
    )
    targets: tuple[Target, ...] = Field(default=TARGET_ORDER, min_length=1, description="Adapted projections")
    r_c2d: Rank = Field(description="Width of one group of codes, cloud to edge (elements)")
    r_d2c: Rank = Field(description="Width of one group of residual codes, edge to cloud (elements)")
    layout: Layout = Field(description="One A-M-B per projection (the paper's), or one for the stacked q|k|v")
    schedule: Schedule = Field(description="How exchanges are spread over the layers")
    initialiser: Initialiser = Field(description="How A and B were made")
    scale: float = Field(default=1.0, gt=0, le=1e3, description="Factor on the residual (1 in the paper)")
    lora: tuple[Projection, ...] = Field(
        default=(), max_length=16, description="Products of every resident layer that get a LoRA"
    )
    lora_rank: int = Field(default=0, ge=0, le=8192, description="Rank of these LoRAs (elements)")
    lora_scale: float = Field(default=2.0, gt=0, le=1e3, description="Factor on them (alpha / rank)")

    @model_validator(mode="after")
    def _is_consistent(self) -> "Plan":
        cloud = range(self.head_layers, self.num_layers - self.tail_layers)
        if not cloud:
            raise ValueError("head_layers + tail_layers leave no layer to the cloud")
        for field in ("exchange_layers", "adapted_layers"):
            layers = getattr(self, field)
            if list(layers) != sorted(set(layers)):
                raise ValueError(f"{field} must be strictly increasing, got {layers}")
            if layers and (layers[0] not in cloud or layers[-1] not in cloud):
                raise ValueError(f"{field} must lie in the cloud's layers {cloud.start}..{cloud.stop - 1}")
        if self.targets != tuple(t for t in TARGET_ORDER if t in self.targets):
            raise ValueError(f"targets must be unique and in the order q, k, v, got {self.targets}")
        if self.adapted_layers and not self.exchange_layers:
            raise ValueError("adapted layers need at least one exchange layer to take codes from")
        if self.exchange_layers and (
            not self.adapted_layers or self.adapted_layers[0] < self.exchange_layers[0]
        ):
            raise ValueError("the first adapted layer must not come before the first exchange layer")
        unused = set(self.exchange_layers) - {self.source_of(layer) for layer in self.adapted_layers}
        if unused:
            raise ValueError(f"exchange layers {sorted(unused)} feed no adapted layer")
        if self.owner_layers:
            self._check_owners()
        if len({projection.name for projection in self.lora}) != len(self.lora):
            raise ValueError("lora names a product twice")
        if bool(self.lora) != bool(self.lora_rank) or (self.lora and not self.resident_layers):
            raise ValueError("lora needs a lora_rank, and layers on the edge (head_layers, tail_layers)")
        if not self.lora and self.lora_scale != type(self).model_fields["lora_scale"].default:
            raise ValueError("lora_scale without lora scales nothing, and is no part of the digest")
        if self.schedule == "resident" and not self.resident_layers:
            raise ValueError("schedule resident keeps layers on the edge (head_layers, tail_layers)")
        if self.schedule == "per_layer" and not (self.exchange_layers == self.adapted_layers == tuple(cloud)):
            raise ValueError("schedule per_layer exchanges and adapts every layer of the cloud")
        if self.schedule == "subset" and self.exchange_layers != self.adapted_layers:
            raise ValueError("schedule subset adapts exactly the exchanging layers")
        return self

    def _check_owners(self) -> None:
        owners = self.owner_layers
        if list(owners) != sorted(set(owners)):
            raise ValueError(f"owner_layers must be strictly increasing, got {owners}")
        if not set(owners) < set(self.adapted_layers):  # one way to say that nothing is shared: one digest
            raise ValueError(f"owner_layers must be some of adapted_layers, left out for all, got {owners}")
        adapted = self.adapted_layers
        first_fed = {adapted[bisect_left(adapted, e)] for e in self.exchange_layers}
        if not first_fed <= set(owners):
            raise ValueError(
                f"layers {sorted(first_fed - set(owners))} would share an M across exchanges; the first that "
                "each exchange feeds must be one of owner_layers"
            )

    @property
    def groups(self) -> int:
        """Independent A-M-B products per layer."""
        return len(self.targets) if self.layout == "per_projection" else 1

    @property
    def codes_width(self) -> int:
        """Elements of one position's codes at one exchange."""
        return self.groups * self.r_c2d

    @property
    def residual_width(self) -> int:
        """Elements of one position's residual codes for one owner."""
        return self.groups * self.r_d2c

    @property
    def owners(self) -> tuple[int, ...]:
        """The adapted layers with an M of their own, for which residual codes are sent: all, or some."""
        return self.owner_layers or self.adapted_layers

    @property
    def cloud_layers(self) -> range:
        """The decoder layers that the cloud runs."""
        return range(self.head_layers, self.num_layers - self.tail_layers)

    @property
    def resident_layers(self) -> tuple[int, ...]:
        """The decoder layers that the edge runs, head before tail."""
        first_of_tail = self.num_layers - self.tail_layers
        return (*range(self.head_layers), *range(first_of_tail, self.num_layers))

    @property
    def first_codes_on_edge(self) -> bool:
        """Whether the first exchange needs no round trip: the edge knows that layer's input."""
        return self.exchange_layers[:1] == (self.cloud_layers.start,)

    @property
    def round_trips(self) -> int:
        """Round trips of one step, where the edge makes the first codes if it can."""
        return 1 + len(self.exchange_layers) - self.first_codes_on_edge

    @property
    def returns_gradient(self) -> bool:
        """Whether tuning needs dL/dx at the cloud's first layer: layers below it learn, on the edge."""
        return bool(self.lora and self.head_layers)

    @property
    def learns_at_the_end_only(self) -> bool:
        """Whether all that learns lies behind the cloud's layers: then no gradient goes to the cloud."""
        return not (self.adapted_layers or self.returns_gradient)

    @property
    def lowest_gradient(self) -> int:
        """The lowest layer of the cloud that tuning goes back through; one past its last if through none."""
        if self.returns_gradient:
            return self.cloud_layers.start
        return self.adapted_layers[0] if self.adapted_layers else self.cloud_layers.stop

    def source_of(self, layer: int) -> int:
        """Return the exchange layer whose codes feed adapted layer ``layer``."""
        return self.exchange_layers[bisect_right(self.exchange_layers, layer) - 1]

    def fed_by(self, exchange: int) -> tuple[int, ...]:
        """Return the owners whose M the codes of layer ``exchange`` are multiplied with."""
        return self._feeds.get(exchange, ())

    def owner_of(self, layer: int) -> int | None:
        """Return whose residual codes ``layer`` adds: its own or an owner's before it; None if nobody's."""
        return self._owner_of.get(layer)

    def served_by(self, owner: int) -> tuple[int, ...]:
        """Return the adapted layers that add the residual codes of ``owner``, itself first."""
        return self._serves.get(owner, ())

    # These are asked for several times an exchange, so made once.

    @cached_property
    def _feeds(self) -> dict[int, tuple[int, ...]]:
        feeds: dict[int, tuple[int, ...]] = {}
        for owner in self.owners:
            source = self.source_of(owner)
            feeds[source] = (*feeds.get(source, ()), owner)
        return feeds

    @cached_property
    def _owner_of(self) -> dict[int, int]:
        owners = self.owners
        return {layer: owners[bisect_right(owners, layer) - 1] for layer in self.adapted_layers}

    @cached_property
    def _serves(self) -> dict[int, tuple[int, ...]]:
        serves: dict[int, tuple[int, ...]] = {}
        for layer, owner in self._owner_of.items():
            serves[owner] = (*serves.get(owner, ()), layer)
        return serves

    @classmethod
    def one_trip(
        cls,
        lora: tuple[Projection, ...],
        *,
        num_layers: int,
        lora_rank: int = 16,
        tail: bool = True,
        **facts: Any,
    ) -> "Plan":
        """Make the plan of one round trip a token: the edge runs at most 15 % of the layers.

        Every layer in between gets its residual from the codes of the first one, which the edge makes itself;
        the layers on the edge get a LoRA.

        Parameters
        ----------
        lora
            The products of a layer.
        num_layers
            Of the whole model (count).
        lora_rank
            Rank of the LoRAs (elements).
        tail
            Whether half of the edge's layers are the last ones. These need the hidden states of all
            positions; without them a prompt's stay in the cloud, but for the last.
        facts
            As `subset` takes them.
        """
        resident = max(1, int(EDGE_SHARE * num_layers))
        last = resident // 2 if tail else 0
        head = resident - last
        cloud = tuple(range(head, num_layers - last))
        return cls.subset(
            cloud,
            exchange_layers=cloud[:1],
            num_layers=num_layers,
            head_layers=head,
            tail_layers=last,
            lora=lora,
            lora_rank=lora_rank,
            **facts,
        )

    def canonical_json(self) -> str:
        """Return the one JSON text that is hashed and sent: sorted keys, no spaces.

        A plan without LoRA says nothing of it, nor does one whose layers share no M: it has the digest
        that it had before there were any.
        """
        without = set() if self.lora else {"lora", "lora_rank", "lora_scale"}
        if not self.owner_layers:
            without.add("owner_layers")
        facts = self.model_dump(mode="json", exclude=without)
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan from JSON.

        Raises
        ------
        PlanError
            If the text is not a plan, or its plan contradicts itself.
        """
        if len(text) > MAX_PLAN_BYTES:
            raise PlanError(f"a plan has at most {MAX_PLAN_BYTES} bytes of JSON, got {len(text)}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "plan"
            raise PlanError(f"not a plan: {where}: {first['msg']}") from None

    @classmethod
    def subset(
        cls,
        layers: tuple[int, ...] | None = None,
        *,
        name: str,
        backbone: str,
        num_layers: int,
        hidden_size: int,
        rank: int = 64,
        r_c2d: int | None = None,
        r_d2c: int | None = None,
        layout: Layout = "per_projection",
        initialiser: Initialiser = "orthonormal",
        targets: tuple[Target, ...] = TARGET_ORDER,
        scale: float = 1.0,
        exchange_layers: tuple[int, ...] | None = None,
        share_residual_codes: int = 1,
        head_layers: int = 0,
        tail_layers: int = 0,
        lora: tuple[Projection, ...] = (),
        lora_rank: int = 0,
    ) -> "Plan":
        """Make a plan that adapts ``layers``; None is every layer of the cloud.

        ``exchange_layers`` None is the adapted ones. The schedule follows from which is which. Of the adapted
        layers that an exchange feeds, as many in a row as ``share_residual_codes`` says share one M.
        """
        cloud = tuple(range(head_layers, num_layers - tail_layers))
        adapted = cloud if layers is None else layers
        exchanging = adapted if exchange_layers is None else exchange_layers
        owners = _owners(exchanging, adapted, share_residual_codes)
        schedule: Schedule = "grouped"
        if head_layers or tail_layers:
            schedule = "resident"
        elif exchanging == adapted:
            schedule = "per_layer" if adapted == cloud else "subset"
        return cls(
            name=name,
            backbone=backbone,
            num_layers=num_layers,
            hidden_size=hidden_size,
            head_layers=head_layers,
            tail_layers=tail_layers,
            exchange_layers=exchanging,
            adapted_layers=adapted,
            owner_layers=() if owners == adapted else owners,
            targets=targets,
            r_c2d=r_c2d or rank,
            r_d2c=r_d2c or rank,
            layout=layout,
            schedule=schedule,
            initialiser=initialiser,
            scale=scale,
            lora=lora,
            lora_rank=lora_rank,
        )


def _owners(exchanging: tuple[int, ...], adapted: tuple[int, ...], share: int) -> tuple[int, ...]:
    """Return every ``share``-th of the adapted layers, counted anew from each exchange on."""
    if share == 1:
        return adapted
    found: list[int] = []
    for exchange, following in zip(exchanging, (*exchanging, 1 << 31)[1:], strict=True):
        found += [layer for layer in adapted if exchange <= layer < following][::share]
    return tuple(found)
