"""Whether this edge can keep what it has to: public parts of the model, and what it knows of clouds."""

import errno
import shutil
import tempfile
from pathlib import Path

from edge_client.doctor.finding import Exam, Finding, failed, ok
from edge_client.trust import config_folder
from shared.cache import cache_folder
from shared.edge_parts import parts_of
from shared.fingerprint import edge_digest

FULL = {errno.ENOSPC, errno.EDQUOT}  # the disk, or this user's part of it


def folders(exam: Exam) -> Finding:
    """Write a file in each folder, and compare the room there with what would be fetched."""
    cache = cache_folder(exam.settings.cache_dir)
    for folder, where in (
        (cache, "--cache-dir or PRIVATELORA_CACHE_DIR"),
        (config_folder(), "PRIVATELORA_CONFIG_DIR"),
    ):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
        except OSError as error:
            mend = "free some space there" if error.errno in FULL else "make it writable for this user"
            return failed(
                f"cannot write to {folder} ({error.strerror})",
                f"{mend}, or name another folder with {where}",
            )
    free = shutil.disk_usage(cache).free
    missing = _missing_bytes(exam, cache)
    facts = {"cache": str(cache), "free_bytes": free, "to_fetch_bytes": missing}
    if missing > free:
        return failed(
            f"{cache} has {free / 2**20:.0f} MiB left, and {missing / 2**20:.0f} MiB are still to be fetched",
            "free some space, or name another folder with --cache-dir or PRIVATELORA_CACHE_DIR",
            **facts,
        )
    fetch = f"{missing / 2**20:.1f} MiB to fetch" if missing else "nothing to fetch"
    if exam.offer is None:
        fetch = "what is to be fetched is not known"
    return ok(f"{cache} is writable, {free / 2**30:.1f} GiB free, {fetch}", **facts)


def _missing_bytes(exam: Exam, cache: Path) -> int:
    """Return how much of this side's parts is not in the cache; it is checked for damage when it is used."""
    if exam.offer is None:
        return 0
    plan = exam.adapter.plan if exam.adapter is not None else exam.offer.plan(None)[0]
    needed = parts_of(plan, exam.offer.parts)
    folder = cache / "edge" / edge_digest(needed).hex()
    kept = [path for part in needed if (path := folder / part.name).is_file()]
    return max(0, sum(part.size for part in needed) - sum(path.stat().st_size for path in kept))
