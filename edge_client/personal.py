"""The personal weights M and the one product that an exchange asks of them: z = cM.

M never leaves this process. The products are tiny (three 64 x 64 matrices by default) and sit in the
middle of every round trip, so what counts is the fixed cost of a call, not arithmetic. One token goes
through numpy: behind a cold cache, as on a core shared with the cloud, torch's dispatch costs twice that.
"""

import numpy as np
import torch
from torch import Tensor

from edge_client.first_codes import FirstCodes
from shared.adapter import Adapter
from shared.plan import Plan
from shared.wire import Array


class PersonalWeights:
    """The personal weights of one adapter: M, ready for use in fp32 on the CPU, and LoRA factors.

    Parameters
    ----------
    adapter
        Holds ``layers.{l}.M`` as ``(groups, r_c2d, r_d2c)`` for every owner (`Plan.owners`). An adapter of
        zeros is exchanged like any other: the cloud cannot tell from the traffic's shape.
    first
        Makes the codes of the cloud's first layer here; None leaves them to the cloud.
    """

    def __init__(self, adapter: Adapter, first: FirstCodes | None = None) -> None:
        self.plan: Plan = adapter.plan
        self.first = first
        self._matrices = {
            layer: matrix.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous().numpy()
            for layer, matrix in adapter.matrices.items()
        }
        self.factors = adapter.factors
        missing = set(self.plan.owners) - self._matrices.keys()
        if missing:
            raise ValueError(f"the adapter has no M for layers {sorted(missing)} of plan {self.plan.name!r}")

    def upfront(self, hidden: Tensor) -> dict[int, Array]:
        """Return the residual codes that go up with the hidden states of a step.

        Parameters
        ----------
        hidden
            Input of the cloud's first layer, ``(tokens, hidden_size)``.

        Returns
        -------
        dict
            Owner to ``(tokens, groups * r_d2c)``, for each that the first exchange feeds.
        """
        if self.first is None:
            return {}
        codes = self.first.codes(hidden)
        return {layer: self.residual_codes(layer, codes) for layer in self.plan.fed_by(self.first.layer)}

    def residual_codes(self, layer: int, codes: Array) -> Array:
        """Return z = cM of owner ``layer``, group by group: for it and the layers that share its M.

        Parameters
        ----------
        layer
            One of the plan's owners.
        codes
            ``(tokens, groups * r_c2d)``.

        Returns
        -------
        Array
            ``(tokens, groups * r_d2c)``, contiguous.
        """
        matrix = self._matrices[layer]  # (groups, r_c2d, r_d2c)
        groups, width, _ = matrix.shape
        if codes.shape[0] == 1:
            # One token's codes are already (groups, 1, r_c2d) in memory; nothing is copied.
            z: Array = np.matmul(codes.reshape(groups, 1, width), matrix)  # (groups, 1, r_d2c)
            return z.reshape(1, -1)
        by_group = torch.from_numpy(codes).view(-1, groups, width).transpose(0, 1)  # (groups, tokens, r_c2d)
        product = torch.bmm(by_group, torch.from_numpy(matrix))  # (groups, tokens, r_d2c)
        found: Array = product.transpose(0, 1).reshape(codes.shape[0], -1).numpy()
        return found
