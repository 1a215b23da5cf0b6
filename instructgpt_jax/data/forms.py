"""Rows in the forms that people publish, as the records that `data/schema.py` describes.

| a row has | its record has |
|---|---|
| `prompt` as a list of messages | `messages` |
| `completion` as one message of the assistant, or `completions` as several | their texts |
| `chosen` and `rejected`, as texts or lists of messages | `completions` [chosen, rejected] and `ranking` [1, 2] |

A message is `{"role": …, "content": …}`. Messages may also stand as lists in one object, as columns of some data sets
store them: `{"role": […], "content": […]}`.

`chosen` and `rejected` are read where a kind lacks fields of its own: as comparisons both, as demonstrations the chosen
one, as prompts what both answer. That is:

* For lists of messages the `prompt`, else the messages that both begin with. Each goes on with one message of the
  assistant. A `prompt` that is a text repeats one of the shared messages; where `chosen` and `rejected` are the two
  answers alone, it is the user's message.
* For texts the `prompt` or `messages`. Without either, in Anthropic's form, the texts up to the last "\\n\\nAssistant:"
  that they share; what the answers share behind it is theirs.
* For other texts without a prompt what they share, up to a word that they do not share whole, and without the space in
  front of it: answers then begin with whole tokens. (TRL's `extract_prompt` cuts at the first letter that differs.)

Where the two answers are equal, neither is better: such comparisons are left out and counted, they are not bad records.
All other fields (`margin`, `score_chosen`, …) pass through untouched.
"""

import itertools
import os
from typing import Any

from instructgpt_jax.data.schema import ASSISTANT, Record

EQUAL = "chosen equal to rejected"
_FIELDS = ("prompt", "messages", "completion", "completions", "chosen", "rejected")
_OWN = {  # fields of a kind for which it does not look at `chosen` and `rejected`
    "demonstrations": ("completion", "messages"),
    "comparisons": ("completions",),
    "prompts": ("messages",),
    "tasks": ("choices",),
}
_TURN = "\n\nAssistant:"  # of the dialogues of github.com/anthropics/hh-rlhf


def understood(row: Record, kind: str) -> tuple[Record, str]:
    """A row as a record of `kind`, for `schema.validate` to judge, and why it is left out, "" where it is not.

    Args:
      row: as it was read; it is not changed, and is itself returned where it is in our form already.
      kind: one of `schema.KINDS`.

    Raises:
      ValueError: what the row means cannot be told; the text says why.
    """
    if kind == "pretraining" or _is_ours(row):
        return row, ""
    if all(row.get(name) is None for name in ("prompt", "messages", "chosen")):
        return row, ""  # schema.py says what it lacks
    record = {name: value for name, value in row.items() if name not in _FIELDS or value is not None}
    for name in _FIELDS:
        if isinstance(record.get(name), dict):
            record[name] = _list_of(record[name])
    chosen, why = record.get("chosen"), ""
    asked = kind == "prompts" and isinstance(record.get("prompt"), str) and not _is_messages(chosen)
    if chosen is not None and "rejected" in record and not asked and record.keys().isdisjoint(_OWN[kind]):
        record, why = _pair(record, kind)
    return _dialogue(record), why


def _is_ours(row: Record) -> bool:
    """Whether a row has a text as its prompt and texts behind it, as all records without messages do."""
    if not isinstance(row.get("prompt"), str) or not row.keys().isdisjoint(("messages", "chosen", "rejected")):
        return False
    completions = row.get("completions")
    first = completions[0] if isinstance(completions, list) and completions else ""
    return not isinstance(row.get("completion"), list | dict) and not isinstance(first, list | dict)


def _dialogue(record: Record) -> Record:
    """The record with a text as its prompt or with messages, not both, and with texts as what follows them."""
    prompt, messages = record.get("prompt"), record.get("messages")
    answers = {}
    if "completion" in record and _is_messages(record["completion"]):
        answers["completion"] = _answer(record["completion"], "completion")
    if "completions" in record and _is_listed(record["completions"]):
        answers["completions"] = [
            _answer(_list_of(one), f"completions[{k}]") for k, one in enumerate(record["completions"])
        ]
    if _is_messages(messages):
        if _is_messages(prompt) and messages[: len(prompt)] != prompt:
            raise ValueError("messages must begin with those of prompt where a record has both, they differ")
        if isinstance(prompt, str):
            _check_among(prompt, messages, "messages")
    elif _is_messages(prompt):
        messages = prompt
    elif answers and isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if not _is_messages(messages):
        return record | answers
    return {name: value for name, value in record.items() if name != "prompt"} | {"messages": messages} | answers


def _pair(record: Record, kind: str) -> tuple[Record, str]:
    """The record with what its `chosen` and `rejected` are for the kind, and why it is left out."""
    rest = {name: value for name, value in record.items() if name not in ("chosen", "rejected")}
    chosen, rejected = record["chosen"], record["rejected"]
    why = EQUAL if chosen == rejected and kind == "comparisons" else ""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in rest and "messages" not in rest:
            if chosen == rejected and _TURN not in chosen:
                rest["prompt"], why = chosen, EQUAL  # where its prompt ends cannot be told, but it need not be
            else:
                rest["prompt"], chosen, rejected = _cut(chosen, rejected)
    elif _is_messages(chosen) and _is_messages(rejected):
        opening, chosen, rejected = _continued(rest, chosen, rejected)
        rest = {name: value for name, value in rest.items() if name != "prompt"} | {"messages": opening}
    else:
        raise ValueError(
            "chosen and rejected must both be texts or both lists of messages, got "
            f"{type(chosen).__name__} and {type(rejected).__name__}"
        )
    if kind == "comparisons":
        return rest | {"completions": [chosen, rejected], "ranking": [1, 2]}, why
    return rest | ({"completion": chosen} if kind == "demonstrations" else {}), why


def _cut(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt that two texts share, and what each goes on with."""
    shared = os.path.commonprefix([chosen, rejected])
    cut = shared.rfind(_TURN)
    if cut >= 0:
        cut += len(_TURN)
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if _TURN in chosen or _TURN in rejected:
        raise ValueError("chosen and rejected must share the turns up to an '\\n\\nAssistant:', they differ before")
    cut = len(shared)
    if cut in (len(chosen), len(rejected)):
        raise ValueError("chosen and rejected must have a prompt beside them where one is the beginning of the other")
    inside = chosen[cut].isalnum() or rejected[cut].isalnum()
    while cut and inside and shared[cut - 1].isalnum():
        cut -= 1
    cut -= shared[:cut].endswith(" ")
    if not cut:
        raise ValueError("chosen and rejected must begin with the same prompt, or have a prompt beside them")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _continued(rest: Record, chosen: list, rejected: list) -> tuple[list, str, str]:
    """The messages that two dialogues share, and the text that each goes on with.

    Args:
      rest: the other fields of the record.
    """
    prompt, messages = rest.get("prompt"), rest.get("messages")
    copied = messages in (chosen, rejected)  # some sets repeat the chosen dialogue for fine-tuning
    opening = prompt if _is_messages(prompt) else None if copied else messages
    if opening is None:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        opening = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if not _is_messages(opening):
        if not isinstance(prompt, str):
            raise ValueError("chosen and rejected must begin with the same messages, or have a prompt beside them")
        opening = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, str):
        _check_among(prompt, opening, "the messages that chosen and rejected share")
    if _is_messages(messages) and not copied and messages != opening:
        raise ValueError("messages must be those of prompt, or of chosen, where a record has them all, they differ")
    count = len(opening)
    whole = chosen[:count] == rejected[:count] == opening
    answers = [
        _answer(one[count:] if whole else one, f"{name}, behind the messages that both share,")
        for name, one in (("chosen", chosen), ("rejected", rejected))
    ]
    return opening, *answers


def _check_among(prompt: str, messages: list, where: str) -> None:
    """Refuses a text beside messages that is not the text of one of them."""
    texts = [message.get("content") for message in messages if isinstance(message, dict)]
    if prompt.strip() not in [text.strip() for text in texts if isinstance(text, str)]:
        raise ValueError(f"prompt must be the text of one of {where} where a record has both, got {prompt[:60]!r}")


def _answer(messages: Any, name: str) -> str:
    """The text of a list of one message of the assistant, or of a text."""
    if isinstance(messages, str):
        return messages
    roles = [message.get("role") if isinstance(message, dict) else message for message in messages]
    if roles != [ASSISTANT]:
        raise ValueError(f"{name} must be one message of the assistant, got {str(roles)[:60]}")
    return messages[0].get("content")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_listed(value: Any) -> bool:
    """Whether something is a list whose first part is messages rather than a text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], list | dict)


def _list_of(value: Any) -> Any:
    """An object that is one message, or lists of the parts of several, as a list of messages; all else as it is."""
    if not isinstance(value, dict):
        return value
    role, content = value.get("role"), value.get("content")
    if isinstance(role, list) and isinstance(content, list) and len(role) == len(content):
        names = [name for name, parts in value.items() if isinstance(parts, list) and len(parts) == len(role)]
        return [dict(zip(names, parts, strict=True)) for parts in zip(*(value[name] for name in names), strict=True)]
    return [value]
