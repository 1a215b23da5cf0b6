"""Sampling: seconds, live tokens per second, and what is done beside what has to be done, against today's waves.

    python benchmarks/rollout.py                                            (an accelerator: 124M shape)
    python benchmarks/rollout.py --size=small --prompts=128 --shrink=8      (a CPU, minutes)

Three workloads: `fixed`, prompts and answers of 256 tokens; `paper`, prompts with the lengths of the paper's table 9,
answers that end at lognormal lengths (mean 90, sigma 0.9, at most 1,024); `answers`, nine such answers to each of a
ninth of these prompts. `--shrink` divides all lengths. Two forms do each: `slots`, this project's, and `waves`, how it
sampled before: as many prompts as there are slots, in order of length, all of which wait for the longest answer;
attention over every column; each answer to a prompt reads it again. Both sample the same tokens, but for rounding. A
third form, `--forms=slots,int8`, is slots with keys and values in 8 bits. Ratios are to the first form.

`slots x steps` is counted per live token, beside its floor: the longest answer or the work divided by the slots,
whichever is more. `columns` are those of the cache that attention reads per live one. Both are counted in a run of one
small layer at the same lengths. The limit is the time to read the weights at every step of the floor and each live
column once, at the bandwidth of this machine, measured here. Seconds are the best of `--repeats`, without compilation.
"""

import argparse
import datetime
import functools
import math
import time
import unittest.mock
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import models, rollout
from instructgpt_jax.models import ModelConfig

SMALL = ModelConfig(vocab_size=4096, num_layers=4, width=256, num_heads=8, mlp_width=1024, max_length=4096)
COUNTED = ModelConfig(vocab_size=64, num_layers=1, width=8, num_heads=1, mlp_width=8, max_length=4096)
K = 9  # answers to a prompt


class Work(NamedTuple):
    """Prompts (P, Q) with their lengths (P,), answers to each, and the limit (B,) and the maximum R of an answer."""

    prompts: np.ndarray
    lengths: np.ndarray
    answers: int
    limits: np.ndarray
    longest: int

    def live_columns(self) -> float:
        """Columns that a sampler with no waste reads: every token sees its prompt and the answer before it."""
        prompts = np.repeat(self.lengths, self.answers).astype(float)
        return (self.limits * prompts + self.limits * (self.limits - 1.0) / 2).sum()

    def floor(self, slots: int) -> int:
        """Steps that no order of the prompts can do without."""
        return max(self.longest_answer(), -(-int(self.limits.sum()) // slots))

    def longest_answer(self) -> int:
        return int(self.limits.max())


def work(name: str, count: int, shrink: int, vocab: int) -> Work:
    rng = np.random.default_rng(0)
    if name == "fixed":
        limit, answers = 256 // shrink, 1
        lengths, limits = np.full(count, limit), np.full(count, limit)
    else:
        limit, answers = 1024 // shrink, 1 if name == "paper" else K
        count = count // answers
        lengths = np.clip(np.round(rng.lognormal(math.log(62), 1.5, count) / shrink), 1, limit)
        sigma = 0.9
        limits = rng.lognormal(math.log(90) - sigma**2 / 2, sigma, count * answers) / shrink
        limits = np.clip(np.round(limits), 1, limit)
    prompts = rng.integers(0, vocab, (count, limit), dtype=np.int32)
    return Work(prompts, lengths.astype(np.int32), answers, limits.astype(np.int32), limit)


def slots_form(config: ModelConfig, slots: int, w: Work, cache: str = "full"):
    def run(params, prompts, lengths, limits):
        given = config, params, prompts, lengths, w.longest, 0
        return rollout.generate(*given, wave=slots, answers=w.answers, limits=limits, cache=cache)

    return run


def waves_form(config: ModelConfig, slots: int, w: Work):
    """As before there were slots; what does not fill a wave is cut off one-token answers to the first prompt."""

    def run(params, prompts, lengths, limits):
        prompts, lengths = (jnp.repeat(x, w.answers, axis=0) for x in (prompts, lengths))
        count = len(lengths)
        episodes, missing = jnp.arange(count), -count % slots
        order = jnp.concatenate([jnp.zeros(missing, jnp.int32), jnp.argsort(lengths, stable=True)])
        limits = jnp.where(jnp.arange(len(order)) < missing, 1, limits[order])
        waves = jax.tree.map(
            lambda x: x.reshape(-1, slots, *x.shape[1:]), (prompts[order], lengths[order], episodes[order], limits)
        )

        def wave(given):
            prompts, lengths, episodes, limits = given
            return rollout.generate(config, params, prompts, lengths, w.longest, 0, episodes=episodes, limits=limits)

        found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(wave, waves))
        return jax.tree.map(lambda x: x[missing:][jnp.argsort(order[missing:])], found)

    return run


FORMS = {"waves": waves_form, "slots": slots_form, "int8": functools.partial(slots_form, cache="int8")}


class Counter:
    """Counts slots and columns of every step while `models.extend` is this."""

    def __init__(self):
        self.extend, self.steps, self.slots, self.columns = models.extend, 0, 0, 0

    def __call__(self, config, params, cache, tokens, positions, column, read):
        if tokens.shape[1] == 1:
            jax.debug.callback(functools.partial(self.count, len(tokens), read))
        return self.extend(config, params, cache, tokens, positions, column, read)

    def count(self, slots, columns):
        self.steps, self.slots, self.columns = self.steps + 1, self.slots + slots, self.columns + slots * columns


def with_form(form: str, slots: int, function):
    """function(); as `waves` with whole caches read, the prompts of a wave read together, and no smaller pool."""
    if form != "waves":
        return function()
    sizes = {"PREFILL_CHUNK": 128, "TRAY": slots, "TAIL": 10**9, "READS": 1, "PREFILL_READS": 1}
    with unittest.mock.patch.multiple(rollout, **sizes):
        return function()


def counted(form: str, slots: int, w: Work) -> Counter:
    params = jax.jit(lambda key: models.init(COUNTED, key))(jax.random.key(0))
    w = w._replace(prompts=w.prompts % COUNTED.vocab_size)
    counter = Counter()

    def run():
        with unittest.mock.patch.object(models, "extend", counter):
            jax.block_until_ready(jax.jit(FORMS[form](COUNTED, slots, w))(params, w.prompts, w.lengths, w.limits))
            jax.effects_barrier()

    with_form(form, slots, run)
    return counter


def bandwidth() -> float:
    """Bytes per second that this machine reads."""
    x = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / min(seconds(lambda: total(x).block_until_ready()) for _ in range(5))


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(config: ModelConfig, w: Work, slots: int, repeats: int, speed: float, forms: list[str]) -> dict[str, float]:
    """Prints a line for each form; returns their seconds."""
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    arguments = params, w.prompts, w.lengths, w.limits
    build = lambda form: jax.jit(FORMS[form](config, slots, w)).lower(*arguments).compile()  # noqa: E731
    programs = {}
    for form in forms:
        start = time.perf_counter()
        programs[form] = with_form(form, slots, functools.partial(build, form))
        print(f"  {form}: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    results = {form: jax.block_until_ready(program(*arguments)) for form, program in programs.items()}
    times = {form: [] for form in forms}
    for _ in range(repeats):  # in turn: another program may take the machine for a while
        for form, program in programs.items():
            times[form].append(seconds(lambda: jax.block_until_ready(program(*arguments))))  # noqa: B023
    tokens = int(w.limits.sum())
    item = jnp.dtype(config.dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(params)) * item
    for form, program in programs.items():
        head = config.head_width + 4 if form == "int8" else config.head_width * item  # bytes of a key: with its scale
        columns = w.live_columns() * 2 * config.num_layers * config.num_kv_heads * head
        limit = (w.floor(slots) * weights + columns) / speed
        count, best = counted(form, slots, w), min(times[form])
        print(
            f"  {form}: {best:8.2f} s, {tokens / best:9,.0f} live tokens/s, limit {limit:.2f} s; slots x steps "
            f"{count.slots / tokens:.2f} per live token, floor {w.floor(slots) * slots / tokens:.2f}; columns read "
            f"{count.columns / w.live_columns():.1f} per live one; {count.steps} steps, memory "
            f"{program.memory_analysis().temp_size_in_bytes / 1e6:,.0f} MB",
            flush=True,
        )
    first, *others = forms
    for form in others:
        same = (np.asarray(results[first].tokens) == np.asarray(results[form].tokens)).all(axis=1)
        faster = min(times[first]) / min(times[form])
        print(f"  {form} {faster:.2f} x {first}; same tokens {same.mean():.1%} of answers")
    return {form: min(values) for form, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", *models.SIZES], default="gpt3-125m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divides lengths")
    parser.add_argument("--workloads", default="fixed,paper,answers")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--forms", default="waves,slots", help=f"of {', '.join(FORMS)}")
    flags = parser.parse_args()
    config = (SMALL if flags.size == "small" else models.SIZES[flags.size]).replace(
        dtype=flags.dtype, max_length=max(4096 // flags.shrink, 512)
    )
    speed = bandwidth()
    print(
        f"{datetime.date.today()}, {jax.devices()[0].device_kind}: {flags.size}, {flags.dtype}, {flags.prompts} "
        f"answers, {flags.slots} slots, lengths / {flags.shrink}, {speed / 1e9:.1f} GB/s"
    )
    for name in flags.workloads.split(","):
        print(name)
        w = work(name, flags.prompts, flags.shrink, config.vocab_size)
        measure(config, w, flags.slots, flags.repeats, speed, flags.forms.split(","))


if __name__ == "__main__":
    main()
