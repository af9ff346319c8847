"""Settings of the model and of what it is computed with: element type, device, ranks, threads, files."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cloud_server.config.bounds import MOST_S


class ComputeSettings(BaseModel):
    """What is served, and on which hardware."""

    model: str = Field(
        default="smollm2-135m-instruct",
        description="Packaged model name, Hugging Face folder, GGUF file or hub id",
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="Element type the backbone computes in"
    )
    device: str = Field(default="cpu", description="Torch device of the backbone (cpu, cuda, cuda:N, mps)")
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Ranks: processes that share the layers, each with some heads and its own GPU (count)",
    )
    parallel_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=MOST_S,
        description="A rank that does not answer for this long ends all of them (seconds)",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="Torch threads (count); all cores if absent"
    )
    cache_dir: Path | None = Field(default=None, description="Folder for models and A/B files")
