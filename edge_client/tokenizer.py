"""A tokenizer made from files that a cloud sent: its own class, listed settings, checked template.

transformers' loaders let a file choose the class and the code. Here the file gives a vocabulary
(tokenizer.json), a few listed settings, and a chat template that `ChatTemplate` renders.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from edge_client.template import ChatTemplate, TemplateError
from shared.checkpoint import ModelError, read_json

SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "padding_side",
)
MAX_TOKEN_CHARS = 512  # longest piece of text that one token may stand for
MAX_PATTERN_CHARS = 2048
MAX_GROWTH = 256  # how many times longer replacements, one after the other, may make a text
CONTINUE_MARK = "\N{SYMBOL FOR UNIT SEPARATOR}continue here\N{SYMBOL FOR UNIT SEPARATOR}"


class TokenizerError(ValueError):
    """Tokenizer files that are malformed or not to be trusted."""


class EdgeTokenizer(PreTrainedTokenizerFast):
    """A Hugging Face tokenizer whose chat template is evaluated by `ChatTemplate`."""

    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:
        if isinstance(text, str) and not _is_unicode(text):
            raise TokenizerError("the text holds bytes that are no text (half a surrogate pair)")
        with _failing_clearly():
            return super()._encode_plus(text, *args, **options)

    def _decode(self, *args: Any, **options: Any) -> Any:
        with _failing_clearly():
            return super()._decode(*args, **options)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **variables: Any,
    ) -> Any:
        """Render a conversation, and tokenize it unless ``tokenize`` is False.

        As transformers' method of this name, without its marking of the assistant's tokens.

        Raises
        ------
        TemplateError
            If the model has no chat template, or its template cannot be rendered safely.
        """
        source = chat_template or self.chat_template
        if not isinstance(source, str):
            raise TemplateError("this model has none; give the prompt as plain text (--raw)")
        batched = bool(conversation) and isinstance(conversation[0], list)
        chats: Any = conversation if batched else [conversation]
        template = ChatTemplate(source)
        texts = []
        for chat in chats:
            plain = json.loads(json.dumps(chat))  # a copy, of plain values only
            if continue_final_message:
                plain[-1]["content"] += CONTINUE_MARK
            text = template.render(
                plain,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens_map, **variables},
            )
            if continue_final_message:
                text = text[: text.rindex(CONTINUE_MARK)] if CONTINUE_MARK in text else text.rstrip()
            texts.append(text)
        rendered = texts if batched else texts[0]
        if not tokenize:
            return rendered
        encoded = self(
            rendered,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=False,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return encoded if return_dict else encoded["input_ids"]


@contextmanager
def _failing_clearly() -> Iterator[None]:
    """Turn what the Rust side throws into an error that a command can show."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no Exception, and its class is not to be had
            raise
        raise TokenizerError("this cloud's tokenizer failed over the text: hostile patterns?") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_tokenizer(folder: Path, vocab_size: int, max_tokens: int) -> EdgeTokenizer:
    """Build the tokenizer from verified files in ``folder``.

    Parameters
    ----------
    folder
        Holds tokenizer.json and, as they exist, tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja.
    vocab_size
        Rows of the embedding; every token id must be below.
    max_tokens
        The context, for tools that ask a tokenizer for it.

    Raises
    ------
    TokenizerError, TemplateError
        If the files are malformed or ask for anything but data.
    """
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError("this cloud offers no tokenizer.json; the model cannot read text")
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    chosen: dict[str, Any] = {k: settings[k] for k in SETTINGS if isinstance(settings.get(k), bool | str)}
    for key in SPECIAL_TOKENS:
        token = settings.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            chosen[key] = AddedToken(_short(token), special=True)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name: the default one is for chats
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text("utf-8")
        except UnicodeDecodeError:
            raise TemplateError("chat_template.jinja is not UTF-8 text") from None
    if isinstance(template, str):
        _try_template(template)
        chosen["chat_template"] = template
    backend = _backend(folder / "tokenizer.json")
    _check_ids(backend, vocab_size)  # before transformers copies it, which counts up to the highest id
    tokenizer = EdgeTokenizer(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, model_max_length=max_tokens, **chosen
    )
    _check_ids(tokenizer, vocab_size)  # with the special tokens
    return tokenizer


def _check_ids(tokenizer: Tokenizer | EdgeTokenizer, vocab_size: int) -> None:
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= highest < vocab_size:
        raise TokenizerError(f"the tokenizer has token id {highest}, the embedding only {vocab_size} rows")


def _try_template(source: str) -> None:
    """Refuse a template that is hostile on the smallest conversation, before it is ever needed."""
    try:
        chat = [{"role": "user", "content": "Hi"}]
        ChatTemplate(source).render(chat, add_generation_prompt=True, bos_token="")
    except TemplateError as error:
        if "refuses this conversation" not in str(error):
            raise


def _backend(path: Path) -> Tokenizer:
    """Parse tokenizer.json; refuse replacements and patterns that could blow up a short text."""
    raw = _json(path)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        pending: list[Any] = [raw.get(part)]
        seen, growth = 0, 1.0
        while pending:
            value = pending.pop()
            seen += 1
            if seen > 10_000:
                raise TokenizerError(f"tokenizer.json: its {part} has too many parts")
            if isinstance(value, dict):
                pattern = value.get("pattern")
                if value.get("type") == "Replace":
                    growth *= _growth(pattern, str(value.get("content")))
                if growth > MAX_GROWTH or len(str(value.get("prepend", ""))) > MAX_TOKEN_CHARS:
                    raise TokenizerError(f"tokenizer.json: its {part} replaces text by something much longer")
                if isinstance(pattern, dict) and len(str(pattern.get("Regex", ""))) > MAX_PATTERN_CHARS:
                    raise TokenizerError(f"tokenizer.json: a pattern of its {part} is too long")
                pending += [v for k, v in value.items() if k != "precompiled_charsmap"]
            elif isinstance(value, list):
                pending += value
    added_tokens = raw.get("added_tokens") or []
    if not isinstance(added_tokens, list):
        raise TokenizerError(
            f"tokenizer.json: added_tokens must be a list, got {type(added_tokens).__name__}; is it damaged?"
        )
    for added in added_tokens:
        _short(str(added.get("content", "")) if isinstance(added, dict) else "")
    try:
        backend = Tokenizer.from_str(path.read_text("utf-8"))
        longest = max(map(len, backend.get_vocab()), default=0)
    except BaseException as error:  # the Rust side raises plain Exception, and panics as BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(f"tokenizer.json cannot be read: {str(error)[:200]}") from None
    if longest > MAX_TOKEN_CHARS:
        raise TokenizerError(f"a token stands for {longest} characters, at most {MAX_TOKEN_CHARS} accepted")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _growth(pattern: Any, content: str) -> float:
    """Return how many times longer a text may become in which a pattern is replaced."""
    plain = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(plain, str) and plain:
        return max(1.0, len(content) / len(plain))
    return 1.0 + len(content)  # a regular expression may match nothing, between any two characters


def _short(token: str) -> str:
    if not _is_unicode(token):
        raise TokenizerError("a special token is no text (half a surrogate pair)")
    if len(token) > MAX_TOKEN_CHARS:
        raise TokenizerError(
            f"a special token has {len(token)} characters, at most {MAX_TOKEN_CHARS} accepted"
        )
    return token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.name != "tokenizer.json":
        try:
            return read_json(path)
        except ModelError as error:
            raise TokenizerError(str(error)) from None
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise TokenizerError(f"{path.name} is not valid JSON") from None
    if not isinstance(raw, dict):
        raise TokenizerError(f"{path.name} must hold a JSON object")
    return raw
