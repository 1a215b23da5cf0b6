"""Input speed: packed tokens a second of one process, from JSONL on disk to the arrays of a batch.

    python benchmarks/data.py [--data=../shared/data] [--epochs=3]

Reads, checks, encodes (GPT-2's byte-level BPE) and packs real demonstrations, comparisons and running text, and says
what part of a training step that is for a 1.3B model on one H200. Run it on the cores to be measured (taskset).
"""

import argparse
import os
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from instructgpt_jax.data import batches as batching
from instructgpt_jax.data import sources
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


def main() -> None:
    root = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("INSTRUCTGPT_DATA", str(root)))
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.data
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
