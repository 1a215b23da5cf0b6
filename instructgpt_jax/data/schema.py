"""What a record of each kind must look like, and one clear reason when it does not.

| kind | required fields |
|---|---|
| demonstrations | `prompt` str, `completion` str; or `messages` alone that end with the assistant's turn |
| comparisons | `prompt` str, `completions` list of K >= 2 str, `ranking` list of K ranks |
| answers | `prompt` str, `completions` list of K >= 2 str; to be ranked by people, see `labeling/` |
| ratings | `prompt` str, `answer` str, and at least one of the grades below |
| prompts | `prompt` str |
| pretraining | `text` str |
| tasks | `prompt` str, `choices` list of at least 2 str, `answer` the number of the right one, from 0 |
| few_shot | `instruction` str, `pairs` list of at least 2 pairs [query, response] of str |

In each of these `messages` may stand in place of `prompt`: the dialogue so far, a list of `{"role": str, "content":
str}` that does not end with the assistant's turn. Other fields of a message are the template's (data/templates.py). A
demonstration without a `completion` is a whole dialogue: it ends with the assistant's turn, and each of the assistant's
turns is one that is demonstrated. Such a record is a prompt too, which asks for that last turn.

A comparison may say how its completions came about, as `collect` writes it: `ended`, a list of K bool, false for an
answer that was cut before its end of text (without the field all ended); `tokens`, K lists of the ids that were
sampled, the end of text not among them, with `tokenizer`, the hash of the tokenizer that they belong to. Answers and
comparisons may also say by `policies`, a list of K str, who wrote them.

A rating of an answer has `rating` (1 to 7), `fields` (name -> true, false, or null where it does not apply), `toxicity`
(0 to 2), `relative_toxicity` (-1 to 1) or `continuity` (1 to 7), see `labeling/`.

Any other field passes through untouched; `user` (who wrote the prompt) must be a string or an integer where there is
one.

Ranks: 1 is the best, equal ranks are ties. Only their order matters, so dense ranks (1, 2, 2, 3) and ranks with gaps
(1, 3, 3 or 1, 1, 3) are both fine, but each lies in 1..K and one of them is 1. A ranking that breaks this was damaged,
or lost a completion, or is a list of scores: none of the three can be trained on, so it is refused.

Text is what UTF-8 can hold: half of a surrogate pair, which JSON can spell, is refused in every field and every name.

Empty strings: a completion of a comparison may be empty (models do answer nothing, and labelers rank it), every other
text may not. Of messages those of the user and of the assistant may not, others, such as a system message, may.
"""

import json
import re
from typing import Any

ASSISTANT = "assistant"  # the role whose turns are demonstrated, compared and sampled
KINDS = ("demonstrations", "comparisons", "answers", "ratings", "prompts", "pretraining", "tasks", "few_shot")
GRADES = {"rating": (1, 7), "toxicity": (0, 2), "relative_toxicity": (-1, 1), "continuity": (1, 7)}  # of ratings

Record = dict[str, Any]
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON spells one: only such a line can hold half of a pair


def parse_line(line: bytes) -> Record:
    """One line of a JSONL file as a dict.

    Raises:
      ValueError: not UTF-8, not JSON (NaN and Infinity are not), not an object, or with half of a surrogate pair; the
        text says which.
    """
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            raise ValueError(f"a record must be a JSON object, got {type(record).__name__}")
        if _SURROGATE.search(line):
            _check_texts(record, "")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    return record


def _refuse_constant(name: str):
    raise ValueError(f"invalid JSON: {name} is not a JSON value")


def validate(record: Record, kind: str) -> None:
    """Checks one record of `kind` (one of `KINDS`).

    Raises:
      ValueError: names the field, what it must be, and what it is.
    """
    if kind == "demonstrations":
        whole = "messages" in record and "completion" not in record
        _check_prompt(record, answered=whole)
        if not whole:
            _check_text(record, "completion")
    elif kind == "comparisons":
        _check_prompt(record)
        _check_comparison(record)
    elif kind == "answers":
        _check_prompt(record)
        _check_answers(record)
    elif kind == "ratings":
        _check_text(record, "prompt")
        _check_rating(record)
    elif kind == "prompts":
        _check_prompt(record, answered=None)
    elif kind == "pretraining":
        _check_text(record, "text")
    elif kind == "tasks":
        _check_prompt(record)
        _check_choices(record)
    elif kind == "few_shot":
        _check_text(record, "instruction")
        _check_pairs(record)
    else:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    user = record.get("user")
    if user is not None and (not isinstance(user, (str, int)) or isinstance(user, bool)):
        raise ValueError(f"user must be a string or an integer, got {short(user)}")


def _check_prompt(record: Record, answered: bool | None = False) -> None:
    """A `prompt`, or `messages` whose last is the assistant's turn if `answered`, another's if not; None: either."""
    if "messages" not in record:
        return _check_text(record, "prompt")
    if "prompt" in record:
        raise ValueError("a record must have prompt or messages, got both: leave one out")
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of at least one message, got {short(messages)}")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{k}] must be an object with role and content, got {short(message)}")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"messages[{k}] must have the field {field!r}, got {sorted(message)}")
            _check_string(message[field], f"messages[{k}].{field}")
        if not message["role"] or not message["content"] and message["role"] in ("user", ASSISTANT):
            raise ValueError(
                f"messages[{k}] must have a role, and as the user's or the assistant's turn a text, got "
                f"{short(message)}: cut the dialogue before it"
            )
    last = messages[-1]["role"]
    if last == messages[0]["role"] == ASSISTANT:
        raise ValueError("messages must begin with another's turn, got role 'assistant': leave that turn out")
    if answered and last != ASSISTANT:
        raise ValueError(
            f"messages must end with the assistant's turn, got role {last!r}: cut the dialogue there, or give the "
            "answer as completion"
        )
    if answered is False and last == ASSISTANT:
        raise ValueError(
            "messages must end with another's turn for the assistant to answer, got role 'assistant': cut the dialogue "
            "before it"
        )


def _check_text(record: Record, field: str) -> None:
    if field not in record:
        raise ValueError(f"missing field {field!r}, the record has {sorted(record)}")
    _check_filled(record[field], field)


def _check_string(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {short(text)}")


def _check_filled(text: Any, name: str) -> None:
    _check_string(text, name)
    if not text:
        raise ValueError(f"{name} must not be empty")


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: half of a surrogate pair is no text, and no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_texts(value: Any, name: str) -> None:
    """Refuses half of a surrogate pair in any string of a value of JSON, and in any field's name."""
    half = "holds half of a surrogate pair, which is not text"
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError(f"{name} {half}")
    elif isinstance(value, list):
        for k, part in enumerate(value):
            _check_texts(part, f"{name}[{k}]")
    elif isinstance(value, dict):
        for field, part in value.items():
            if not is_text(field):
                raise ValueError(f"the name of field {field!r} {half}")
            _check_texts(part, f"{name}.{field}" if name else field)


def _check_comparison(record: Record) -> None:
    _check_lists(record, "completions", "ranking")
    completions, ranking = record["completions"], record["ranking"]
    _check_completions(completions)
    if len(ranking) != len(completions):
        raise ValueError(f"ranking must give one rank for each of {len(completions)} completions, got {len(ranking)}")
    for k, rank in enumerate(ranking):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"ranking[{k}] must be a positive integer (1 = best), got {short(rank)}")
    if min(ranking) != 1 or max(ranking) > len(ranking):
        raise ValueError(f"ranking must lie in 1..{len(ranking)} and hold a 1 (the best), got {short(ranking)}")
    _check_sampled(record, len(completions))


def _check_answers(record: Record) -> None:
    _check_lists(record, "completions")
    _check_completions(record["completions"])
    check_policies(record, len(record["completions"]))
    _check_sampled(record, len(record["completions"]))


def check_policies(record: Record, count: int) -> None:
    """`policies`, who wrote which of `count` completions, where it is there."""
    policies = record.get("policies")
    if policies is not None:
        if not isinstance(policies, list) or len(policies) != count or not all(isinstance(x, str) for x in policies):
            raise ValueError(f"policies must be a list of {count} names, one a completion, got {short(policies)}")


def _check_rating(record: Record) -> None:
    if "answer" not in record:
        raise ValueError(f"missing field 'answer', the record has {sorted(record)}")
    _check_string(record["answer"], "answer")
    given = [name for name in (*GRADES, "fields") if record.get(name) is not None]
    if not given:
        raise ValueError(f"a rating must have one of {(*GRADES, 'fields')}, got {sorted(record)}")
    for name in given:
        value = record[name]
        if name == "fields":
            if not isinstance(value, dict) or not all(x is None or isinstance(x, bool) for x in value.values()):
                raise ValueError(f"fields must be an object with true, false or null, got {short(value)}")
        elif not isinstance(value, int) or isinstance(value, bool) or not GRADES[name][0] <= value <= GRADES[name][1]:
            low, high = GRADES[name]
            raise ValueError(f"{name} must be an integer from {low} to {high}, got {short(value)}")


def _check_lists(record: Record, *fields: str) -> None:
    for field in fields:
        if field not in record:
            raise ValueError(f"missing field {field!r}, the record has {sorted(record)}")
        if not isinstance(record[field], list):
            raise ValueError(f"{field} must be a list, got {short(record[field])}")


def _check_pairs(record: Record) -> None:
    _check_lists(record, "pairs")
    pairs = record["pairs"]
    good = all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs)
    if len(pairs) < 2 or not good:
        raise ValueError(f"pairs must be at least 2 pairs [query, response], got {short(pairs)}")
    for number, pair in enumerate(pairs):
        for k, text in enumerate(pair):
            _check_filled(text, f"pairs[{number}][{k}]")


def _check_completions(completions: list) -> None:
    if len(completions) < 2:
        raise ValueError(f"completions must hold at least 2 texts, got {len(completions)}")
    for k, completion in enumerate(completions):
        _check_string(completion, f"completions[{k}]")


def _check_sampled(record: Record, count: int) -> None:
    """`ended`, `tokens` and `tokenizer` of a comparison or of answers, where they are there."""
    ended, tokens = record.get("ended"), record.get("tokens")
    if ended is not None:
        if not isinstance(ended, list) or len(ended) != count or not all(isinstance(done, bool) for done in ended):
            raise ValueError(f"ended must be a list of {count} booleans, one a completion, got {short(ended)}")
    if tokens is not None:
        if not isinstance(tokens, list) or len(tokens) != count or not all(map(_is_ids, tokens)):
            raise ValueError(f"tokens must be {count} lists of token ids, one a completion, got {short(tokens)}")
        if not isinstance(record.get("tokenizer"), str):
            raise ValueError(f"tokenizer must be the hash that tokens belong to, got {record.get('tokenizer')!r}")
    for k, done in enumerate(ended or ()):
        if not done and not (record["completions"][k] and (tokens is None or tokens[k])):
            raise ValueError(f"completions[{k}] must have a token, since ended[{k}] is false, got none")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)


def _check_choices(record: Record) -> None:
    for field in ("choices", "answer"):
        if field not in record:
            raise ValueError(f"missing field {field!r}, the record has {sorted(record)}")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"choices must be a list of at least 2 texts, got {short(choices)}")
    for k, choice in enumerate(choices):
        _check_filled(choice, f"choices[{k}]")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be a number from 0 to {len(choices) - 1}, got {short(answer)}")


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
