"""Writes text as token shards, see `data/shards.py`: files in parallel on the cores of a host, parts on several hosts.

The files of `jsonl:` and `parquet:` become shards one by one, or a few together where there are very many, and a part
of the build takes every N-th shard. What has no files, such as `hf:`, becomes one shard for each part, of a range of
its records. The shards hold what a run that reads the same source as text would encode, in the same order.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from instructgpt_jax import errors, paths, process
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import documents, jsonl, shards, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.records import keys_of

_MOST = 1024  # shards, where there are more files


class Part(NamedTuple):
    """Part `number` of `count` of a build, `number` from 1."""

    number: int
    count: int

    @property
    def manifest(self) -> str:
        """Name of its manifest."""
        return f"manifest-{self.number:05}-of-{self.count:05}.json"


class Job(NamedTuple):
    """A shard to write.

    name: of the shard: shards are read in the order of their names.
    sources: read one after another.
    part: of their records.
    """

    name: str
    sources: tuple[sources.Source, ...]
    part: Part


class Written(NamedTuple):
    """What became of a job; `error` says what a person must mend, '' = nothing."""

    name: str
    documents: int = 0
    tokens: int = 0
    checksum: str = ""
    users: bool = False
    skipped: tuple[str, ...] = ()
    error: str = ""


def parse_part(text: str) -> Part:
    """The part "I/N" of a build.

    Raises:
      ValueError: it is none.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 99999):
        raise ValueError(f"--part must be I/N with I from 1 to N, got {text!r}")
    return Part(int(number), int(count))


def build(source: str, tokenizer: str, folder: str, part: Part, workers: int, skip_bad: int) -> dict[str, Any]:
    """Writes one part of a corpus, and its manifest behind it: all shards are whole where that is.

    Args:
      source: of text, of any form but `tokens`, without a weight.
      tokenizer: a directory or Hub id; that of a workdir is the run's with its template.
      folder: for the shards, local or gs://.
      workers: processes that encode files beside each other; 0 = as many as there are cores.
      skip_bad: malformed records of the part that may be left out.
    Returns:
      The manifest.
    Raises:
      ValueError: a malformed input (file and line), or a folder that has this part or parts of another build.
    """
    vocabulary = tokenizers.load(tokenizer)
    jobs, total = _jobs(sources.parse(source), part)
    folder = str(paths.make_folder("data_dir", folder)).rstrip("/")
    there = sorted(path.name for path in epath.Path(folder).glob("manifest-*.json"))
    others = [name for name in there if not name.endswith(part.manifest[-11:]) or name == part.manifest]
    if others:
        raise ValueError(f"data_dir {folder} must not hold this part or parts of another build, got {others[0]}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores, len(jobs))
    written, skipped = [], []
    made = _in_workers(jobs, tokenizer, folder, workers, cores) if workers > 1 else _alone(jobs, vocabulary, folder)
    with contextlib.closing(made) as results:
        for result in results:
            if result.error:
                raise ValueError(result.error)
            skipped.extend(result.skipped)
            if len(skipped) > skip_bad:
                sources.refuse_or_list(skipped, skip_bad, "--skip_bad")
            written.append(result)
    sources.refuse_or_list(skipped, skip_bad, "--skip_bad")
    manifest = {
        "format": shards.FORMAT,
        "input": source,
        "part": part.number,
        "parts": part.count,
        "shards_of_all_parts": total,
        "tokenizer": vocabulary.text_hash,
        "vocab_size": vocabulary.vocab_size,
        "documents": sum(one.documents for one in written),
        "tokens": sum(one.tokens for one in written),
        "users": any(one.users for one in written),
        "skipped": skipped,
        "shards": [{key: getattr(one, key) for key in shards.ENTRY} for one in sorted(written)],
    }
    workdirs.write_atomically(epath.Path(folder) / part.manifest, json.dumps(manifest, indent=1) + "\n")
    return manifest


def verify(pattern: str) -> int:
    """Reads whole shards again and compares their checksums; how many there are.

    Raises:
      ValueError: one that differs, or see `shards.find`.
    """
    found = shards.find(pattern)
    files = shards.Files()
    progress = process.Progress(lambda done: f"{done:,} of {len(found.shards):,} shards verified", _print)
    for done, shard in enumerate(found.shards):
        digest = _digest()
        for ending, size in shard.sizes(found.dtype).items():
            for first in range(0, size, 1 << 24):
                digest.update(files.read(shard.path + ending, first, min(first + (1 << 24), size)))
        if digest.hexdigest() != shard.checksum:
            raise ValueError(
                f"{shard.path} must have the checksum {shard.checksum} of its manifest, got {digest.hexdigest()}: it "
                "has changed"
            )
        progress(done + 1)
    return len(found.shards)


def _digest():
    return hashlib.blake2b(digest_size=16)


def _print(text: str) -> None:
    """Not `process.say`, which asks JAX for its devices: another program may hold them."""
    print(text, file=sys.stderr, flush=True)


def _jobs(source: sources.Source, part: Part) -> tuple[list[Job], int]:
    """The shards that a part writes, and how many all parts do."""
    if source.form == "tokens" or source.weight is not None:
        raise ValueError(f"--input must be text without a weight, tokens: sources have weights, got {source}")
    if source.form not in ("jsonl", "parquet"):
        return [Job(f"{part.number - 1:05}", (source,), part)], part.count
    if "unique" in source.options:
        raise ValueError(f"--input must have no #unique, each file is read by itself, got {source}")
    files = jsonl.match(source.name, source.form)
    size = -(-len(files) // _MOST)
    groups = [files[first : first + size] for first in range(0, len(files), size)]
    jobs = [
        Job(f"{number:05}", tuple(source._replace(name=file) for file in group), Part(1, 1))
        for number, group in enumerate(groups)
    ]
    return jobs[part.number - 1 :: part.count], len(jobs)


def _progress(jobs: Sequence[Job], done: list[Written]) -> process.Progress:
    """To be called with the documents and tokens so far; `done` are the shards that are whole."""

    def line(documents, tokens):
        rest = progress.left(len(done) / len(jobs)) if done else "no shard is whole yet"
        return (
            f"{len(done):,} of {len(jobs):,} shards, {documents:,} documents, {tokens:,} tokens, "
            f"{tokens / progress.seconds:,.0f} tokens/s, {rest}"
        )

    progress = process.Progress(line, _print)
    return progress


def _alone(jobs: Sequence[Job], tokenizer: tokenizers.Tokenizer, folder: str) -> Iterator[Written]:
    """Writes one shard after another; the tokenizer's threads use the cores."""
    done: list[Written] = []
    counts, progress = np.zeros(2, np.int64), _progress(jobs, done)

    def tell(documents, tokens):
        counts[:] += documents, tokens
        progress(*counts)

    for job in jobs:
        done.append(_write(job, tokenizer, folder, tell))
        yield done[-1]


def _in_workers(jobs: Sequence[Job], tokenizer: str, folder: str, workers: int, cores: int) -> Iterator[Written]:
    """Writes shards beside each other, in processes that share the cores; yields them as they end."""
    done: list[Written] = []
    context, progress = multiprocessing.get_context("spawn"), _progress(jobs, done)
    counts = context.Array("q", 2)
    given = (counts, tokenizer, max(1, cores // workers))
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, given) as pool:
        waiting = {pool.submit(_in_worker, job, folder) for job in jobs}
        try:
            while waiting:
                ended, waiting = concurrent.futures.wait(waiting, 1.0, concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    done.append(future.result())
                    yield done[-1]
                progress(*counts)
        finally:
            pool.shutdown(cancel_futures=True)


_of_worker: tuple = ()  # in a process of `_in_workers`: documents and tokens that all have encoded, and the tokenizer


def _begin(counts, tokenizer: str, threads: int) -> None:
    global _of_worker
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # is read when the first text is encoded
    _of_worker = counts, tokenizers.load(tokenizer)


def _in_worker(job: Job, folder: str) -> Written:
    """Errors of a person's travel as text: an exception from another process hides where it was raised."""
    counts, tokenizer = _of_worker

    def tell(documents, tokens):
        with counts.get_lock():
            counts[0] += documents
            counts[1] += tokens

    try:
        return _write(job, tokenizer, folder, tell)
    except Exception as error:
        told = errors.describe(error)
        if told is None:
            raise
        return Written(job.name, error=told)


def _write(job: Job, tokenizer: tokenizers.Tokenizer, folder: str, tell: Callable[[int, int], None]) -> Written:
    """Encodes the documents of a job."""
    path, dtype = f"{folder}/{job.name}", shards.dtype_of(tokenizer.vocab_size)
    digest, entries, skipped, users, count = _digest(), [], [], False, 0
    with _whole(path + shards.TOKENS) as file:
        for source in job.sources:
            records = sources.read(source, "pretraining", "")
            skipped.extend(records.skipped)
            low, high = (number * len(records) // job.part.count for number in (job.part.number - 1, job.part.number))
            for first in range(low, high, documents.CHUNK):
                chunk = [records[i] for i in range(first, min(first + documents.CHUNK, high))]
                users = users or any(record.get("user") is not None for record in chunk)
                ids = documents.encode([record["text"] for record in chunk], tokenizer)
                entry = np.zeros(len(chunk), shards.DOCUMENT)
                entry["length"] = [len(one) for one in ids]
                entry["place"], entry["about"] = np.array([keys_of(record) for record in chunk], np.uint64).T
                data = np.concatenate(ids).astype(dtype).tobytes()
                file.write(data)
                digest.update(data)
                entries.append(entry)
                count += int(entry["length"].sum())
                tell(len(chunk), int(entry["length"].sum()))
    entries = np.concatenate([np.zeros(0, shards.DOCUMENT), *entries])
    digest.update(entries.tobytes())
    with _whole(path + shards.DOCUMENTS) as file:
        file.write(entries.tobytes())
    return Written(job.name, len(entries), count, digest.hexdigest(), users, tuple(skipped))


@contextlib.contextmanager
def _whole(path: str) -> Iterator[Any]:
    """A file to write that has its name when it is whole (in a bucket an object is there when it is closed)."""
    with errors.naming(path):
        if "://" in path:
            with epath.Path(path).open("wb") as file:
                yield file
            return
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
