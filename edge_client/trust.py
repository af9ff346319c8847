"""Which model a cloud is known for: its fingerprints, pinned on first use, like ssh's known_hosts.

A cloud's own word proves nothing. What protects is that it cannot change its word unnoticed, or that
the fingerprint came from elsewhere (``--fingerprint``, or an adapter file).
"""

import json
import os
from pathlib import Path
from typing import Any

import platformdirs

from edge_client.offer import CloudOffer
from shared.cache import locked, no_file, replacing
from shared.edge_parts import common_parts
from shared.fingerprint import Fingerprint, edge_digest
from shared.plan import Plan

ENVIRONMENT_VARIABLE = "PRIVATELORA_CONFIG_DIR"


class TrustError(ValueError):
    """A cloud that is not what it was, or not what it should be."""


def config_folder(given: Path | None = None) -> Path:
    """Return the folder of the user's settings: ``given``, else the environment's, else the platform's.

    Raises
    ------
    NotADirectoryError
        If a file is there.
    """
    chosen = given or os.environ.get(ENVIRONMENT_VARIABLE) or platformdirs.user_config_dir("privatelora")
    return no_file(Path(chosen).expanduser())


def check_known(
    offer: CloudOffer,
    plan: Plan,
    fingerprint: Fingerprint,
    *,
    expected: str | None = None,
    accept_new: bool = False,
    config_dir: Path | None = None,
    remember: bool = True,
) -> bool:
    """Compare a cloud with what is known of it; remember it if it is new.

    Parameters
    ----------
    offer, plan, fingerprint
        What the cloud states, and the plan in use.
    expected
        The root in hex, from outside; it decides alone.
    accept_new
        Replace what was pinned.
    config_dir
        Where the pins are kept.
    remember
        Whether to write down what is new.

    Returns
    -------
    bool
        Whether this cloud was seen for the first time.

    Raises
    ------
    TrustError
        If the cloud differs; the message names the part and says what to do.
    """
    root = fingerprint.root.hex()
    if expected is not None and expected.lower().strip() != root:
        raise TrustError(
            f"{offer.target} serves plan {plan.name!r} with fingerprint {root}, not the one given "
            f"({expected[:80]}); it is another model, or another split of it. Nothing was sent"
        )
    path = config_folder(config_dir) / "known_clouds.json"
    with locked(path):
        known = _read(path)
        pin = known.get(offer.target, {})
        # What all plans share is pinned by itself: another plan of another model must not pass as new.
        division = f" {plan.head_layers}+{plan.tail_layers}" if plan.resident_layers else ""
        stated = {
            "edge": edge_digest(common_parts(offer.parts)).hex(),
            f"layers{division}": fingerprint.layers.hex(),
        }
        changed = [WORDS[key.split()[0]] for key in stated if pin.get(key, stated[key]) != stated[key]]
        plans = dict(pin.get("plans", {}))
        if plans.get(plan.name, root) != root and not changed:
            changed = ["the plan or its A/B"]
        if changed and not accept_new and expected is None:
            raise TrustError(
                f"{offer.target} is not what it was: {' and '.join(changed)} changed since it was first "
                "used. Either its operator replaced the model, or somebody answers in its place. Nothing was "
                f"sent. It now states {root}: if you know that to be right, give it with --fingerprint; if "
                f"you trust the change, use --accept-new-fingerprint once (pins are kept in {path})"
            )
        plans = {plan.name: root} if changed else {**plans, plan.name: root}
        entry = {**({} if changed else pin), **stated, "plans": plans}
        if entry != pin and remember:
            known[offer.target] = entry
            with replacing(path) as file:
                file.write(json.dumps(known, indent=1, sort_keys=True).encode())
    return not pin or f"layers{division}" not in pin


WORDS = {"edge": "embeddings, head or tokenizer", "layers": "the decoder layers"}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not all(_is_pin(entry) for entry in known.values()):
        raise TrustError(f"{path} is damaged; restore it, or delete it to trust every cloud anew")
    return known


def _is_pin(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("plans", {}), dict)
