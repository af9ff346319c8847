"""A conversation in the terminal: turns, commands, and what to do when the context is full.

A turn's prompt begins like the one before it, so the cloud computes only what is new.
"""

from collections.abc import Callable

from edge_client.adapters import resolve_adapter
from edge_client.answer import Answer, answer, make_drafter
from edge_client.cloud_cache import ContextLengthError
from edge_client.config import EdgeConfig
from edge_client.model import PrivateLoraForCausalLM

HELP = """\
/help          this list
/reset         begin a new conversation
/drop [N]      forget the N oldest turns (1 if not given)
/adapter NAME  use other personal weights, by name or file; /adapter none is the base model
/quit          end (so does Ctrl-D); Ctrl-C stops an answer
"""


class Chat:
    """A conversation.

    Parameters
    ----------
    model
        With a tokenizer that has a chat template.
    config
        Settings of the answers.
    write
        Takes pieces of an answer as they come.
    say
        Takes one line about what happened.
    ask
        Takes a yes-or-no question, returns the answer.
    """

    def __init__(
        self,
        model: PrivateLoraForCausalLM,
        config: EdgeConfig,
        write: Callable[[str], object],
        say: Callable[[str], object],
        ask: Callable[[str], bool],
    ) -> None:
        self.model, self.config = model, config
        self._write, self._say, self._ask = write, say, ask
        self._drafter = make_drafter(model, config)
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.config.system}] if self.config.system else []

    @property
    def turns(self) -> int:
        """Questions asked so far."""
        return sum(message["role"] == "user" for message in self.messages)

    def drop(self, count: int = 1) -> int:
        """Forget the oldest turns, but never the system message; return how many were forgotten."""
        start = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        dropped = 0
        while dropped < count and len(self.messages) > start:
            del self.messages[start]
            while len(self.messages) > start and self.messages[start]["role"] != "user":
                del self.messages[start]
            dropped += 1
        return dropped

    def turn(self, text: str) -> Answer | None:
        """Ask one question and return its answer; None if there was no room and nothing was dropped."""
        self.messages.append({"role": "user", "content": text})
        try:
            while True:
                try:
                    reply = answer(self.model, self.prompt(), self.config, self._write, self._drafter)
                    break
                except ContextLengthError as full:
                    if self.turns < 2:
                        self._say(f"this question alone does not fit: {full}")
                        self._withdraw()
                        return None
                    if not self._ask(f"{full}. Drop the oldest of {self.turns - 1} earlier turns?"):
                        self._say("not asked; /drop N forgets turns, /reset all of them")
                        self._withdraw()
                        return None
                    self.drop()
        except BaseException:
            self._withdraw()
            raise
        self.messages.append({"role": "assistant", "content": reply.text})
        if reply.finish == "context":
            self._say("the context is full, so the answer was cut short; /drop N forgets the oldest turns")
        return reply

    def prompt(self) -> list[int]:
        """Return the conversation as token ids, up to where the answer begins."""
        assert self.model.tokenizer is not None
        ids: list[int] = self.model.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; return whether the chat goes on."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/help":
            self._say(HELP)
        elif name == "/reset":
            self.reset()
            self._say("a new conversation")
        elif name == "/drop" and (argument.isdecimal() or not argument):
            count = self.drop(int(argument or 1))
            self._say(f"{count} {'turn' if count == 1 else 'turns'} forgotten, {self.turns} left")
        elif name == "/adapter" and argument:
            chosen = resolve_adapter(argument)
            self.model.set_adapter(chosen)
            self._say(f"now with {self.model.adapter.name if chosen else 'the base model'}")
        elif name in ("/drop", "/adapter"):
            self._say(f"{name} takes {'a number' if name == '/drop' else 'a name or a file'}; see /help")
        else:
            self._say(f"no such command: {line[:40]} (/help lists them)")
        return True

    def _withdraw(self) -> None:
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
