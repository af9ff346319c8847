"""Record the greedy answers that `benchmarks.drafting` replays: one JSON line for each prompt.

``python -m benchmarks.drafting_answers --prompts 0:5`` runs plain Hugging Face code on the packaged model
(fp32, greedy, at most ``--tokens``) and appends what is not yet in ``drafting_answers.jsonl``, so it can be
run in pieces. Drafting changes no greedy token, so the answers are those with and without it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mixed_prompts import MIXED, REPETITION
from shared.models import DEFAULT_MODEL, resolve

PROMPTS = MIXED + REPETITION
RECORD = Path(__file__).with_name("drafting_answers.jsonl")


@dataclass(frozen=True)
class Recorded:
    """One answer: which prompt, the length of its tokens, the model, and the new tokens' ids."""

    prompt: int
    prompt_tokens: int
    model: str
    tokens: list[int]


def read_record() -> dict[int, Recorded]:
    """Return what has been recorded, by prompt."""
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    rows = [Recorded(**json.loads(line)) for line in lines]
    return {row.prompt: row for row in rows}


def prompt_ids(tokenizer: Any, number: int) -> list[int]:
    """Return the tokens of a prompt in chat format."""
    ids: list[int] = tokenizer.apply_chat_template(
        PROMPTS[number].messages(), add_generation_prompt=True, return_dict=False
    )
    return ids


def main() -> None:
    """Generate what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", default=f"0:{len(PROMPTS)}", metavar="FROM:TO", help="which ones")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of an answer")
    options = parser.parse_args()
    first, last = (int(number) for number in options.prompts.split(":"))
    known = read_record()
    folder = resolve(DEFAULT_MODEL).folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for number in range(first, min(last, len(PROMPTS))):
        if number in known:
            continue
        ids = prompt_ids(tokenizer, number)
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = model.generate(torch.tensor([ids]), max_new_tokens=options.tokens, **greedy)
        row = Recorded(number, len(ids), DEFAULT_MODEL, out[0, len(ids) :].tolist())
        with RECORD.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"{number}: {len(ids)} prompt tokens, {len(row.tokens)} new", flush=True)
    print(json.dumps({"benchmark": "drafting_answers", "recorded": len(read_record())}))


if __name__ == "__main__":
    main()
