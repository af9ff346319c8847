"""Edge parts and LoRA factors in the dtype that this side computes in: finite as stored, finite there too."""

import torch
from torch import Tensor

from shared.adapter import AdapterError
from shared.edge_parts import EdgePartsError


def fitted(name: str, stored: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return a part's tensor in ``dtype`` on ``device``.

    Raises
    ------
    EdgePartsError
        If it holds NaN or infinity, or numbers that are infinite in ``dtype``: everything that is computed
        with them would be NaN.
    """
    found = stored.to(dtype)
    if not _is_finite(found):
        if _is_finite(stored):
            kind = str(dtype).removeprefix("torch.")
            raise EdgePartsError(
                f"{name} holds numbers that {kind} cannot; choose another, if these parts can be trusted"
            )
        raise EdgePartsError(f"{name} holds NaN or infinity; these edge parts are damaged or hostile")
    return found.to(device)


def check_factor(name: str, factor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a LoRA factor that cannot be computed with; its numbers are never shown.

    Raises
    ------
    AdapterError
        If it holds numbers that are infinite in ``dtype``.
    """
    if torch.finfo(dtype).max >= torch.finfo(factor.dtype).max:
        return  # nothing becomes infinite, and what was so before is for others to judge
    if not _is_finite(factor.detach().to(dtype)):
        kind = str(dtype).removeprefix("torch.")
        raise AdapterError(
            f"the adapter's {name} holds numbers that {kind} cannot; let this side compute in another "
            "(--dtype float32), or use another adapter"
        )


def _is_finite(tensor: Tensor) -> bool:
    # A sum is NaN or infinite if any element is. Of 32-bit elements float64 cannot overflow; if it does of
    # 64-bit ones, they are none that a model has.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float64)))
