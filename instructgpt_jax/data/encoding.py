"""Records into token sequences: encoded once, checked against the row, kept in memory (or, for text, in a mapped file).

Encoding everything before training starts costs seconds a run (a million tokens a second on two cores) and buys random
access, exact epochs, and every complaint about the data before any compute is spent. Of several processes each encodes
its slice of the records and gets those of the others; text for pretraining may have been encoded before (`tokens:`).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from instructgpt_jax import process
from instructgpt_jax.data import chats, documents, packing, sources, tokens

_CHUNK = 1024  # records encoded at once


class Allowed(NamedTuple):
    """Which records may be left out: `config.data` says it."""

    max_prompt_tokens: int  # longer prompts are (the paper, appendix C: 1,024); 0 keeps all
    skip_bad: int  # bad records that may be, those that `sources.load` left out among them
    skip_long: bool = False  # those that are too long for a row are, however many; else they are bad records


class TooLong(ValueError):
    """A record that is good, but does not fit the rows that it is to be read in."""


class Encoded(NamedTuple):
    """The examples of a data set that can be trained on."""

    examples: Sequence  # packing.Example, packing.Comparison or (length,) int32 arrays
    records: np.ndarray  # (examples,) int64, the record each example was made of
    parts: tuple[tuple[int, float | None], ...]  # (number of examples, weight) of each source, in order
    left_out: dict[str, int]  # reason -> number of records left out
    groups: tuple[str, ...] = ()  # of comparisons: names of the labeler groups, which `Comparison.group` indexes
    num_records: int = 0  # that it was made of, those that were left out included
    skipped: int = 0  # bad records that `sources.load` had left out before
    fingerprint: str = ""  # of the examples in their order


def demonstrations(records, tokenizer, allowed: Allowed, *, row_length: int, loss_on_prompt: bool) -> Encoded:
    """prompt + completion + its end as `packing.Example`s; the prompt is no loss token unless `loss_on_prompt`.

    Whole dialogues are `packing.Dialogue`s with the assistant's turns as loss tokens, each with its end.
    """
    end = np.array([tokenizer.end_id], np.int32)

    def texts(record):
        if "completion" not in record:
            return [tokenizer.dialogue(record["messages"])]
        prompt = chats.prompt_of(record)
        return [tokenizer.prompt(prompt), tokenizer.answer(prompt, record["completion"])]

    def example(record, prompt, *completion):
        if not completion:
            tokens, loss = prompt
            first = int(np.argmax(loss))
            _check_fits(first, len(tokens) - first, row_length)
            whole = packing.Dialogue(tokens, loss)
        else:
            tokens, first = np.concatenate([prompt, *completion, end]), len(prompt)
            _check_fits(len(prompt), len(completion[0]) + 1, row_length)
            whole = packing.Example(tokens, first)
        return packing.Example(tokens, 1) if loss_on_prompt else whole

    return _encode(records, tokenizer, allowed, texts, example)


def comparisons(
    records,
    tokenizer,
    allowed: Allowed,
    *,
    row_length: int,
    process_rows: int,
    max_completions: int,
    shared_prompt: bool,
) -> Encoded:
    """`packing.Comparison`s of the completions as `completions` has them; prompts with all tied are left out."""

    def texts(record):
        return [tokenizer.prompt(chats.prompt_of(record)), *_unsampled(record, tokenizer)]

    def example(record, prompt, *encoded):
        completions = _as_sampled(record, encoded, tokenizer)
        if len(set(record["ranking"])) < 2:
            return "all completions tied"
        if len(completions) > max_completions:
            raise ValueError(f"max_completions={max_completions} must be at least its {len(completions)} completions")
        lengths = [len(completion) for completion in completions]
        _check_fits(len(prompt), max(lengths), row_length)
        rows = packing.rows_of_comparison(len(prompt), lengths, row_length, shared_prompt)
        if rows > process_rows:
            raise TooLong(
                f"microbatch_rows must give a process at least the {rows} rows of {row_length} tokens that the "
                f"comparison takes, got {process_rows}"
            )
        return packing.Comparison(prompt, completions, record["ranking"], group_name(record))

    met = {}  # name -> number in the order of arrival

    def numbered(examples):
        return [e._replace(group=met.setdefault(e.group, len(met)) if e.group else -1) for e in examples]

    encoded = _encode(records, tokenizer, allowed, texts, example, numbered)
    names = sorted(met)
    places = {number: names.index(name) for name, number in met.items()} | {-1: -1}
    examples = [example._replace(group=places[example.group]) for example in encoded.examples]
    return encoded._replace(examples=examples, groups=tuple(names))


def completions(records: Sequence[dict], tokenizer) -> list[list[np.ndarray]]:
    """The completions of comparisons as a policy wrote them and as PPO scores them, (length,) int32 each.

    The tokens are those that were sampled, where the record keeps `tokens` of this very tokenizer, else those of the
    text. The tokenizer's `end_id` stands behind a completion that ended: all of a record do, unless its `ended` says
    otherwise.
    """
    texts = [_unsampled(record, tokenizer) for record in records]
    encoded = iter(tokenizer.encode([text for group in texts for text in group]))
    return [
        _as_sampled(record, [next(encoded) for _ in group], tokenizer)
        for record, group in zip(records, texts, strict=True)
    ]


def that_fit(records, tokenizer, longest: int):
    """The comparisons whose prompt with each of its completions has at most `longest` tokens, as `sources.Records`."""
    chosen = list(records)
    asked = [len(prompt) for prompt in tokenizer.encode_prompts([tokenizer.prompt(chats.prompt_of(r)) for r in chosen])]
    said = [max(map(len, group)) for group in completions(chosen, tokenizer)]
    kept = records.subset(np.array(asked, int) + np.array(said, int) <= longest)
    if len(kept) < len(records):
        too_long = {f"longer than {longest} tokens": len(records) - len(kept)}
        kept.left_out = records.left_out | too_long
    return kept


def _unsampled(record: dict, tokenizer) -> list:
    """The completions to encode of one comparison: none where it keeps their tokens."""
    if record.get("tokens") is not None and record["tokenizer"] == tokenizer.hash:
        return []
    prompt, texts = chats.prompt_of(record), record["completions"]
    return [tokenizer.answer(prompt, text, done) for text, done in zip(texts, _ended(record), strict=True)]


def _ended(record: dict) -> list[bool]:
    return record.get("ended") or [True] * len(record["completions"])


def _as_sampled(record: dict, encoded: Sequence[np.ndarray], tokenizer) -> list[np.ndarray]:
    """The completions of one comparison, see `completions`; `encoded` are those of `_unsampled`."""
    if not encoded:
        encoded = [np.array(ids, np.int32) for ids in record["tokens"]]
        largest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
        if largest >= tokenizer.vocab_size:
            raise ValueError(f"tokens must be ids of the tokenizer, below {tokenizer.vocab_size}, got {largest}")
    end = np.array([tokenizer.end_id], np.int32)
    return [np.concatenate([ids, end]) if done else ids for ids, done in zip(encoded, _ended(record), strict=True)]


def group_name(record: dict) -> str:
    """The labeler group of a comparison, '' where it carries none.

    Raises:
      ValueError: `group` is neither a string nor an integer.
    """
    group = record.get("group")
    if group is None:
        return ""
    if not isinstance(group, str | int) or isinstance(group, bool):
        raise ValueError(f"group must be a string or an integer, got {group!r}")
    return str(group)


def prompts(records, tokenizer, allowed: Allowed, *, max_prompt_length: int) -> Encoded:
    """Each prompt as a (length,) int32 array."""

    def example(record, prompt):
        if len(prompt) > max_prompt_length:
            raise ValueError(
                f"a prompt must have at most max_prompt_length={max_prompt_length} tokens, got {len(prompt)}"
            )
        return prompt

    return _encode(records, tokenizer, allowed, lambda record: [tokenizer.prompt(chats.prompt_of(record))], example)


def _check_fits(prompt: int, completion: int, row_length: int) -> None:
    if prompt + completion > row_length:
        raise TooLong(
            f"prompt and completion must fit row_length={row_length} tokens, got {prompt} + {completion} with EOS"
        )


def _encode(
    records, tokenizer, allowed: Allowed, texts: Callable, example: Callable, finished: Callable = list
) -> Encoded:
    """Encodes all records, each process a slice of them.

    Args:
      records: `sources.Records`.
      texts: record -> its texts, the prompt first, as the tokenizer's `prompt` and `answer` have them, or a whole
        dialogue alone; raises ValueError for a bad record.
      example: (record, tokens of each text; of a dialogue with its loss tokens) -> an example, or the reason why the
        record is no use; raises ValueError for a bad record.
      finished: all examples -> the same, where one hangs on those before it.
    """
    index, count = jax.process_index(), jax.process_count()
    low, high = (number * len(records) // count for number in (index, index + 1))
    slices = process.gathered(_encode_slice(records, range(low, high), tokenizer, allowed, texts, example))
    examples, kept, bad = ([one for part in slices for one in part[field]] for field in range(3))
    examples, left_out = finished(examples), dict(records.left_out)
    for *_, found in slices:
        for why, number in found.items():
            left_out[why] = left_out.get(why, 0) + number
    if bad:
        sources.refuse_or_list([*records.skipped, *bad], allowed.skip_bad)
    if not examples:
        raise ValueError(f"the data must have at least one usable record, got none of {len(records)}: {left_out}")
    kept = np.array(kept, np.int64)
    ends = np.cumsum([len(part) for part in records.parts])
    counts = np.diff(np.searchsorted(kept, ends), prepend=0)
    parts = tuple((int(count), part.weight) for count, part in zip(counts, records.parts, strict=True))
    return Encoded(
        examples,
        kept,
        parts,
        left_out | ({"bad": len(bad)} if bad else {}),
        num_records=len(records) + sum(records.left_out.values()),
        skipped=len(records.skipped),
        fingerprint=fingerprint([examples, [count for count, _ in parts]]),
    )


def _encode_slice(
    records, numbers: range, tokenizer, allowed: Allowed, texts: Callable, example: Callable
) -> tuple[list, list[int], list[str], dict[str, int]]:
    """Examples, the numbers of their records, bad records, and reason -> number left out, of some of the records."""
    examples, kept, bad, left_out = [], [], [], {}
    for first in numbers[::_CHUNK]:
        chunk, texts_of = [], []
        for number in range(first, min(first + _CHUNK, numbers.stop)):
            record = records[number]
            try:
                texts_of.append(texts(record))
                chunk.append((number, record))
            except ValueError as error:
                bad.append(f"{records.origin(number)}: {error}")
        for (number, record), (prompt, *rest) in zip(chunk, _ids(tokenizer, texts_of), strict=True):
            length = int(np.argmax(prompt[1])) if isinstance(prompt, tuple) else len(prompt)
            if allowed.max_prompt_tokens and length > allowed.max_prompt_tokens:
                made = f"prompt longer than {allowed.max_prompt_tokens} tokens"
            elif not length:
                bad.append(f"{records.origin(number)}: prompt must have at least one token")
                continue
            else:
                try:
                    made = example(record, prompt, *rest)
                except TooLong as error:
                    if not allowed.skip_long:
                        bad.append(f"{records.origin(number)}: {error}")
                        continue
                    made = "too long for row_length and microbatch_rows"
                except ValueError as error:
                    bad.append(f"{records.origin(number)}: {error}")
                    continue
            if isinstance(made, str):
                left_out[made] = left_out.get(made, 0) + 1
            else:
                examples.append(made)
                kept.append(number)
    return examples, kept, bad, left_out


def _ids(tokenizer, texts_of: Sequence[list]) -> Iterator[list]:
    """The ids of each group of texts, see `_encode`."""
    whole = [bool(group) and getattr(group[0], "loss", ()) != () for group in texts_of]
    dialogues = [group[0] for group, alone in zip(texts_of, whole, strict=True) if alone]
    others = [group for group, alone in zip(texts_of, whole, strict=True) if not alone]
    turns = iter(tokenizer.encode_dialogues(dialogues) if dialogues else ())
    begun = iter(tokenizer.encode_prompts([group[0] for group in others]))
    tokens = iter(tokenizer.encode([text for group in others for text in group[1:]]))
    for group, alone in zip(texts_of, whole, strict=True):
        yield [next(turns)] if alone else [next(begun), *(next(tokens) for _ in group[1:])]


def fingerprint(value) -> str:
    """A hash of nested sequences of arrays, numbers and strings, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, np.ndarray):
            digest.update(b"%s %d " % (item.dtype.str.encode(), item.size))
            digest.update(np.ascontiguousarray(item))
        elif isinstance(item, list | tuple) and not all(isinstance(part, int) for part in item):
            digest.update(b"( %d " % len(item))
            waiting.extend(reversed(item))
        else:
            digest.update(repr(item).encode() + b" ")
    return digest.hexdigest()


def pretraining(records, tokenizer, *, row_length: int, cache_dir: str) -> Encoded:
    """Documents joined by EOS and cut every `row_length` tokens, as GPT-3 was trained (Brown et al. 2020, appendix B).

    A sequence may begin and end inside a document and hold several, which see each other. The tail of a source that
    does not fill a sequence is left out; sources with weights are cut apart, sources without as one.

    Args:
      records: `sources.Records`, or a `tokens.Corpus`, which is only read.
      cache_dir: folder of encoded text, found again by its contents and the tokenizer; empty: in memory, encoded anew.
    """
    weighted = records.parts[0].weight is not None
    texts = records.parts if weighted else [records]
    streams = [documents.stream(text, tokenizer, cache_dir) for text in texts]
    sequences = tokens.Sequences(streams, row_length)
    for text, stream, count in zip(texts, streams, sequences.counts, strict=True):
        if not count:
            raise ValueError(
                f"pretraining text must fill at least one sequence of row_length={row_length} tokens, "
                f"got {len(stream)} from {text.origin(0)} on"
            )
    parts = tuple((count, text.weight) for count, text in zip(sequences.counts, texts, strict=True))
    return Encoded(
        sequences,
        np.broadcast_to(np.int64(-1), len(sequences)),
        parts,
        {},
        num_records=len(records),
        skipped=len(records.skipped),
        fingerprint=fingerprint([getattr(stream, "identity", stream) for stream in streams]),
    )
