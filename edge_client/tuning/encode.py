"""Rows as token ids, and which of the ids answer.

Ids are those that inference would see: a chat goes through the model's own template and its bounded
walker, a prompt is cut into tokens as it is when it is asked, and the answer follows. Where an answer
begins and ends is found by rendering the conversation up to there, so nothing is assumed about the
template but that it begins an answer the way it prompts for one. Text that merely looks like a control
token is spelled out: only the template makes control tokens.
Knows nothing about lengths, labels or files.
"""

from dataclasses import dataclass
from typing import NamedTuple

from edge_client.template import ChatTemplate, TemplateError
from edge_client.tokenizer import EdgeTokenizer
from edge_client.tuning.rows import Chat, Completion, DataError, RowError, Text

MARK = "\ufdd0"  # a noncharacter: no text has it, and no template looks for it


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the spans ``[start, end)`` of them that answer, in order."""

    ids: list[int]
    spans: list[tuple[int, int]]


class _Rendered(NamedTuple):
    """A conversation's text, the same with marks where control tokens are to be spelled, and its ids."""

    text: str
    marked: str
    ids: list[int]


class Encoder:
    """Makes ids of rows with one model's tokenizer.

    Raises
    ------
    TemplateError
        If the model's chat template is not accepted.
    """

    def __init__(self, tokenizer: EdgeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelled: dict[str, list[int]] = {}
        self._control = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        source = tokenizer.chat_template
        self._source = source if isinstance(source, str) else ""
        self._template = ChatTemplate(source) if isinstance(source, str) else None

    @property
    def bos(self) -> int | None:
        """The id that the tokenizer puts before every text, if there is one."""
        bare, whole = self._plain("x", special=False), self._plain("x")
        return whole[0] if whole[:1] != bare[:1] else None

    def encode(self, body: Chat | Completion | Text, at_most: int | None = None) -> list[Encoded]:
        """Return a row's ids: one sequence, or several if they have to be learned apart.

        Parameters
        ----------
        body
            The row.
        at_most
            A chat that is longer (tokens) is followed no further, which would take long: the turns found
            so far are returned, the last one with all before it. None is any length.

        Raises
        ------
        RowError
            If the row cannot be encoded; the message holds nothing of it.
        DataError
            If no row of its kind can.
        """
        if isinstance(body, Chat):
            return self._chat(body, at_most)
        if isinstance(body, Completion):
            return [self._completion(body)]
        ids = self._plain(body.text)
        return [Encoded(ids, [(0, len(ids))])]

    # --- plain text -----------------------------------------------------------------------------------

    def _plain(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a user's text; ``special`` adds what the tokenizer puts around a text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    def _completion(self, row: Completion) -> Encoded:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise DataError("this model's tokenizer has no end token, so no completion can be learned to end")
        asked, ids = self._plain(row.prompt), self._plain(row.prompt + row.completion)
        if ids[: len(asked)] != asked:  # a token reaches over the border, which no answer can begin with
            ids = asked + self._plain(row.completion, special=False)
        if ids[-1] != end:
            ids = [*ids, end]
        return Encoded(ids, [(len(asked), len(ids))])

    # --- chats ----------------------------------------------------------------------------------------

    def _chat(self, row: Chat, at_most: int | None) -> list[Encoded]:
        if self._template is None:
            raise DataError("this model has no chat template; write rows of prompt and completion")
        messages = [message.model_dump() for message in row.messages]
        marked = [{**message, "content": self._marked(message["content"])} for message in messages]

        def render(count: int, *, prompt: bool = False) -> _Rendered:
            text = self._text(messages[:count], prompt)
            with_marks = self._text(marked[:count], prompt) if marked[:count] != messages[:count] else text
            return _Rendered(text, with_marks, self._ids(text, with_marks))

        whole = render(len(messages))
        turns: list[Encoded] = []
        joined: list[tuple[int, int]] | None = []
        for index in reversed(range(len(messages))):
            if messages[index]["role"] != "assistant":
                continue
            asked = render(index, prompt=True)
            upto = whole if index == len(messages) - 1 else render(index + 1)
            if not upto.text.startswith(asked.text):
                raise RowError(
                    "the model's chat template begins an answer in another way than it prompts for one, so "
                    "where the answer begins is unknown; write rows of prompt and completion"
                )
            start, ids = len(asked.ids), upto.ids
            if ids[:start] != asked.ids:  # a token reaches over the border, which no answer can begin with
                rest = self._ids(upto.text[len(asked.text) :], upto.marked[len(asked.marked) :])
                ids = asked.ids + rest
            end = self._end(ids, start, len(ids))
            turns.append(Encoded(ids, [(start, end)]))
            if at_most is not None and end > at_most:
                return turns[::-1]
            if not whole.text.startswith(upto.text) or whole.ids[:start] != asked.ids:
                joined = None
            elif joined is not None:
                joined.append((start, self._end(whole.ids, start, _common(upto.ids, whole.ids))))
        # Some templates show an earlier answer otherwise than when it was given (without its reasoning, say).
        # Then each answer is learned by itself, after what its model saw when it gave it.
        return turns[::-1] if joined is None else [Encoded(whole.ids, joined[::-1])]

    def _end(self, ids: list[int], start: int, end: int) -> int:
        """Return where the answer in ``ids[start:end]`` ends: after the control token that closes it, if any.

        Blank text that a template writes after that token is not the model's to say.
        """
        after = next((at + 1 for at in range(end - 1, start - 1, -1) if ids[at] in self._control), end)
        return end if str(self._tokenizer.decode(ids[after:end])).strip() else after

    def _ids(self, text: str, marked: str) -> list[int]:
        """Return the ids of rendered text, spelling what is marked."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        if marked == text:
            return ids
        if MARK in text or marked.replace(MARK, "") != text:
            raise RowError(
                "holds a control token of this model in its text, and the template alters it there"
            )
        spots, at = set[int](), marked.find(MARK)
        while at >= 0:
            spots.add(at - len(spots))
            at = marked.find(MARK, at + 1)
        spelled: list[int] = []
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            if token in self._control and not spots.isdisjoint(range(start, end)):
                piece = text[start:end]
                if piece not in self._spelled:
                    self._spelled[piece] = self._plain(piece, special=False)
                spelled += self._spelled[piece]
            else:
                spelled.append(token)
        return spelled

    def _marked(self, content: str) -> str:
        """Return a message with a mark before each part of it that would become a control token."""
        encoded = self._tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for start in reversed([start for token, (start, _) in tokens if token in self._control]):
            content = content[:start] + MARK + content[start:]
        return content

    def _text(self, messages: list[dict[str, str]], prompt: bool) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                messages,
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            said = str(error).rpartition(": ")[2]
        # The error may quote the conversation; what stands in the template itself does not.
        words = f": {said}" if said and said in self._source else ""
        raise RowError(f"the model's chat template refuses this conversation{words}")


def _common(one: list[int], other: list[int]) -> int:
    """Return how many ids two sequences share from the start."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
