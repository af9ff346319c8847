"""One answer to one prompt: stream its text as it is decoded, stop on Ctrl-C, and measure it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from edge_client.cloud_cache import ContextLengthError
from edge_client.config import EdgeConfig, SettingsError
from edge_client.datastore import Datastore
from edge_client.drafting import Drafter
from edge_client.model import PrivateLoraForCausalLM
from edge_client.plain import printable
from edge_client.report import Figures, Meter


@dataclass(frozen=True)
class Answer:
    """What was generated. ``finish`` is ``stop``, ``length``, ``context`` or ``interrupted``."""

    text: str
    tokens: list[int]
    finish: str
    figures: Figures


class TextStream(BaseStreamer):
    """Turns tokens into printable text as soon as whole characters are there."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object], meter: Meter) -> None:
        self._tokenizer, self._write, self._meter = tokenizer, write, meter
        self.tokens: list[int] = []
        self._is_prompt = True
        self._from = 0  # decoding begins here: at a token after which all text has been written
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call has the prompt."""
        if self._is_prompt:
            self._is_prompt = False
            return
        tokens = value.flatten().tolist()
        self._meter.token(len(tokens))
        self.tokens += tokens
        self._flush(self._decode(self._from), final=False)

    def end(self) -> None:
        """Write what is left."""
        self._flush(self._decode(self._from), final=True)

    @property
    def text(self) -> str:
        """The whole answer so far."""
        return self._decode(0)

    def _decode(self, start: int) -> str:
        return printable(self._tokenizer.decode(self.tokens[start:], skip_special_tokens=True))

    def _flush(self, text: str, *, final: bool) -> None:
        if text.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return  # part of a character; the next token completes it
        self._write(text[self._written :])
        self._written = len(text)
        if text.endswith("\n"):  # nothing after a line's end changes what is before it
            self._from, self._written = len(self.tokens), 0


def answer(
    model: PrivateLoraForCausalLM,
    prompt: list[int],
    config: EdgeConfig,
    write: Callable[[str], object] = lambda text: None,
    drafter: Drafter | None = None,
) -> Answer:
    """Generate an answer to a tokenized prompt, writing its text as it comes.

    ``drafter`` is what `make_drafter` returned for the same model and settings, if it is to learn from
    several answers; None makes one.

    Raises
    ------
    ContextLengthError
        If the prompt leaves no room for an answer. Running full later ends the answer instead.
    """
    limit = model.limits.max_context_tokens
    # The last token generated is never run, so it needs no room.
    room = limit - len(prompt) + 1
    if room < 2:
        raise ContextLengthError(len(prompt) + 1, limit)
    drafter = drafter or make_drafter(model, config)
    meter = Meter(model, drafter)
    stream = TextStream(model.tokenizer, write, meter)
    if config.seed is not None:
        torch.manual_seed(config.seed)
    interrupted = False
    ids = torch.tensor([prompt], device=model.device)
    meter.start()
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # or a pad token that stands in the text would be left out
            streamer=stream,
            max_new_tokens=min(config.max_new_tokens, room),
            drafter=drafter,
            **sampling(model, config),
        )
    except KeyboardInterrupt:
        interrupted = True
        stream.end()
    count = len(stream.tokens)
    if interrupted:
        finish = "interrupted"
    elif count < min(config.max_new_tokens, room) or _is_end(model, stream.tokens):
        finish = "stop"
    else:
        finish = "length" if config.max_new_tokens <= room else "context"
    return Answer(stream.text, stream.tokens, finish, meter.figures(len(prompt), model.wire_dtypes))


def sampling(model: PrivateLoraForCausalLM, config: EdgeConfig) -> dict[str, Any]:
    """Return the arguments of `generate` for the settings; what is not set is the model's default."""
    options: dict[str, Any] = {}
    if config.temperature == 0:
        options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif config.temperature is not None or config.top_p is not None:
        options = {"do_sample": True}
        if config.temperature is not None:
            options["temperature"] = config.temperature
        if config.top_p is not None:
            options["top_p"] = config.top_p
    if model.generation_config.pad_token_id is None:
        ends = _ends(model)
        options["pad_token_id"] = ends[0] if ends else 0
    return options


def make_drafter(model: PrivateLoraForCausalLM, config: EdgeConfig) -> Drafter | None:
    """Return what guesses tokens ahead, None where the settings or the model's own beams leave no use for it.

    Raises
    ------
    SettingsError
        If texts to guess from are given and guessing is off.
    edge_client.datastore.DatastoreError
        If these texts cannot be read.
    """
    if not config.draft_tokens:
        if config.draft_from:
            raise SettingsError("draft_tokens = 0 leaves nothing to draft_from: give one of the two")
        return None
    asked = {"draft_tokens", "draft_from"} & config.model_fields_set
    if not asked and (model.generation_config.num_beams or 1) > 1:
        return None
    documents = Datastore.read(config.draft_from, model.tokenizer) if config.draft_from else None
    return Drafter(config.draft_tokens, documents)


def _ends(model: PrivateLoraForCausalLM) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _is_end(model: PrivateLoraForCausalLM, tokens: list[int]) -> bool:
    return bool(tokens) and tokens[-1] in _ends(model)
