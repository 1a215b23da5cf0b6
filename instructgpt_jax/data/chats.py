"""Dialogues: how a run has them written, and what a record asks.

`config.data.template` names the template:

* `""`: none. A prompt is its text, and a record with `messages` is refused.
* `chat`: the tokenizer's own, a program in Jinja that many published checkpoints bring (`tokenizer.chat_template`).
* `human_assistant`: the form of Bai et al. 2022, "Training a helpful and harmless assistant", and of its data set
  hh-rlhf: `\\n\\nHuman: …\\n\\nAssistant: …`. A system message stands before all turns. A `prompt` that has this form
  already stays as it is.
* the path of a file with a template in Jinja.

A `prompt` that has no such form is the only message of a user. Templates are run by `apply_chat_template` of
transformers, in its sandbox, so the text is what every other program gets. Two things differ. A special token's text
inside a message is marked before the template runs, so that the tokenizer can tell it from the template's own and
write it as ordinary text. And a template that writes the date writes the day on which the first run began, or a run
that goes on would find other data.

Here is what `config.data` says of it and what a record asks. data/templates.py writes the texts, data/tokenizer.py
makes ids of them.
"""

import datetime
import json
import os
from typing import Any, NamedTuple

from etils import epath

from instructgpt_jax.data.schema import ASSISTANT, Record

OWN, HUMAN_ASSISTANT = "chat", "human_assistant"
NAMES = ("", OWN, HUMAN_ASSISTANT)  # anything else is a path
FILE = "chat.json"  # beside the tokenizer of a run with a template: its Chat
Prompt = str | list[dict[str, Any]]  # a prompt of a record: its text, or its messages


class Chat(NamedTuple):
    """What `config.data` says of chats.

    template: see above; "" = none.
    end_tokens: texts of the tokens that end a response; () = those of the checkpoint.
    day: what a template's date is, YYYY-MM-DD; "" = today.
    """

    template: str
    end_tokens: tuple[str, ...] = ()
    day: str = ""


def kept(directory: str | os.PathLike) -> Chat | None:
    """How the run whose tokenizer lies there writes dialogues; None where it writes none."""
    path = epath.Path(directory) / FILE
    return Chat(**json.loads(path.read_text())) if path.exists() else None


def keep(chat: Chat, directory: str | os.PathLike) -> None:
    """Keeps a template beside its tokenizer, which has its program and the end tokens."""
    name = HUMAN_ASSISTANT if chat.template == HUMAN_ASSISTANT else OWN
    (epath.Path(directory) / FILE).write_text(json.dumps({"template": name, "day": chat.day}) + "\n")


def today() -> str:
    """YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def prompt_of(record: Record) -> Prompt:
    """What is to be answered: the messages of a record, without an answer that they end with, or its prompt."""
    if "messages" not in record:
        return record["prompt"]
    messages = record["messages"]
    return messages[:-1] if messages[-1]["role"] == ASSISTANT else messages


def asked_and_said(record: Record) -> tuple[str, str]:
    """The prompt of a demonstration as `named` has it, and what is demonstrated; of a whole dialogue the last turn."""
    return named(record), record["completion"] if "completion" in record else record["messages"][-1]["content"]


class Dialogue(str):
    """Messages as one text, which people read and results are kept by; that of a user's single message is its text.

    Attributes:
      messages: the messages.
    """

    messages: list[dict[str, Any]]

    def __new__(cls, messages: list[dict[str, Any]]):
        single = len(messages) == 1 and messages[0]["role"] == "user"
        turns = (f"{message['role']}: {message['content']}" for message in messages)
        made = super().__new__(cls, messages[0]["content"] if single else "\n\n".join(turns))
        made.messages = messages
        return made


def named(record: Record) -> str:
    """The prompt of a record as a text: a `Dialogue` where it has messages."""
    return Dialogue(prompt_of(record)) if "messages" in record else record["prompt"]


def given(prompt: str) -> Prompt:
    """The prompt that a text of `named` stands for."""
    return prompt.messages if isinstance(prompt, Dialogue) else prompt
