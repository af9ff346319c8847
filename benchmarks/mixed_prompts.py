"""Twenty mixed prompts and five repetitive ones, for the figures of drafting.

Fixed before anything was measured with them, and not to be changed afterwards: what a drafter saves
depends on the text. Five each of code, prose, summarising a given text, and chat (several turns, the
assistant's written here). Two ask about this project's own pages, which stand for the user's documents.
"""

from dataclasses import dataclass

KINDS = ("code", "prose", "summary", "chat", "repetition")
DOCUMENTS = ("README.md", "docs/how-it-works.md")  # what `about_documents` is about


@dataclass(frozen=True)
class Prompt:
    """A conversation whose next turn is the assistant's. ``turns`` begins and ends with the user's."""

    kind: str
    turns: tuple[str, ...]
    about_documents: bool = False

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as a chat template takes it."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(self.turns)]


RIVER = """\
The river Aller was straightened between 1962 and 1967 so that barges of up to six hundred tonnes could
pass. Five bends were cut off, and the banks were lined with stone. Traffic never reached what had been
planned: by 1985 fewer than two barges a day used the locks, most of them carrying gravel. In 2009 the
district decided to reconnect three of the old bends. The stone was taken out by hand where machines would
have harmed the reed beds. Since then the number of breeding pairs of the little ringed plover has risen
from four to nineteen, and floods in the town downstream have been on average thirty centimetres lower.
Farmers who lost meadows were paid for them, though some say that the price was too low."""

MEETING = """\
Minutes of the allotment society, 14 May. Present: eleven members. The treasurer reported 1,240 euros in
the account, after paying 310 euros for the new water pump. Mrs. Lindqvist asked whether the pump may run
before seven in the morning; it was agreed that it may not. The hedge along the northern path is too high.
Mr. Adeyemi and Ms. Brandt will cut it on 2 June if it does not rain, otherwise on 9 June. The shed roof
leaks; two offers will be asked for before the next meeting. The summer party is on 7 July. Everyone brings
a salad, the society pays for drinks. Plot 17 is free from August on, and there are four on the waiting
list, the longest waiting since 2021."""

LETTER = """\
Dear Sir or Madam, on 3 March I ordered a standing lamp of the model Halden from your shop, order number
55120, and paid by bank transfer on the same day. The lamp arrived on 19 March. The switch on the cable
becomes hot after about ten minutes, and twice the fuse of my living room has blown. I called your hotline
on 21 March and again on 26 March. Both times I was promised a call from a technician within two days;
nobody has called. I therefore ask you to collect the lamp at your cost and to return the 189 euros by 30
April. Until then I will not use the lamp. Yours faithfully, H. Okonkwo"""

SLEEP = """\
In a study of 412 adults, people who put their phone in another room one hour before going to bed slept 24
minutes longer per night than those who kept it beside them. The effect was largest in the first two weeks
and fell to 15 minutes after two months. Those who only turned the phone to silent mode slept no longer
than the control group. The authors note that the participants chose their group themselves, so that people
who were already worried about their sleep may have been more likely to put the phone away. They also
measured only the time in bed and movement, not brain activity. A second study, in which the groups are
drawn by lot, began in autumn and will report next year."""

FUNCTION = """\
def total_price(items, discount):
    total = 0
    for item in items:
        if item["price"] < 0:
            raise ValueError("negative price")
        total = total + item["price"] * item["count"]
    if discount > 0:
        total = total - total * discount
    return total"""

SETTINGS = """\
[server]
host = "10.0.0.1"
port = 8080
timeout_seconds = 30
retries = 3

[database]
host = "10.0.0.2"
port = 5432
timeout_seconds = 30
retries = 3

[cache]
host = "10.0.0.3"
port = 6379
timeout_seconds = 30
retries = 3"""

MIXED = (
    Prompt(
        "code", ("Write a Python function that merges two sorted lists into one sorted list, with comments.",)
    ),
    Prompt("code", (f"Explain what this function does, line by line:\n\n```python\n{FUNCTION}\n```",)),
    Prompt("code", (f"Add type hints and a docstring to this function:\n\n```python\n{FUNCTION}\n```",)),
    Prompt("code", ("Write an HTML page with a form for a name, an e-mail address and a message.",)),
    Prompt("code", ("Write SQL that creates tables for books, readers and loans, then list overdue loans.",)),
    Prompt("prose", ("Tell the story of a clockmaker who repairs a clock that runs backwards.",)),
    Prompt("prose", ("Explain why the sky is blue during the day and red in the evening.",)),
    Prompt("prose", ("Describe a small harbour town on a winter morning, before the boats come in.",)),
    Prompt("prose", ("Write a letter to a friend who has just moved to another country.",)),
    Prompt("prose", ("What are the advantages and disadvantages of living in a large city?",)),
    Prompt("summary", (f"Summarise this text in four sentences:\n\n{RIVER}",)),
    Prompt("summary", (f"List all decisions and dates of these minutes:\n\n{MEETING}",)),
    Prompt("summary", (f"What is the writer of this letter asking for, and why?\n\n{LETTER}",)),
    Prompt("summary", (f"Summarise this article, with its figures and its weaknesses:\n\n{SLEEP}",)),
    Prompt(
        "summary",
        ("Summarise in your own words how PrivateLoRA splits a language model between an edge and a cloud.",),
        about_documents=True,
    ),
    Prompt(
        "chat",
        (
            "I would like to bake bread for the first time. What do I need?",
            "You need flour, water, salt and yeast, a bowl, and an oven that reaches 220 degrees Celsius. "
            "A cast iron pot with a lid helps, but a baking tray is enough.",
            "And how do I do it, step by step?",
        ),
    ),
    Prompt(
        "chat",
        (
            "Can you recommend a board game for four people?",
            "With four people, a cooperative game is a good choice: everybody plays together against the "
            "game. One that is easy to learn takes about forty-five minutes.",
            "We prefer to compete. It should not take longer than an hour.",
            "Then a game of trading and building suits you: it takes about an hour and the rules can be "
            "explained in ten minutes.",
            "Explain how such a game is played.",
        ),
    ),
    Prompt(
        "chat",
        (
            "My laptop has become very slow. What can I do?",
            "Look first at what starts together with the computer, and at how full the disk is. A disk that "
            "is more than ninety percent full makes everything slow.",
            "The disk is 95 percent full. What should I delete?",
        ),
    ),
    Prompt(
        "chat",
        (
            "I have a job interview at a library next week.",
            "Good luck! Think about why you want to work there, and read what the library offers to its "
            "visitors.",
            "Which questions will they ask me, and what could I answer?",
        ),
    ),
    Prompt(
        "chat",
        (
            "What is PrivateLoRA's command line for the edge called?",
            "It is called privatelora-edge; it has the commands generate, chat, tune, adapter and info.",
            "How do I tune my own personal weights with it, and what stays on my machine?",
        ),
        about_documents=True,
    ),
)

REPETITION = (
    Prompt("repetition", (f"Rename `total` to `amount` in this function:\n\n```python\n{FUNCTION}\n```",)),
    Prompt(
        "repetition",
        (f"Write this file again with every timeout set to 60 seconds:\n\n```toml\n{SETTINGS}\n```",),
    ),
    Prompt("repetition", (f"Correct any spelling mistakes and return the whole letter:\n\n{LETTER}",)),
    Prompt(
        "repetition",
        ("Repeat after me, word for word: the red fox and the grey fox and the red fox and the grey fox.",),
    ),
    Prompt("repetition", ("Write a JSON list of the twelve months with the keys number, name and days.",)),
)
