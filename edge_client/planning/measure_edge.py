"""How fast this side is: its own parts, timed on random weights of the model's sizes.

Weights are not in the processor's caches when a token needs them, as everything else has gone through them
since; so a block of memory is read between two timings. Medians: of few repetitions where they are long, of
many where one that another process interrupts would count.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, PreTrainedConfig

from edge_client.model import PrivateLoraForCausalLM
from edge_client.offer import Limits
from edge_client.personal import PersonalWeights
from edge_client.planning.model_shape import ModelShape
from edge_client.planning.speeds import EdgeSpeed, Line
from edge_client.resident import Resident
from edge_client.resident_cache import RowCache
from edge_client.shell import build_shell
from edge_client.spans import Span
from shared.adapter import Adapter
from shared.fingerprint import Fingerprint
from shared.plan import Plan, Projection

POSITIONS = 32  # of the longer of the two steps that are timed
LEAST, MOST, ENOUGH_S = 5, 25, 0.1  # repetitions, and the time after which the least will do
LOOP_TOKENS = 24
LAYERS = 2  # that are timed together, as they would run
MOST_BYTES = 1 << 30  # of random weights held for a timing; a larger head is timed in part
LEAST_CACHE_BYTES, MOST_CACHE_BYTES = 16 << 20, 1 << 30  # believed of a processor's largest cache
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux tells sizes here, as "32768K"
NOBODY = Fingerprint(bytes(32), bytes(32), bytes(32), bytes(32))


def measure_edge(
    config: PreTrainedConfig, plan: Plan, device: torch.device | str, dtype: torch.dtype
) -> EdgeSpeed:
    """Time this side's parts for the model that ``config`` describes.

    Parameters
    ----------
    config
        The model's.
    plan
        One whose residual codes are timed.
    device, dtype
        Where and in what this side computes.
    """
    shape = ModelShape.from_config(config)
    with torch.no_grad():
        return EdgeSpeed(
            head=_head(shape, torch.device(device), dtype),
            layer=_layer(config, shape, torch.device(device), dtype),
            codes=_codes(plan),
            loop_s=_loop_s(),
        )


def cache_bytes(caches: Path = CACHES) -> int:
    """Return how much to read between two timings: as much as the largest cache, which others share.

    Parameters
    ----------
    caches
        Linux's folder of one core's caches; where there is none, the least that is believed is returned.
    """
    sizes = [LEAST_CACHE_BYTES]
    for file in caches.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", file.read_text().strip())
        if found is not None:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20}[found[2]])
    return min(max(sizes), MOST_CACHE_BYTES)


def _line(run: Callable[[int], object], device: torch.device) -> Line:
    """Time ``run`` with one position and with `POSITIONS`."""
    cold = torch.ones(cache_bytes() // 4)

    def seconds(positions: int) -> float:
        taken: list[float] = []
        while len(taken) <= LEAST or (len(taken) <= MOST and sum(taken) < ENOUGH_S):
            cold.sum()
            _finish(device)
            start = time.perf_counter()
            run(positions)
            _finish(device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    return Line.through(seconds(1), seconds(POSITIONS), POSITIONS)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _head(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Line:
    rows = max(1, min(shape.vocab_size, MOST_BYTES // (shape.hidden_size * dtype.itemsize)))
    weight = torch.randn(rows, shape.hidden_size, device=device, dtype=dtype)
    hidden = torch.randn(POSITIONS, shape.hidden_size, device=device, dtype=dtype)
    timed = _line(lambda n: torch.nn.functional.linear(hidden[:n], weight), device)
    scale = shape.vocab_size / rows
    return Line(one_s=timed.one_s * scale, each_s=timed.each_s * scale)


def _layer(
    config: PreTrainedConfig, shape: ModelShape, device: torch.device, dtype: torch.dtype
) -> Line | None:
    """Time one of the family's own layers with a LoRA in every product; None if it cannot be held."""
    if shape.num_layers < 3 or shape.layer_weights * dtype.itemsize > MOST_BYTES:
        return None
    plan = _resident_plan(shape.num_layers, shape.hidden_size, shape.products, LAYERS)
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config).layers[0]  # type: ignore[no-untyped-call]
    tensors = {name: torch.randn(t.shape) * 0.02 for name, t in skeleton.state_dict().items()}
    layers = Resident(config, plan, dict.fromkeys(range(LAYERS), tensors), device, dtype)
    bound = layers.with_factors(Adapter.random(plan, NOBODY, seed=0, std=0.02).factors)
    hidden = torch.randn(POSITIONS, shape.hidden_size)
    timed = _line(lambda n: bound.run(range(LAYERS), hidden[:n], RowCache()), device)
    return Line(one_s=timed.one_s / LAYERS, each_s=timed.each_s / LAYERS)


def _codes(plan: Plan) -> Line:
    """Time z = cM of one owner of ``plan``."""
    if not plan.adapted_layers:
        return Line(one_s=0.0, each_s=0.0)
    personal, layer = PersonalWeights(Adapter.zeros(plan, NOBODY)), plan.owners[0]
    codes = np.ones((POSITIONS, plan.codes_width), dtype=np.float32)
    return _line(lambda n: personal.residual_codes(layer, codes[:n]), torch.device("cpu"))


class Echo:
    """A session that computes nothing, so that only the loop around it takes time; counts its own."""

    def __init__(self) -> None:
        self.taken_s = 0.0
        self._cold = torch.ones(cache_bytes() // 4)

    def step(self, hidden: Tensor, spans: Sequence[Span], parents: Sequence[int] | None = None) -> Tensor:
        """Return the kept positions as they came."""
        start = time.perf_counter()
        self._cold.sum()
        kept, at = [], 0
        for span in spans:
            kept.append(hidden[at + span.count - span.keep : at + span.count])
            at += span.count
        out = torch.cat(kept)
        self.taken_s += time.perf_counter() - start
        return out

    def cancel(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""


def _loop_s() -> float:
    """Return what `generate` takes for a token of a model too small to count (seconds)."""
    vocab, width = 16, 8
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=width, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    session = Echo()
    tensors = {"embed_tokens.weight": torch.ones(vocab, width), "norm.weight": torch.ones(width)}
    model = PrivateLoraForCausalLM(
        config,
        build_shell(config, tensors, "cpu", torch.float32),
        Limits(max_context_tokens=1 << 16, max_step_tokens=512, max_rows=1),
        Adapter.zeros(_resident_plan(2, width, (), 1), NOBODY),
        lambda personal: session,
    )

    def seconds(tokens: int) -> float:
        prompt, own = torch.ones(1, 4, dtype=torch.long), session.taken_s
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start - (session.taken_s - own)

    seconds(2)
    return max(0.0, seconds(LOOP_TOKENS + 1) - seconds(1)) / LOOP_TOKENS


def _resident_plan(
    num_layers: int, hidden_size: int, products: tuple[Projection, ...], head_layers: int
) -> Plan:
    """Return a plan whose first layers are on the edge."""
    return Plan.subset(
        (), name="timing", backbone="timing", num_layers=num_layers, hidden_size=hidden_size,
        head_layers=head_layers, lora=products, lora_rank=16 if products else 0,
    )  # fmt: skip
