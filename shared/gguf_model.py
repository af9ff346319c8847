"""GGUF files: dequantised once, to float32, and kept as a safetensors folder.

Why float32: a GGUF weight is scale * integer + offset with 16-bit scales; neither bfloat16 nor
float16 holds the result exactly. The folder is what everything else reads, fingerprints included.
"""

import contextlib
import importlib.util
import json
import os
from pathlib import Path

import torch

from shared import gguf_header
from shared.cache import cache_folder, file_sha256, make_folder, progress_bar
from shared.checkpoint import Checkpoint, ModelError, open_folder
from shared.disk import is_disk_full

LAYOUT_VERSION = 1  # of the folder made here; a new one is made when this changes

# Not facts about the model: they differ between transformers releases and would change the
# fingerprint of the same weights.
VOLATILE_KEYS = ("transformers_version", "_name_or_path", "name_or_path")


def open_gguf(
    path: Path,
    model_id: str,
    *,
    cache_dir: Path | None = None,
    digest: str | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Open a GGUF file, dequantising it on first use (SmolLM2-135M: half a minute, 0.5 GB).

    ``digest`` is the file's SHA-256 in hex where the caller has just computed it.

    Raises
    ------
    ModelError
        If the file is not a readable GGUF model, or gguf and accelerate are not installed.
    """
    check_header(path)
    digest = digest or file_sha256(path, cache_dir, show=progress).hex()
    folder = make_folder(folder_of(digest, cache_dir), lambda draft: dequantise(path, draft, progress))
    return open_folder(folder, model_id)


def folder_of(digest: str, cache_dir: Path | None = None) -> Path:
    """Return where the dequantised form of the GGUF file with this SHA-256 is kept."""
    return cache_folder(cache_dir) / "models" / f"gguf-{digest[:32]}-v{LAYOUT_VERSION}"


def check_header(path: Path) -> None:
    """Refuse what is not a well-formed GGUF file before a parser works on it."""
    try:
        gguf_header.check(path)
    except gguf_header.GgufError as error:
        raise ModelError(f"{path} is not a GGUF file, or a damaged one: {error}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None


def check_tools() -> None:
    """Refuse to start without the packages that dequantising needs."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"reading a GGUF file needs {' and '.join(missing)}: install the cloud extra, "
            "pip install 'privatelora[cloud]'"
        )


def dequantise(path: Path, folder: Path, progress: bool) -> None:
    """Write the model and tokenizer in ``path`` to ``folder``, in float32.

    Raises
    ------
    ModelError
        If transformers cannot read the file.
    """
    check_tools()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # seconds: only where needed

    # stderr: the libraries draw bars of their own there; what goes wrong arrives as an exception.
    with (
        progress_bar(f"Dequantising {path.name} (once)", None, progress),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
            model.save_pretrained(folder, max_shard_size="4GB")
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(folder)
        except Exception as error:  # parsers of untrusted bytes: any exception means the file is at fault
            if is_disk_full(error):  # which it is not
                raise
            text = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} cannot be read as a model: {type(error).__name__}: {text}") from error
    for file in folder.glob("*.json"):
        if file.name.endswith("config.json"):
            facts = json.loads(file.read_text())
            kept = {key: value for key, value in facts.items() if key not in VOLATILE_KEYS}
            file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
