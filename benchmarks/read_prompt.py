"""Claim: a cloud with the public weights reads the whole conversation.

Runs real sessions between the two processes with a recording relay between them, then attacks the
recording alone, with the public checkpoint. Each row of h0 is a row of the public embedding table, so
the nearest row is the token. The answer is read the same way, since every token but the last comes
back as the next step's input (the last is in hL, to which the public head can be applied). What was
really said enters only when the reading is scored.
"""

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.capture import Recording, Relay
from benchmarks.processes import CloudProcess, edge_json
from shared.models import DEFAULT_MODEL, Checkpoint, resolve

PROMPTS = (
    "My name is Ada Brandt and my account number is 4417 0932. Write a one-line reminder for me.",
    "I was diagnosed with diabetes in March. What should I ask my doctor?",
    "Summarise: Zephyr-9 ships on 14 June if Mr. Okonkwo signs; the price is EUR 83,250.",
    "Übersetze ins Englische: Morgen kündige ich bei der Firma Weidenbach.",
)


def nearest_tokens(hidden: Tensor, table: Tensor) -> Tensor:
    """Return for each row of `hidden` (tokens, d) the nearest row of `table` (vocabulary, d)."""
    # |h - e|^2 = |h|^2 - 2 h.e + |e|^2, and |h|^2 is the same for every candidate
    half_norms = table.square().sum(dim=1) / 2  # (vocabulary,)
    return torch.cat([(chunk @ table.T - half_norms).argmax(dim=1) for chunk in torch.split(hidden, 64)])


def embedding_scale(checkpoint: Checkpoint) -> float:
    """Return the public factor between the embedding table and h0 (Gemma scales by sqrt(d))."""
    is_scaled = checkpoint.config.model_type.startswith("gemma")
    return float(checkpoint.geometry.hidden_size) ** 0.5 if is_scaled else 1.0


def read_inputs(recording: Recording, table: Tensor) -> Tensor:
    """Return the token ids read from everything the edge sent: the prompt, then the answer."""
    return nearest_tokens(torch.from_numpy(recording.hidden_up()), table)


def main() -> None:
    """Capture, attack, score, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="float32", help="the cloud's compute dtype, and so the wire's")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the built-in prompts")
    options = parser.parse_args()
    prompts = PROMPTS[: options.prompts]
    checkpoint = resolve(options.model)
    name = checkpoint.edge_tensors()["embed_tokens.weight"]
    table = checkpoint.load([name], dtype=torch.float32)[name] * embedding_scale(checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)

    tokens = correct = answers = 0
    with CloudProcess(options.model, options.dtype) as cloud:
        for prompt in prompts:
            with Relay(cloud.address) as relay:
                said = edge_json(
                    *("generate", "--cloud", relay.address, "--prompt", prompt),
                    *("--max-new-tokens", str(options.max_new_tokens)),
                    *("--draft-tokens", "0"),  # so that what is read is the answer, without rejected guesses
                )
            read = read_inputs(relay.recording, table).tolist()
            truth = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            tokens += len(truth)
            correct += sum(a == b for a, b in zip(read, truth, strict=False))
            # the last token is never sent up: it is in hL only, and may have completed a character
            answer = tokenizer.decode(read[len(truth) :], skip_special_tokens=True).strip().rstrip("\ufffd")
            answers += bool(answer) and said["text"].strip().startswith(answer)
            print(f"read from the wire: {tokenizer.decode(read)!r}", flush=True)
    rate = correct / tokens
    print(
        f"\n{correct} of {tokens} prompt tokens read ({rate:.1%}); {answers} of {len(prompts)} answers read"
    )
    figures = {
        "benchmark": "read_prompt",
        "model": options.model,
        "dtype": options.dtype,
        "prompt_tokens": tokens,
        "prompt_tokens_read": correct,
        "prompt_read_rate": rate,
        "answers": len(prompts),
        "answers_read": answers,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
