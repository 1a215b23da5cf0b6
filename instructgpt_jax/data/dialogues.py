"""What a record asks: its prompt, or its messages."""

from typing import Any

from instructgpt_jax.data.schema import ASSISTANT, Record

Prompt = str | list[dict[str, Any]]  # a prompt of a record: its text, or its messages


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
