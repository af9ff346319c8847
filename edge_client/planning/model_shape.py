"""What the two sides of a plan hold and compute, from the model's sizes alone.

Counts multiplications and additions as two operations. Norms, rotations and activations are left out: they
are less than one in a hundred of a layer's operations.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from edge_client.hollow import hollow
from shared.families import geometry
from shared.lora import factor_shapes
from shared.plan import Plan, Projection

PERSONAL_BYTES = 4  # an element of M, of A of the first codes and of a LoRA: float32 on the edge


class ModelShape(BaseModel):
    """Sizes of a model, as far as time and memory depend on them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(ge=1, description="Decoder layers (count)")
    hidden_size: int = Field(ge=1, description="Width of hidden states (elements)")
    q_dim: int = Field(ge=1, description="Width of all query heads together (elements)")
    kv_dim: int = Field(ge=1, description="Width of all key heads together; values have the same (elements)")
    vocab_size: int = Field(ge=1, description="Rows of embedding and head (count)")
    tied_head: bool = Field(description="Whether the head is the embedding")
    products: tuple[Projection, ...] = Field(description="The products of a decoder layer")

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "ModelShape":
        """Read the sizes off one layer of the family's own code, which is never given memory."""
        sizes = geometry(config)
        with torch.device("meta"):
            layer = AutoModel.from_config(hollow(config)).layers[0]  # type: ignore[no-untyped-call]
        products = tuple(
            Projection(name=name, d_in=module.in_features, d_out=module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        )
        return cls(
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            q_dim=sizes.q_dim,
            kv_dim=sizes.kv_dim,
            vocab_size=sizes.vocab_size,
            tied_head=sizes.tied_head,
            products=products,
        )

    @property
    def layer_weights(self) -> int:
        """Elements of one decoder layer's products."""
        return sum(product.d_in * product.d_out for product in self.products)

    @property
    def head_weights(self) -> int:
        """Elements of the head, and of the embedding."""
        return self.vocab_size * self.hidden_size

    def layer_flops(self, context_tokens: int) -> int:
        """Return the operations of one layer for one token that sees ``context_tokens`` positions (FLOPs)."""
        return 2 * self.layer_weights + 4 * self.q_dim * context_tokens


class EdgeCost(BaseModel):
    """What a plan asks of the edge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resident_layers: int = Field(description="Decoder layers on the edge (count)")
    shell_bytes: int = Field(description="Embedding, final norm and head (bytes)")
    resident_bytes: int = Field(description="Decoder layers on the edge, without LoRA (bytes)")
    personal_bytes: int = Field(description="M, LoRA factors and A of the first codes (bytes)")
    kv_bytes: int = Field(description="Keys and values of the layers on the edge, one session (bytes)")
    flops_per_token: int = Field(
        description="Operations of one decoded token, rejected guesses included (FLOPs)"
    )
    backbone_share: float = Field(
        description="Of the backbone's operations, those on the edge; LoRA is no part of it (0 to 1)"
    )

    @property
    def memory_bytes(self) -> int:
        """All of it; Python and its libraries come on top (bytes)."""
        return self.shell_bytes + self.resident_bytes + self.personal_bytes + self.kv_bytes


def edge_cost(
    shape: ModelShape,
    plan: Plan,
    element_bytes: int,
    context_tokens: int,
    positions_per_token: float = 1.0,
) -> EdgeCost:
    """Return what ``plan`` asks of the edge.

    Parameters
    ----------
    shape
        The model's.
    plan
        The split.
    element_bytes
        Of what the edge computes in (bytes an element).
    context_tokens
        Positions that a session holds (count).
    positions_per_token
        That are run for a token that is kept, rejected guesses included (count).
    """
    resident = len(plan.resident_layers)
    lora = sum(rows * columns for rows, columns in factor_shapes(plan).values())
    m = len(plan.owners) * plan.groups * plan.r_c2d * plan.r_d2c
    first = plan.hidden_size * plan.codes_width if plan.first_codes_on_edge else 0
    layer = shape.layer_flops(context_tokens)
    norms = 2 * shape.hidden_size
    return EdgeCost(
        resident_layers=resident,
        shell_bytes=(shape.head_weights * (1 if shape.tied_head else 2) + shape.hidden_size) * element_bytes,
        resident_bytes=resident * (shape.layer_weights + norms) * element_bytes,
        personal_bytes=(m + lora + first) * PERSONAL_BYTES,
        kv_bytes=2 * resident * shape.kv_dim * context_tokens * element_bytes,
        flops_per_token=round(
            positions_per_token * (2 * (shape.head_weights + m + lora + first) + resident * layer)
        ),
        backbone_share=resident / shape.num_layers,
    )
