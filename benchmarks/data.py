"""Input speed: packed tokens a second of one process, from JSONL on disk to the arrays of a batch.

    python benchmarks/data.py [--data=../shared/data] [--epochs=3]
    python benchmarks/data.py --corpus=1e9 --corpus_dir=FOLDER

Reads, checks, encodes (GPT-2's byte-level BPE) and packs real demonstrations, comparisons and running text, and says
what part of a training step that is for a 1.3B model on one H200. Run it on the cores to be measured (taskset).

With `--corpus` it writes that many random ids as token shards into a new folder (2 bytes each) and removes them at the
end. It times the command line from its start to the end of the first step of a small model, with the memory that it
took, on a thousandth of them and on all. It reads an epoch: each of its sequences must come once. It also checks that
100 batches from number 1,000 on are the same sequences for 1, 2 and 8 processes, and says how fast one process reads.
"""

import argparse
import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from instructgpt_jax.data import batches as batching
from instructgpt_jax.data import datasets, shards, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Order, Rows
from instructgpt_jax.data.encoding import Allowed

PARAMETERS = 1.3e9
PEAK = 790e12  # bf16 FLOP/s reached by large matrix products on one H200 (data sheet: 989e12)
UTILISATION = 0.5
ROWS = Rows(row_length=2048, microbatch_rows=8)


def measure(kind: str, pattern: str, tokenizer, epochs: int, batch_size: int, **options) -> float:
    """Prints and returns real (not padding) tokens a second over reading, encoding and packing `epochs` epochs."""
    began = time.perf_counter()
    records = sources.load((f"jsonl:{pattern}",), kind, 0)
    read = time.perf_counter()
    batches = getattr(batching, kind)(records, tokenizer, Order(0, epochs, batch_size), ROWS, **options)
    encoded = time.perf_counter()
    tokens = used_rows = 0
    for index in range(batches.steps_per_epoch * epochs):
        segments = batches[index]["segments"]
        tokens += int(np.count_nonzero(segments))
        used_rows += int(np.count_nonzero(segments[..., 0]))
    packed = time.perf_counter()
    once = tokens / epochs  # the first epoch reads and encodes, every epoch packs
    first = once / (encoded - began + (packed - encoded) / epochs)
    later = tokens / (packed - encoded)
    print(
        f"{kind:15} {once:10,.0f} tokens  read {read - began:5.2f} s  encode {encoded - read:5.2f} s  "
        f"pack {(packed - encoded) / epochs:5.2f} s  fill {tokens / used_rows / ROWS.row_length:.3f}  "
        f"first epoch {first:11,.0f} tokens/s  later {later:13,.0f} tokens/s"
    )
    return first


SHARD = 50_000_000  # ids


def write_shards(folder: pathlib.Path, count: int, tokenizer) -> str:
    """Token shards of random ids, in documents of 500 on average, as data.build writes them; the source."""
    folder.mkdir()
    rng, entries = np.random.default_rng(0), []
    for number, first in enumerate(range(0, count, SHARD)):
        size, name = min(SHARD, count - first), f"{number:05}"
        ids = rng.integers(tokenizer.vocab_size, size=size, dtype=np.uint16)
        ends = np.unique(np.append(rng.integers(1, size, size // 500), size))
        ids[ends - 1] = tokenizer.eos_id
        documents = np.zeros(len(ends), shards.DOCUMENT)
        documents["length"] = np.diff(ends, prepend=0)
        for field in ("place", "about"):
            documents[field] = rng.integers(1 << 63, size=len(ends), dtype=np.uint64) * 2
        files = {shards.TOKENS: ids.tobytes(), shards.DOCUMENTS: documents.tobytes()}
        for ending, data in files.items():
            (folder / (name + ending)).write_bytes(data)
        checksum = hashlib.blake2b(b"".join(files.values()), digest_size=16).hexdigest()
        entries.append(dict(zip(shards.ENTRY, (name, len(documents), size, checksum), strict=True)))
    manifest = {"format": shards.FORMAT, "part": 1, "parts": 1, "shards_of_all_parts": len(entries)}
    manifest |= {"tokenizer": tokenizer.text_hash, "vocab_size": tokenizer.vocab_size}
    manifest |= {"users": False, "skipped": [], "shards": entries}
    (folder / "manifest-00001-of-00001.json").write_text(json.dumps(manifest))
    return f"tokens:{folder}/*{shards.TOKENS}"


def measure_start(source: str, tokenizer: pathlib.Path) -> None:
    """Prints seconds and memory of the command line to the end of the first step."""
    root = pathlib.Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "instructgpt_jax.main", "--config=configs/pretrain_tiny.py:tiny"]
        changed = {"data.pretraining": source, "data.tokenizer": tokenizer, "pretrain.num_steps": 10_000}
        changed |= {"eval_every": 0, "log_every": 1}
        command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changed.items())]
        metrics, began = pathlib.Path(workdir, "metrics.jsonl"), time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        running = subprocess.Popen(command, cwd=root)
        while not (metrics.exists() and "\n" in metrics.read_text()):
            time.sleep(0.1)
            if running.poll() is not None:
                raise SystemExit("the command line ended before its first step")
        seconds = time.perf_counter() - began
        running.kill()
        running.wait()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of all children so far: memory is the largest of any
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{seconds:.1f} s to the end of the first step ({processor:.1f} s of processor time), "
        f"{used.ru_maxrss / 2**20:.2f} GiB at most",
        flush=True,
    )


def measure_corpus(folder: pathlib.Path, count: int) -> None:
    """See the top of this file."""
    texts = (record["text"] for record in sources.load(("simulated:pretraining:2000",), "pretraining", 0))
    vocabulary = tokenizers.train(texts, 1024, folder / "tokenizer")
    for name, size in (("part", count // 1000), ("whole", count)):
        source = write_shards(folder / name, size, vocabulary)
        print(f"{size:,} ids: ", end="", flush=True)
        measure_start(source, folder / "tokenizer")
    began = time.perf_counter()
    train, _ = datasets.split(sources.load((source,), "pretraining", 0), 0.05)

    def batches(process: int, processes: int, epochs: int | None):
        order = Order(0, epochs, 256, process, processes)
        return batching.pretraining(train, vocabulary, order, ROWS, cache_dir="")

    def rows(found, number: int) -> list[bytes]:
        batch = found[number]
        return [row.tobytes() for row in batch["tokens"][batch["segments"][..., 0] > 0]]

    once = batches(0, 1, 1)
    sequences, first = len(once.read["pretraining"].examples), time.perf_counter() - began
    print(f"{len(train):,} documents, {sequences:,} sequences of {ROWS.row_length}: {first:.2f} s to open and split")
    whole = batches(0, 1, None)
    for processes in (2, 8):
        parts = [batches(process, processes, None) for process in range(processes)]
        for number in range(1000, 1100):
            if sorted(row for part in parts for row in rows(part, number)) != sorted(rows(whole, number)):
                raise SystemExit(f"batch {number} differs between 1 and {processes} processes")
    print("100 batches hold the same sequences for 1, 2 and 8 processes")
    seen, began = set(), time.perf_counter()
    for number in range(len(once)):
        seen.update(hashlib.blake2b(row, digest_size=8).digest() for row in rows(once, number))
    seconds = time.perf_counter() - began
    if len(seen) != len(once) * 256:
        raise SystemExit(f"an epoch must have {len(once) * 256:,} different sequences, got {len(seen):,}")
    read = len(seen) * ROWS.row_length
    print(f"{len(seen):,} sequences, each once; one process reads and packs {read / seconds:,.0f} tokens/s")
    print(f"memory of this process at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main() -> None:
    root = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("INSTRUCTGPT_DATA", str(root)))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--corpus", type=float, default=0, help="ids of a random corpus to start on")
    parser.add_argument("--corpus_dir", default="", help="a new folder for it, 2 bytes an id; removed at the end")
    arguments = parser.parse_args()
    folder = arguments.data
    if arguments.corpus:
        corpus = pathlib.Path(arguments.corpus_dir or parser.error("--corpus_dir must be given")).resolve()
        corpus.mkdir(parents=True)
        try:
            measure_corpus(corpus, int(arguments.corpus))
        finally:
            shutil.rmtree(corpus)
        return
    tokenizer = tokenizers.load(os.path.join(folder, "gpt2_bpe"))
    tokenizer.encode(["start the threads"])
    print(f"{len(os.sched_getaffinity(0))} cores, GPT-2 byte-level BPE, rows of {ROWS.row_length} tokens")
    allowed = Allowed(max_prompt_tokens=1024, skip_bad=10)
    speeds = [
        measure(
            "demonstrations", f"{folder}/demonstrations/*.jsonl.gz", tokenizer, arguments.epochs, 32,
            allowed=allowed, loss_on_prompt=False,
        ),
        measure(
            "comparisons", f"{folder}/comparisons/[ho]*.jsonl.gz", tokenizer, arguments.epochs, 64,
            allowed=allowed, max_completions=9, shared_prompt=True,
        ),
        measure("pretraining", f"{folder}/pretrain/*.jsonl.gz", tokenizer, arguments.epochs, 32, cache_dir=""),
    ]  # fmt: skip
    consumed = PEAK * UTILISATION / (6 * PARAMETERS)
    print(
        f"a {PARAMETERS:.1e}-parameter model on one H200 takes {consumed:,.0f} tokens/s, if a training token costs 6 x "
        f"parameters FLOP and {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s bf16 are used:"
    )
    print(
        f"the slowest kind above costs {consumed / min(speeds):.1%} of a step in its first epoch, if nothing overlapped"
    )


if __name__ == "__main__":
    main()
