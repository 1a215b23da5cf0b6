"""Documents of pretraining text into ids: one long array, or what token shards have of it already."""

import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from instructgpt_jax import process
from instructgpt_jax.data import tokens

CHUNK = 1024  # documents encoded at once
ADVICE = "data.build --format=tokens does this once for all runs, and config.data.pretraining=tokens:GLOB reads it"


def stream(records, tokenizer, cache_dir: str) -> np.ndarray | tokens.Stream:
    """All documents of a source, each ended by EOS, as one uint32 array (mapped from a file when there is a cache)."""
    if isinstance(records, tokens.Corpus):
        return records.stream(tokenizer.text_hash)
    if not cache_dir:
        return np.concatenate(list(_encode_all(records, tokenizer)))
    key = hashlib.sha256(tokenizer.hash.encode())
    for record in records:
        text = record["text"].encode()
        key.update(len(text).to_bytes(8, "little") + text)
    folder = pathlib.Path(cache_dir)
    path = folder / f"{key.hexdigest()[:32]}.uint32"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")  # whole or not at all, whoever is first
        try:
            with open(partial, "wb") as file:  # not by tempfile, whose files are for their owner alone
                for ids in _encode_all(records, tokenizer):
                    ids.tofile(file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return np.memmap(path, np.uint32, "r")


def _encode_all(records, tokenizer) -> Iterator[np.ndarray]:
    """The ids of all documents, `CHUNK` of them at once, uint32."""
    total, count = len(records), 0
    advice = f"; {ADVICE}"  # once

    def line(done, ids):
        return f"pretraining: {done:,} of {total:,} documents encoded, {ids:,} tokens, {progress.left(done / total)}"

    progress = process.Progress(lambda *numbers: line(*numbers) + advice)
    for first in range(0, total, CHUNK):
        texts = [records[i]["text"] for i in range(first, min(first + CHUNK, total))]
        ids = np.concatenate(encode(texts, tokenizer))
        yield ids
        count += len(ids)
        if progress(first + len(texts), count):
            advice = ""


def encode(texts: Sequence[str], tokenizer) -> list[np.ndarray]:
    """The ids of each document, with what stands before every sequence and EOS behind it, (length,) uint32."""
    start, eos = np.array(tokenizer.start, np.uint32), np.array([tokenizer.eos_id], np.uint32)
    return [np.concatenate([start, ids, eos], dtype=np.uint32, casting="unsafe") for ids in tokenizer.encode(texts)]
