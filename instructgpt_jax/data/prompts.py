"""From raw prompts to the paper's prompt sets (section 3.2, appendices A and C), as pure functions over records.

The stage `prompts` (`stages/prompts.py`) is their command. `prepare` runs the steps in the paper's order: drop prompts
that share a long prefix with an earlier one, keep at most 200 of a user, split by user, drop personal information from
the training split, drop prompts over 1,024 tokens. It returns the three splits and a report of what each step dropped.
What the paper leaves open is decided here: the length of the prefix, that the first prompt of a duplicate group and the
first 200 of a user stay, the shares of the splits.

A record is `{"prompt": str, "user": str | int (optional), ...}`; records are never changed. Each step returns the
records that stay, in their order. `messages` may stand for `prompt`: their text is then that of all turns, and what the
assistant said before is not looked at for personal information.
"""

import collections
import gzip
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import chats, pii
from instructgpt_jax.data.records import about
from instructgpt_jax.data.schema import ASSISTANT
from instructgpt_jax.splits import split_of

Record = dict[str, Any]
SPLITS = ("train", "valid", "test")
_CHUNK = 1_000  # texts given to `count_tokens` at once


class Prepared(NamedTuple):
    """The prompt sets of a run."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]
    report: dict[str, Any]


def deduplicate(records: Iterable[Record], prefix_chars: int) -> list[Record]:
    """Keeps the first of all prompts with the same first `prefix_chars` characters, and of equal shorter prompts.

    White space and case do not count. "Has the same prefix" is transitive, so one pass over a table of 16-byte digests
    does it: time and memory are linear.
    """
    if prefix_chars < 1:
        raise ValueError(f"prefix_chars must be at least 1, got {prefix_chars!r}")
    seen, kept = set(), []
    for record in records:
        digest = _prefix_digest(chats.named(record), prefix_chars)
        if digest not in seen:
            seen.add(digest)
            kept.append(record)
    return kept


def _prefix_digest(prompt: str, prefix_chars: int) -> bytes:
    prefix = " ".join(prompt.split()).casefold()[:prefix_chars]
    return hashlib.blake2b(prefix.encode(), digest_size=16).digest()


def cap_per_user(records: Iterable[Record], max_per_user: int) -> list[Record]:
    """Keeps the first `max_per_user` prompts of each user, and all prompts that name no user."""
    if max_per_user < 1:
        raise ValueError(f"max_per_user must be at least 1, got {max_per_user!r}")
    counts, kept = collections.Counter(), []
    for record in records:
        user = record.get("user")
        if user is not None:
            counts[str(user)] += 1
        if user is None or counts[str(user)] <= max_per_user:
            kept.append(record)
    return kept


def drop_pii(records: Iterable[Record]) -> tuple[list[Record], dict[str, int]]:
    """Drops prompts with personal information; also gives how many prompts held each kind of it (see `data/pii.py`)."""
    kept, kinds = [], collections.Counter()
    for record in records:
        found = {finding.kind for text in _written(record) for finding in pii.find(text)}
        kinds.update(found)
        if not found:
            kept.append(record)
    return kept, dict(kinds.most_common())


def _written(record: Record) -> list[str]:
    """What the user wrote: the prompt, or every message that is not the assistant's."""
    if "messages" not in record:
        return [record["prompt"]]
    return [message["content"] for message in chats.prompt_of(record) if message["role"] != ASSISTANT]


def drop_long(
    records: Sequence[Record], max_tokens: int, count_tokens: Callable[[list[str]], Sequence[int]]
) -> list[Record]:
    """Keeps prompts of at most `max_tokens` tokens; `count_tokens` gives the lengths of a list of texts.

    A token covers at least one byte of UTF-8 in every byte-level vocabulary, so only texts of more bytes are counted.
    """
    suspects = [i for i, record in enumerate(records) if len(chats.named(record).encode()) > max_tokens]
    long = set()
    for start in range(0, len(suspects), _CHUNK):
        chunk = suspects[start : start + _CHUNK]
        lengths = count_tokens([chats.named(records[i]) for i in chunk])
        long |= {i for i, length in zip(chunk, lengths, strict=True) if length > max_tokens}
    return [record for i, record in enumerate(records) if i not in long]


def language_shares(records: Sequence[Record], sample: int) -> dict[str, float]:
    """Share of each language (ISO 639 code) among `sample` evenly spaced prompts, largest first.

    By py3langid, the maintained form of the classifier that the paper used (appendix A.4: 96 % English).
    """
    import py3langid  # loads its model of 5 MB, which nothing else needs

    step = max(1, len(records) // sample)
    texts = [chats.named(record) for record in records[::step][:sample]]
    counts = collections.Counter(py3langid.classify(text)[0] for text in texts)
    return {language: count / len(texts) for language, count in counts.most_common()}


def few_shot(record: Record, example: str, shots: int, shot_sets: int) -> list[Record]:
    """One instruction with K query/response pairs as demonstrations, each pair with others as its context (A.1, A.3).

    Args:
      record: `{"instruction": str, "pairs": [[query, response], …]}`; other fields go into each demonstration.
      example: how a pair is written, e.g. "Input: {query}\nOutput: {response}"; must end in `{response}`.
      shots: pairs that stand before the query; 0 = the K - 1 others in their order, which is one set.
      shot_sets: different sets of shots that a pair is shown after. They follow from the instruction and the pair.

    Returns:
      Up to K x `shot_sets` records (as many sets as differ) with `prompt` (instruction, the shots, the query) and
      `completion`.
    """
    if "{query}" not in example or not example.endswith("{response}"):
        raise ValueError(f"example must hold {{query}} and end in {{response}}, got {example!r}")
    question = example.removesuffix("{response}")
    # A space before the response belongs to its first token, and so to the completion.
    stem, gap = question.rstrip(" "), question[len(question.rstrip(" ")) :]
    rest = {field: value for field, value in record.items() if field not in ("instruction", "pairs")}
    demonstrations = []
    for k, (query, response) in enumerate(record["pairs"]):
        others = [pair for j, pair in enumerate(record["pairs"]) if j != k]
        for chosen in _shot_sets(len(others), shots, shot_sets, f"{record['instruction']}\0{query}"):
            written = [_fill(example, *others[j]) for j in chosen]
            prompt = "\n\n".join([record["instruction"], *written, _fill(stem, query, "")])
            demonstrations.append(rest | {"prompt": prompt, "completion": gap + response})
    return demonstrations


def _shot_sets(count: int, shots: int, wanted: int, key: str) -> list[tuple[int, ...]]:
    """Up to `wanted` different choices of `shots` of `count` pairs, in random order by the key."""
    if not shots:
        return [tuple(range(count))]
    shots = min(shots, count)
    rng = random.Random(hashlib.blake2b(key.encode(), digest_size=8).digest())
    wanted = min(wanted, math.perm(count, shots))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        found[tuple(rng.sample(range(count), shots))] = None
    return list(found)


def _fill(example: str, query: str, response: str) -> str:
    head, tail = example.split("{query}", 1)  # not str.format: braces of a template or a text mean themselves
    return head + query + tail.removesuffix("{response}") + response


class Split(NamedTuple):
    """Which users are in which split, as `splits.split_of` takes it."""

    split_key: str  # any text; keep it for ever, another one shuffles users between the splits
    valid_share: float  # of users; about 0.32 gives the paper's ratio of prompts (table 6)
    test_share: float  # of users; about 0.06 gives the paper's ratio (table 9)


def prepare(
    records: Iterable[Record],
    *,
    prefix_chars: int,
    max_per_user: int,
    split: Split,
    max_tokens: int,
    count_tokens: Callable[[list[str]], Sequence[int]],
    language_sample: int,
) -> Prepared:
    """All steps in the paper's order.

    Args:
      records: prompts, the earlier ones preferred.
      prefix_chars: two prompts that share so many first characters are duplicates (the paper gives no number).
      max_per_user: the paper's 200.
      split: who is in which split.
      max_tokens: the paper's 1,024.
      count_tokens: lengths in tokens of a list of texts.
      language_sample: prompts that the language classifier sees.
    Returns:
      The three splits and the report: `read`, `steps` (each with `dropped` and `left`), `splits`, `languages`.
    """
    valid, test = split.valid_share, split.test_share
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise ValueError(f"valid_share and test_share must leave a training share, got {valid!r}, {test!r}")
    records = list(records)
    report: dict[str, Any] = {
        "read": len(records),
        "users": len({str(r["user"]) for r in records if r.get("user") is not None}),
    }
    steps = report["steps"] = []

    def note(step, before, after, **more):
        steps.append({"step": step, "dropped": before - after, "left": after} | more)

    kept = deduplicate(records, prefix_chars)
    note("long common prefix", len(records), len(kept))
    capped = cap_per_user(kept, max_per_user)
    note(f"over {max_per_user} a user", len(kept), len(capped))
    sets = {"train": [], "valid": [], "test": []}
    for record in capped:
        sets[split_of({"user": record.get("user"), "prompt": about(record)}, *split)].append(record)
    before = len(sets["train"])
    sets["train"], kinds = drop_pii(sets["train"])
    note("personal information (train)", len(capped), len(capped) - before + len(sets["train"]), kinds=kinds)
    before = sum(map(len, sets.values()))
    sets = {name: drop_long(split, max_tokens, count_tokens) for name, split in sets.items()}
    note(f"over {max_tokens} tokens", before, sum(map(len, sets.values())))
    report["splits"] = {name: len(split) for name, split in sets.items()}
    left = [record for split in sets.values() for record in split]
    report["languages"] = language_shares(left, language_sample) if left else {}
    return Prepared(**sets, report=report)


def write_splits(prepared: Prepared, folder: epath.Path) -> None:
    """`train.jsonl.gz`, `valid.jsonl.gz` and `test.jsonl.gz` in a folder."""
    for name in SPLITS:
        write_whole(folder / f"{name}.jsonl.gz", getattr(prepared, name))


def write_whole(path: epath.Path, records: Iterable[Record]) -> None:
    """Writes a gzip file of JSONL that appears only when it is complete; equal records give equal bytes."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    workdirs.write_atomically(path, gzip.compress(lines.encode(), compresslevel=3, mtime=0))
