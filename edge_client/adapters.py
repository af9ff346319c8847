"""The user's adapters: files of personal weights in one folder, each under a name, one of them in use.

Names are plain words, so none can lead out of the folder; what lies in the folder is checked before it
is used. Knows nothing about clouds: whether an adapter fits one is found out on connecting.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from edge_client.trust import config_folder
from shared.adapter import Adapter, AdapterError
from shared.cache import locked, replacing
from shared.complaint import in_words

ENVIRONMENT_VARIABLE = "PRIVATELORA_DATA_DIR"
ENDING = ".safetensors"
CURVE_ENDING = ".png"
NO_ADAPTER = "none"  # what stands for the base model
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
SHOWN_NAMES = 20


class StoreError(ValueError):
    """An adapter that is not there, or a name that cannot be one."""


def data_folder(given: Path | None = None) -> Path:
    """Return the folder of the user's data: ``given``, else the environment's, else the platform's."""
    chosen = given or os.environ.get(ENVIRONMENT_VARIABLE) or platformdirs.user_data_dir("privatelora")
    return Path(chosen).expanduser()


@dataclass(frozen=True)
class Entry:
    """One file of the store: what it holds, or why it cannot be used."""

    name: str
    path: Path
    size_bytes: int
    adapter: Adapter | None
    problem: str


class AdapterStore:
    """The adapters of one user.

    Parameters
    ----------
    data_dir
        The folder of the user's data; adapters are in ``adapters`` inside.
    config_dir
        The folder of the user's settings, where it is kept which adapter is in use.
    """

    def __init__(self, data_dir: Path | None = None, config_dir: Path | None = None) -> None:
        self.folder = data_folder(data_dir) / "adapters"
        self._memory = config_folder(config_dir) / "adapter_in_use.json"

    def path(self, name: str) -> Path:
        """Return where the adapter ``name`` is, or would be; raises StoreError if it cannot be a name."""
        if not _is_name(name):
            raise StoreError(
                f"{name[:80]!r} cannot be an adapter's name: letters, digits, dots, dashes and underscores, "
                f"a letter or digit first, at most 64, without {ENDING!r}, and not {NO_ADAPTER!r}"
            )
        return self.folder / (name + ENDING)

    def path_to_save(self, name: str) -> Path:
        """Return where to save an adapter as ``name``, after making the folder (mode 0700).

        Raises
        ------
        StoreError
            If it cannot be a name.
        """
        path = self.path(name)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        return path

    def names(self) -> list[str]:
        """Return the names of what is in the folder, usable or not, in alphabetical order."""
        try:
            found = [path for path in self.folder.iterdir() if path.name.endswith(ENDING)]
        except FileNotFoundError:
            return []
        # What begins with a dot is a file that is being written, or was when the machine stopped.
        return sorted(path.name.removesuffix(ENDING) for path in found if not path.name.startswith("."))

    def entries(self) -> list[Entry]:
        """Return all that is in the folder, usable or not, in alphabetical order."""
        return [self._entry(name) for name in self.names()]

    def entry(self, name: str) -> Entry:
        """Return one adapter; raises StoreError, saying what there is, if there is none of this name."""
        if not os.path.lexists(self.path(name)):
            raise StoreError(f"no adapter {name!r} in {self.folder} ({self._what_there_is()})")
        return self._entry(name)

    def _entry(self, name: str) -> Entry:
        path = self.folder / (name + ENDING)
        adapter: Adapter | None = None
        size = 0
        try:
            size = path.lstat().st_size
            if path.is_symlink():  # it may lead anywhere, also to what changes after it was checked
                problem = "a symbolic link, which is not followed; copy the file here"
            elif not _is_name(name):
                problem = "its name cannot be an adapter's; rename the file"
            else:
                adapter, problem = Adapter.load(path), ""
        except (AdapterError, OSError) as error:
            problem = in_words(error)
        return Entry(name, path, size, adapter, problem)

    # --- which one is in use --------------------------------------------------------------------------

    def in_use(self) -> str | None:
        """Return the name of the adapter in use, None for the base model.

        Raises
        ------
        StoreError
            If that cannot be told.
        """
        try:
            name = json.loads(self._memory.read_bytes())["adapter"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str) or not _is_name(name):
            raise StoreError(
                f"{self._memory} is damaged, so it is unknown which adapter is in use; choose one with "
                "`privatelora-edge adapter use NAME`, or the base model with `adapter use --none`"
            )
        return name

    def use(self, name: str | None) -> None:
        """Make an adapter the one in use; None is the base model.

        Raises
        ------
        StoreError
            If there is none of this name, or it cannot be used.
        """
        if name is not None and (problem := self.entry(name).problem):
            raise StoreError(f"adapter {name!r} cannot be used: {problem}")
        with locked(self._memory):
            if name is None:
                self._memory.unlink(missing_ok=True)
            else:
                with replacing(self._memory) as file:
                    file.write(json.dumps({"adapter": name}).encode())

    def remove(self, name: str) -> bool:
        """Delete an adapter (of a symbolic link, the link); return whether it was the one in use.

        Raises
        ------
        StoreError
            If there is none of this name, or it is a folder.
        """
        path = self.entry(name).path
        if path.is_dir() and not path.is_symlink():
            raise StoreError(f"{path} is a folder; look what it holds, and remove it yourself")
        try:
            was_in_use = self.in_use() == name
        except StoreError:
            was_in_use = False  # damaged: the next `generate` says so
        path.unlink()
        path.with_suffix(CURVE_ENDING).unlink(missing_ok=True)  # the picture of its tuning
        if was_in_use:  # only now: had the deletion failed, it would still be in use
            self.use(None)
        return was_in_use

    # --- what a person means --------------------------------------------------------------------------

    def resolve(self, value: str | Path | None = None) -> Path | None:
        """Return the file that ``value`` means, None for the base model.

        Parameters
        ----------
        value
            A name in the store, or else a file; ``none`` is the base model; None is the one in use.

        Raises
        ------
        StoreError
            If there is no such adapter; the message says what there is.
        """
        if value is None:
            name = self.in_use()
            if name is not None and not self.path(name).is_file():
                raise StoreError(
                    f"adapter {name!r}, which is in use, is no longer in {self.folder} "
                    f"({self._what_there_is()}); `privatelora-edge adapter use NAME` chooses another, "
                    "`adapter use --none` the base model"
                )
        else:
            name = str(value)
        if name is None or name == NO_ADAPTER:
            return None
        if _is_name(name) and os.path.lexists(self.path(name)):
            found = self.path(name)
            if found.is_symlink():
                raise StoreError(f"adapter {name!r} cannot be used: {self._entry(name).problem}")
            return found
        file = Path(name).expanduser()
        if file.is_file():
            return file
        what = "is a folder" if file.is_dir() else "is no file"
        raise StoreError(
            f"no adapter {name[:200]!r}: it {what}, nor a name in {self.folder} ({self._what_there_is()})"
        )

    def _what_there_is(self) -> str:
        names = [name for name in self.names() if _is_name(name)]
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        return f"there is: {', '.join(names[:SHOWN_NAMES])}{more}" if names else "which is empty"


def resolve_adapter(value: str | Path | None = None) -> Path | None:
    """Return the file that ``--adapter`` means, as `AdapterStore.resolve` with the user's own folders."""
    return AdapterStore().resolve(value)


def _is_name(text: str) -> bool:
    return (
        NAME.fullmatch(text) is not None and text.lower() != NO_ADAPTER and not text.lower().endswith(ENDING)
    )
