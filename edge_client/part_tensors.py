"""What a fetched model's tensors may be: the expected names, shapes and dtypes, nothing else.

Headers are compared before a byte of a tensor is read.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from shared.checkpoint import DTYPES
from shared.edge_parts import TENSORS_FILE, EdgePartsError, check_tensors_file, layer_file
from shared.families import Geometry
from shared.tensor_file import TensorFileError, read_header


def read_tensors(folder: Path, sizes: Geometry) -> dict[str, Tensor]:
    """Read the tensors, after their header has been compared with the configuration.

    Returns
    -------
    dict
        ``embed_tokens.weight``, ``norm.weight`` and, if not tied, ``lm_head.weight``, as stored.

    Raises
    ------
    EdgePartsError
        If a name, shape or dtype is not the expected one.
    """
    header = check_tensors_file(
        folder / TENSORS_FILE,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        tied_head=sizes.tied_head,
    )
    with safe_open(folder / TENSORS_FILE, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in header.tensors}


def read_layer(folder: Path, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a decoder layer, after its header has been compared with the shapes that the model's code has.

    Raises
    ------
    EdgePartsError
        If a name, shape or dtype is not the expected one, or a value is not finite.
    """
    return read_exact(folder / layer_file(layer), shapes)


def read_exact(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read a file that holds exactly these tensors, floating point and finite.

    Raises
    ------
    EdgePartsError
        If it does not.
    """
    try:
        header = read_header(path, max_header_bytes=1 << 16)
    except TensorFileError as error:
        raise EdgePartsError(str(error)) from None
    found = {name: info.shape for name, info in header.tensors.items()}
    if found != dict(shapes):
        differing = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise EdgePartsError(
            f"{path}: {differing} is missing, unknown or of another shape than config.json says"
        )
    if any(info.dtype not in DTYPES for info in header.tensors.values()):
        raise EdgePartsError(f"{path}: expected tensors of {', '.join(DTYPES)}")
    with safe_open(path, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in header.tensors}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise EdgePartsError(f"{path}: {name} holds NaN or infinity; these parts are damaged or hostile")
    return tensors
