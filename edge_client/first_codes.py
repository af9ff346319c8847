"""Codes of the cloud's first layer, made on this side: its input is what this side sends.

A norm and A are public and small, so the first exchange of a step needs no round trip: its residual codes
travel with the hidden states. Where all adapted layers take their codes from there, nothing is exchanged at
all. Knows nothing about sessions or M.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from edge_client.hollow import hollow
from edge_client.part_tensors import read_exact
from edge_client.precision import fitted
from shared.edge_parts import CODES_A, CODES_NORM, codes_file
from shared.plan import Plan
from shared.wire import Array


class FirstCodes:
    """Makes codes xA of the cloud's first layer, in fp32 on the CPU.

    Parameters
    ----------
    config
        The model's.
    plan
        One with `Plan.first_codes_on_edge`.
    tensors
        ``norm.weight (hidden_size,)`` and ``A (hidden_size, groups * r_c2d)``.
    """

    def __init__(self, config: PreTrainedConfig, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        self.layer = plan.exchange_layers[0]
        with torch.device("meta"):
            skeleton: Any = AutoModel.from_config(hollow(config))  # type: ignore[no-untyped-call]
        self._norm: nn.Module = skeleton.layers[0].input_layernorm
        weight = nn.Parameter(fitted(CODES_NORM, tensors[CODES_NORM], torch.float32), requires_grad=False)
        self._norm.register_parameter("weight", weight)
        self._a = fitted(CODES_A, tensors[CODES_A], torch.float32)

    @classmethod
    def read(cls, config: PreTrainedConfig, plan: Plan, folder: Path) -> "FirstCodes":
        """Read norm and A from a verified part.

        Raises
        ------
        EdgePartsError
            If the part does not hold them.
        """
        shapes = {CODES_NORM: (plan.hidden_size,), CODES_A: (plan.hidden_size, plan.codes_width)}
        return cls(config, plan, read_exact(folder / codes_file(plan), shapes))

    def codes(self, hidden: Tensor) -> Array:
        """Return codes ``(tokens, groups * r_c2d)`` for hidden states ``(tokens, hidden_size)``."""
        with torch.no_grad():
            normed = cast(Tensor, self._norm(hidden.float()))
            return cast(Array, (normed @ self._a).numpy())
