"""Dialogues as texts: chat templates, what they write, and where the assistant's turns stand in it.

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

Nothing here knows ids: data/tokenizer.py makes them.
"""

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
from etils import epath

from instructgpt_jax.data.schema import ASSISTANT, Record

OWN, HUMAN_ASSISTANT = "chat", "human_assistant"
NAMES = ("", OWN, HUMAN_ASSISTANT)  # anything else is a path
FILE = "chat.json"  # beside the tokenizer of a run with a template: its Chat
_HUMAN_ASSISTANT = """\
{%- for message in messages %}
    {%- set content = message['content'].lstrip() %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- content }}
    {%- elif message['role'] == 'user' %}
        {{- '\\n\\nHuman: ' + content }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\nAssistant:' + (' ' + content if content else '') }}
    {%- else %}
        {{- raise_exception('roles must be user and assistant after a first system, got ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
_MARKS = ("\ufdd0", "\ufdd1")  # around a special token's text in a message; noncharacters, which no text has
_MARKED = re.compile(f"{_MARKS[0]}(.*?){_MARKS[1]}", re.DOTALL)
_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_PROBE = "An answer of ours"
_LACKS = re.compile(r"has no attribute '(\w+)'")  # how Jinja says it
_SHOWN = 100  # characters of a rendering in an error

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


class Rendered(NamedTuple):
    """A text that a template wrote.

    text: all of it.
    ordinary: (start, end) of each part that reads as a special token and is none, since a message brought it.
    skip: characters at the beginning that are the prompt's, where the ids of an answer alone are wanted.
    loss: (start, end) of the assistant's turns, each with the token that ends it where the template writes one.
    """

    text: str
    ordinary: tuple[tuple[int, int], ...] = ()
    skip: int = 0
    loss: tuple[tuple[int, int], ...] = ()


def kept(directory: str | os.PathLike) -> Chat | None:
    """How the run whose tokenizer lies there writes dialogues; None where it writes none."""
    path = epath.Path(directory) / FILE
    return Chat(**json.loads(path.read_text())) if path.exists() else None


def keep(chat: Chat, directory: str | os.PathLike) -> None:
    """Keeps a template beside its tokenizer, which has its program and the end tokens."""
    name = HUMAN_ASSISTANT if chat.template == HUMAN_ASSISTANT else OWN
    (epath.Path(directory) / FILE).write_text(json.dumps({"template": name, "day": chat.day}) + "\n")


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


def source(template: str, own: str | dict | None, name: str) -> str:
    """The Jinja text of a template.

    Args:
      template: as in `Chat`, not "".
      own: the tokenizer's; some bring several by name, of which `default` is meant.
      name: of the tokenizer, for the error.

    Raises:
      ValueError: a tokenizer without a template, a file that cannot be read.
    """
    if template == HUMAN_ASSISTANT:
        return _HUMAN_ASSISTANT
    if template == OWN:
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            raise ValueError(
                f"config.data.template='chat' needs a tokenizer with a template of its own, {name!r} has none: name a "
                "Jinja file, or 'human_assistant'"
            )
        return own
    try:
        return epath.Path(template).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"config.data.template must be one of {NAMES} or the path of a Jinja file, got {template!r}: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """Messages to text.

    Attributes:
      name: `chat` or `human_assistant`.
      jinja: its program.
      lead: what it writes between the end of a prompt and the text of an answer.
      end: the text of the token that ends the assistant's turn; "" where it writes none.
    """

    name: str
    jinja: str
    lead: str
    end: str
    _write: Callable[[list[dict], bool], str]
    _special: re.Pattern  # the texts of special tokens

    def prompt(self, prompt: Prompt) -> Rendered:
        """What the assistant is to answer, up to where its words begin."""
        if self._stays(prompt):
            return Rendered(prompt, self._found(prompt))
        return self._render(_messages(prompt), True)

    def answer(self, prompt: Prompt, text: str, ended: bool) -> Rendered:
        """An answer behind its prompt, without the token that ends it; the prompt is skipped.

        Args:
          ended: whether that token follows; what stands before it belongs to the answer then.

        Raises:
          ValueError: the template refuses the messages, or writes the prompt otherwise when an answer follows.
        """
        if self._stays(prompt):
            words = text.lstrip()
            whole = prompt + (" " + words if words else "")
            return Rendered(whole, self._found(whole), len(prompt))
        messages = _messages(prompt)
        before = self._render(messages, True).text
        whole = self._render([*messages, {"role": ASSISTANT, "content": text}], False)
        self._check_prefix(before, whole.text)
        stop = self._stop(whole, len(before), text)
        if ended:
            stop = self._end(whole, stop, len(whole.text)) or stop
        ordinary = tuple(span for span in whole.ordinary if span[1] <= stop)
        return Rendered(whole.text[:stop], ordinary, len(before))

    def dialogue(self, messages: list[dict]) -> Rendered:
        """A whole dialogue, with the assistant's turns.

        Raises:
          ValueError: the template refuses the messages, or writes a turn otherwise when later turns follow.
        """
        whole, loss = self._render(messages, False), []
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._render(messages[:number], True).text
            self._check_prefix(before, whole.text)
            alone = self._render(messages[: number + 1], False)
            common = len(os.path.commonprefix([alone.text, whole.text]))
            stop = self._stop(alone, len(before), message["content"])
            if stop > common:
                self._check_prefix(alone.text, whole.text)
            end = self._end(whole, stop, common)
            loss.append((len(before), stop if end is None else end + len(self.end)))
        return whole._replace(loss=tuple(loss))

    def content_of(self, text: str) -> str:
        """The content of a message that was sampled: without what the template writes before it."""
        return text.removeprefix(self.lead)

    def _stays(self, prompt: Prompt) -> bool:
        """Whether a prompt is a text in the template's form already."""
        return (
            self.name == HUMAN_ASSISTANT
            and isinstance(prompt, str)
            and "\n\nHuman:" in prompt
            and prompt.endswith("\n\nAssistant:")
        )

    def _found(self, text: str) -> tuple[tuple[int, int], ...]:
        return tuple(match.span() for match in self._special.finditer(text))

    def _render(self, messages: list[dict], prompted: bool) -> Rendered:
        """The text of some messages, for an answer to follow if `prompted`."""
        marked = self._write([self._marked(message) for message in messages], prompted)
        parts = _MARKED.split(marked)  # text, marked, text, …
        text, ordinary = "", []
        for number, part in enumerate(parts):
            part = part.replace(_MARKS[0], "").replace(_MARKS[1], "")
            if number % 2:
                ordinary.append((len(text), len(text) + len(part)))
            text += part
        return Rendered(text, tuple(ordinary))

    def _marked(self, value: Any) -> Any:
        """A message with marks around the text of special tokens."""
        if isinstance(value, str):
            if any(mark in value for mark in _MARKS):
                raise ValueError("a message must not hold the noncharacters U+FDD0 and U+FDD1")
            return self._special.sub(rf"{_MARKS[0]}\g<0>{_MARKS[1]}", value)
        if isinstance(value, dict):
            return {key: self._marked(part) for key, part in value.items()}
        return [self._marked(part) for part in value] if isinstance(value, list) else value

    def _stop(self, whole: Rendered, start: int, content: str) -> int:
        """Where the content of a turn ends that begins at `start`; some templates strip it, some write it otherwise."""
        start += len(self.lead) if whole.text.startswith(self.lead, start) else 0
        for words in (content, content.strip()):
            if words.strip() and (found := whole.text.find(words, start)) >= 0:
                return found + len(words)
        end = self._end(whole, start, len(whole.text)) if content.strip() else start
        if end is None:
            raise ValueError(
                f"config.data.template must write what the assistant said, {content[:_SHOWN]!r}, and wrote "
                f"{whole.text[start : start + _SHOWN]!r}"
            )
        return end

    def _end(self, whole: Rendered, start: int, stop: int) -> int | None:
        """Where the template ends a turn between two places of its text; None where it does not."""
        while self.end and (found := whole.text.find(self.end, start, stop)) >= 0:
            if not any(first <= found < last for first, last in whole.ordinary):
                return found
            start = found + 1
        return None

    def _check_prefix(self, before: str, whole: str) -> None:
        """Refuses a template that writes the beginning of a dialogue otherwise when more follows."""
        if whole.startswith(before):
            return
        first = max(0, len(os.path.commonprefix([before, whole])) - _SHOWN // 2)
        shown = [repr(text[first : first + _SHOWN]) + "…" * (len(text) > first + _SHOWN) for text in (before, whole)]
        raise ValueError(
            f"config.data.template must write a dialogue alike when later turns follow, got {shown[0]} (character "
            f"{first} on), then {shown[1]}: give each answer as a record of its own (messages and completion), or take "
            "another template"
        )


def make(chat: Chat, pretrained, name: str, special: Sequence[str], others: Sequence[str]) -> Template:
    """The template, once it has been tried on a question and its answer.

    Args:
      pretrained: the tokenizer, of transformers; its template becomes this one, so that an export has it.
      name: of the tokenizer, for an error.
      special, others: the texts of its special tokens, and of other added ones.

    Raises:
      ValueError: a program that is none, or that does not write an answer behind its question.
    """

    def run(messages: list[dict], prompted: bool) -> str:
        try:
            return pretrained.apply_chat_template(
                messages, chat_template=program, tokenize=False, add_generation_prompt=prompted
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"config.data.template refuses the messages ({' '.join(str(error).split())}): change the record or "
                "take another template"
            ) from None

    jinja = source(chat.template, pretrained.chat_template, name)
    pretrained.chat_template = jinja
    template, date = chat.template, datetime.date.fromisoformat(chat.day or today())
    program = _TODAY.sub(lambda match: repr(date.strftime(match["format"])), jinja)
    kind = HUMAN_ASSISTANT if template == HUMAN_ASSISTANT else OWN
    bare = Template(kind, jinja, "", "", run, _any_of(special))
    turns = [{"role": "user", "content": "A question"}, {"role": ASSISTANT, "content": _PROBE}]
    while True:
        try:
            before, whole = run(turns[:1], True), run(turns, False)
            bare._check_prefix(before, whole)
            break
        except ValueError as error:
            lacks = _LACKS.search(str(error))  # a field of messages, which the records may have
            if not lacks or lacks[1] in turns[0]:
                raise ValueError(
                    f"config.data.template={template!r} cannot write a question and its answer: {error}"
                ) from None
            turns = [turn | {lacks[1]: ""} for turn in turns]
    lead, said, tail = whole[len(before) :].partition(_PROBE)
    if not said:
        raise ValueError(f"config.data.template={template!r} must write what the assistant said, got {whole!r}")
    end = _any_of([text for text in (*special, *others) if text.strip()]).search(tail)
    if not end:
        return dataclasses.replace(bare, lead=lead)
    return dataclasses.replace(bare, lead=lead, end=end[0], _special=_any_of([*special, end[0]]))


def today() -> str:
    """YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def _messages(prompt: Prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _any_of(texts: Sequence[str]) -> re.Pattern:
    """Matches any of some texts, the longest first; nothing where there are none."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
