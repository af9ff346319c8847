"""A and B: the frozen low-rank matrices around M, made once and kept as a file.

         x (tokens, hidden)                 with G = plan.groups
    A  layers.{l}.A  (hidden, G * r_c2d)    columns [A_q|A_k|A_v]    codes           c = xA
    M  in the adapter (G, r_c2d, r_d2c)     never in the cloud       residual codes  z_g = c_g M_g
    B  layers.{l}.B  (r_d2c, d_q+d_k+d_v)   columns [B_q|B_k|B_v]    residual        z_p B_p

With layout ``fused`` there is one group, and A and B belong to the stacked [W_q|W_k|W_v]. A belongs
to an exchange layer and B to an adapted one; where a plan groups layers these differ.

Initialisers, for W (hidden, d_out) in y = xW:

gaussian    A, B ~ N(0, 0.02^2), the paper's (arXiv 2311.14030, authors' code).
orthonormal A has orthonormal columns, B orthonormal rows; nothing of W.
svd         W ~ U S V^T; A = U_r and B = S_r V_r^T, as LoRA-XS (arXiv 2405.17604) has it, where the
            singular values go to the decoder. So codes are x in an orthonormal basis, and their
            size is that of x whatever the layer, which suits a 16-bit wire.

All is computed in float64 on the CPU, with fixed signs, and saved in float32. The bits of a QR or
SVD still depend on the number of threads, so a file, once made, is never made again.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from shared.cache import cache_folder, locked, progress_bar, replacing, slug
from shared.checkpoint import Checkpoint
from shared.families import Geometry
from shared.fingerprint import layers_digest, plan_digest
from shared.plan import TARGET_ORDER, Plan, Target
from shared.tensor_file import TensorFileError, check_tensors, read_float32, read_header

GAUSSIAN_STD = 0.02
SEED = "privatelora A/B v1"
MAX_HEADER_BYTES = 4 * 1024 * 1024

WeightOf = Callable[[int, Target], Tensor]  # (layer, target) -> W (hidden, d_out), float64


class LowRankError(ValueError):
    """A/B that cannot be made, or a file of them that is not what it should be."""


@dataclass
class LowRank:
    """A by exchange layer, (hidden, G * r_c2d), and B by adapted layer, (r_d2c, sum of d_out); float32."""

    a: dict[int, Tensor]
    b: dict[int, Tensor]

    def save(self, path: Path) -> None:
        """Write a safetensors file at ``path``, atomically."""
        tensors = {f"layers.{layer}.A": a.contiguous() for layer, a in self.a.items()}
        tensors |= {f"layers.{layer}.B": b.contiguous() for layer, b in self.b.items()}
        with replacing(path) as file:
            file.write(save(tensors))

    @classmethod
    def load(cls, path: Path, plan: Plan, geometry: Geometry) -> "LowRank":
        """Read the file at ``path``.

        Raises
        ------
        LowRankError
            If it is not exactly the A and B of ``plan``: names, shapes, dtype, finite values.
        """
        expected = {
            f"layers.{layer}.A": (plan.hidden_size, plan.codes_width) for layer in plan.exchange_layers
        }
        width = sum(geometry.out_dim(target) for target in plan.targets)
        expected |= {f"layers.{layer}.B": (plan.r_d2c, width) for layer in plan.adapted_layers}
        try:
            found = read_header(path, max_header_bytes=MAX_HEADER_BYTES).tensors
            check_tensors(path, found, expected, f"the A/B file of plan {plan.name!r}")
        except TensorFileError as error:
            raise LowRankError(str(error)) from None
        tensors = {name: read_float32(info) for name, info in found.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise LowRankError(f"{path}: {name} holds NaN or Inf")
        return cls(
            {layer: tensors[f"layers.{layer}.A"] for layer in plan.exchange_layers},
            {layer: tensors[f"layers.{layer}.B"] for layer in plan.adapted_layers},
        )


def ensure(
    plan: Plan, checkpoint: Checkpoint, cache_dir: Path | None = None, *, progress: bool = False
) -> tuple[LowRank, Path]:
    """Return A and B of ``plan`` and their file, making the file on first use and never again.

    The file is found by the plan's and the backbone's digests.

    Raises
    ------
    LowRankError
        If the ranks are impossible for this model, or the file is damaged.
    """
    identity = plan_digest(plan) + layers_digest(plan, checkpoint, cache_dir) + checkpoint.id.encode()
    name = f"{slug(plan.name)}-{hashlib.sha256(identity).hexdigest()[:32]}.safetensors"
    path = cache_folder(cache_dir) / "lowrank" / name
    if not path.is_file():
        with locked(path):
            if not path.is_file():
                make(plan, checkpoint.geometry, checkpoint, progress=progress).save(path)
    return LowRank.load(path, plan, checkpoint.geometry), path


def make(
    plan: Plan,
    geometry: Geometry,
    weights: Checkpoint | WeightOf | None = None,
    *,
    progress: bool = False,
) -> LowRank:
    """Compute A and B.

    Parameters
    ----------
    plan, geometry
        The split, and the sizes of the model.
    weights
        Where W comes from, for initialiser ``svd`` only: a checkpoint, or a function from
        (layer, target) to W (hidden, d_out).
    progress
        Whether to show a bar on stderr.

    Raises
    ------
    LowRankError
        If plan and model do not fit, or a rank exceeds what the initialiser can give.
    """
    _check(plan, geometry)
    weight_of = reader_of(weights, geometry) if isinstance(weights, Checkpoint) else weights
    # One block per group: the targets whose W are stacked along the output.
    blocks = [(target,) for target in plan.targets] if plan.layout == "per_projection" else [plan.targets]

    @lru_cache(maxsize=len(blocks))  # a layer that gets both A and B is decomposed once
    def factors(layer: int, block: tuple[Target, ...]) -> tuple[Tensor, Tensor]:
        if weight_of is None:
            raise LowRankError("initialiser svd needs the model's weights")
        w = torch.cat([weight_of(layer, target).double() for target in block], dim=1)  # (hidden, d_out)
        return svd(w, max(plan.r_c2d, plan.r_d2c))

    def encoder(layer: int, block: tuple[Target, ...]) -> Tensor:
        shape = (plan.hidden_size, plan.r_c2d)
        if plan.initialiser == "gaussian":
            return gaussian(shape, f"A {layer} {''.join(block)}")
        if plan.initialiser == "orthonormal":
            return orthonormal(shape, f"A {layer} {''.join(block)}")
        return factors(layer, block)[0][:, : plan.r_c2d]

    def decoder(layer: int, block: tuple[Target, ...]) -> Tensor:
        shape = (plan.r_d2c, sum(geometry.out_dim(target) for target in block))
        if plan.initialiser == "gaussian":
            return gaussian(shape, f"B {layer} {''.join(block)}")
        if plan.initialiser == "orthonormal":
            return orthonormal((shape[1], shape[0]), f"B {layer} {''.join(block)}").T
        return factors(layer, block)[1][: plan.r_d2c]

    work = [(layer, "A") for layer in plan.exchange_layers] + [(layer, "B") for layer in plan.adapted_layers]
    made: dict[str, dict[int, Tensor]] = {"A": {}, "B": {}}
    with progress_bar(f"Making A and B ({plan.initialiser}, once)", len(work), progress) as advance:
        for layer, side in sorted(work):
            matrices = [(encoder if side == "A" else decoder)(layer, block) for block in blocks]
            made[side][layer] = torch.cat(matrices, dim=1).float().contiguous()
            advance(1)
    return LowRank(made["A"], made["B"])


def _check(plan: Plan, geometry: Geometry) -> None:
    if (plan.num_layers, plan.hidden_size) != (geometry.num_layers, geometry.hidden_size):
        raise LowRankError(
            f"plan {plan.name!r} is for {plan.num_layers} layers of width {plan.hidden_size}, "
            f"the model has {geometry.num_layers} of {geometry.hidden_size}"
        )
    if plan.initialiser == "gaussian" or not plan.exchange_layers:
        return
    dims = [geometry.out_dim(target) for target in plan.targets]
    most_b = min(dims) if plan.layout == "per_projection" else sum(dims)
    most_a = plan.hidden_size
    if plan.initialiser == "svd":
        most_a = most_b = min(most_a, most_b)
    for field, most in (("r_c2d", most_a), ("r_d2c", most_b)):
        if (rank := getattr(plan, field)) > most:
            raise LowRankError(
                f"{field} = {rank} is more than initialiser {plan.initialiser!r} can give for this model and "
                f"layout {plan.layout!r} (at most {most}); lower it, or use initialiser 'gaussian'"
            )


def gaussian(shape: tuple[int, int], label: str) -> Tensor:
    """Return N(0, 0.02^2) of ``shape``, float64, seeded by ``label``."""
    return torch.randn(shape, generator=_generator(label), dtype=torch.float64) * GAUSSIAN_STD


def orthonormal(shape: tuple[int, int], label: str) -> Tensor:
    """Return a tall matrix with orthonormal columns, uniform over those, seeded by ``label``."""
    q, r = torch.linalg.qr(torch.randn(shape, generator=_generator(label), dtype=torch.float64))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).double()
    return torch.mul(q, signs)  # a positive diagonal of R makes Q unique


def svd(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U_r (d_in, rank) and S_r V_r^T (rank, d_out) of ``w`` (d_in, d_out), float64.

    Signs: the largest entry of each column of U is positive.
    """
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    peak = u.gather(0, u.abs().argmax(dim=0, keepdim=True))  # (1, min(d_in, d_out))
    sign = torch.where(peak < 0, -1.0, 1.0)
    return (u * sign)[:, :rank], (s[:, None] * vh * sign.T)[:rank]


def _generator(label: str) -> torch.Generator:
    digest = hashlib.sha256(f"{SEED} {label}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def reader_of(checkpoint: Checkpoint, geometry: Geometry) -> WeightOf:
    """Return a function that reads one projection's W (hidden, d_out) from a checkpoint, in float64.

    Checkpoints store (d_out, hidden); Phi-3 stores q, k and v as one.
    """
    widths: Mapping[Target, int] = {"q": geometry.q_dim, "k": geometry.kv_dim, "v": geometry.kv_dim}

    def weight_of(layer: int, target: Target) -> Tensor:
        names = checkpoint.layer_tensors(layer)
        fused = names.get("self_attn.qkv_proj.weight")
        name = fused or names.get(f"self_attn.{target}_proj.weight")
        if name is None:
            raise LowRankError(f"{checkpoint.id}: layer {layer} has no {target} projection")
        stored = checkpoint.load([name], torch.float64)[name]  # (d_out, hidden)
        if fused:
            start = sum(widths[before] for before in TARGET_ORDER[: TARGET_ORDER.index(target)])
            stored = stored[start : start + widths[target]]
        if stored.shape != (widths[target], geometry.hidden_size):
            raise LowRankError(f"{name} has shape {tuple(stored.shape)}, the config says otherwise")
        return stored.T

    return weight_of
