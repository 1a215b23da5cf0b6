"""Speed of the 124M GPT-2 shape beside transformers + torch, of decoding, and on a GPU the MFU of the 1.3B shape.

    pip install torch transformers
    python benchmarks/model.py [--steps=5] [--parts=step,head,decode,mfu]

`step`: forward and backward of 8 x 128 tokens in float32 on the CPU, through the loss that pretraining and SFT train
on, alternating with GPT2LMHeadModel on the same tokens; medians, and the ratio, which alone counts on a busy machine.
`head`: forward and backward of the loss over the vocabulary alone, by chunks of 512 tokens and as `losses.chunk_of` has
it for GPUs and TPUs, alternating; float32 on a CPU, bfloat16 of the 1.3B shape on a GPU.
`decode`: 64 tokens for each of 16 sequences after prompts of 64, beside the time it takes to read the weights once.
`mfu`: forward and backward of the 1.3B shape, bfloat16, rows of 2,048; skipped where there is no GPU.
"""

import argparse
import functools
import importlib.util
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import losses, models
from instructgpt_jax.rollout import generate
from instructgpt_jax.training.supervised import language_model_loss

GPT2 = models.SIZES["gpt3-125m"].replace(max_length=1_024)
PEAK_FLOPS = 790e12  # of bfloat16 products, as measured on one H200


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fresh(config: models.ModelConfig) -> dict:
    return jax.jit(lambda key: models.init(config, key))(jax.random.key(0))


def random_rows(config: models.ModelConfig, b: int, T: int) -> dict:
    """Rows of one sequence each; every token but the first is a loss token."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (b, T))
    position = np.broadcast_to(np.arange(T), (b, T))
    rows = {"tokens": tokens, "positions": position, "segments": np.ones((b, T)), "loss_mask": position > 0}
    return {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}


def gradient_step(config: models.ModelConfig, rows: dict):
    """A function that runs one forward and backward pass and waits for it."""
    params = fresh(config)
    step = jax.jit(jax.grad(lambda params: language_model_loss(config, params, rows, None)[0]))
    return lambda: jax.block_until_ready(step(params))


def torch_step(rows: dict):
    """The same work by transformers and torch: no dropout, gradients of all parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)).train()
    tokens = torch.tensor(np.asarray(rows["tokens"]), dtype=torch.long)

    def step():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()

    return step


def measure_step(steps: int) -> None:
    rows = random_rows(GPT2, 8, 128)
    sides = {"ours": gradient_step(GPT2, rows), "torch": torch_step(rows)}
    times = {name: [] for name in sides}
    for index in range(steps + 1):  # the first compiles and warms up
        for name, step in sides.items():
            elapsed = seconds(step)
            if index:
                times[name].append(elapsed)
    for name, values in times.items():
        median = statistics.median(values)
        print(f"step    {name:6} {median:6.2f} s (best {min(values):.2f}), {8 * 128 / median:6.0f} tokens/s")
    ratios = [slow / fast for fast, slow in zip(times["ours"], times["torch"], strict=True)]
    print(f"step    ratio  {statistics.median(ratios):6.2f} (median of the pairs; at least 1.3 wanted)", flush=True)


def measure_head(steps: int) -> None:
    gpu = jax.default_backend() == "gpu"
    config = models.SIZES["gpt3-1.3b"].replace(dtype="bfloat16") if gpu else GPT2
    V, D, (b, T) = config.padded_vocab_size, config.width, (8, 2_048) if gpu else (4, 256)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, table = jax.random.normal(keys[0], (b, T, D), config.dtype), 0.02 * jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (b, T), 0, config.vocab_size)

    def head(chunk):
        loss = functools.partial(losses.cross_entropy, vocab_size=config.vocab_size, chunk=chunk)
        step = jax.jit(jax.value_and_grad(lambda h, u: loss(h, u, targets, jnp.ones((b, T))), argnums=(0, 1)))
        return lambda: jax.block_until_ready(step(hidden, table))

    sizes = (512, losses.chunk_of(V, "NVIDIA H200"))
    times = {size: [] for size in sizes}
    for index, (size, run) in itertools.product(range(steps + 1), [(size, head(size)) for size in sizes]):
        wall, processor = time.perf_counter(), time.process_time()
        run()
        if index:
            times[size].append((time.perf_counter() - wall, time.process_time() - processor))
    for size in sizes:
        wall, processor = (statistics.median(column) for column in zip(*times[size], strict=True))
        print(f"head    {b} x {T} tokens of {V:,}, chunks of {size:,}: {wall:.3f} s, {processor:.2f} s of processor")
    pairs = np.array(times[sizes[0]]) / np.array(times[sizes[1]])
    wall, processor = np.median(pairs, axis=0)
    print(f"head    ratio  {wall:.2f}, of processor {processor:.2f} (512 to the larger)", flush=True)


def measure_decode(steps: int) -> None:
    params = fresh(GPT2)
    prompts = random_rows(GPT2, 16, 64)["tokens"]
    lengths = jnp.full(16, 64)
    run = jax.jit(lambda params, seed: generate(GPT2, params, prompts, lengths, 64, seed))
    read = jax.jit(lambda params: jax.tree.map(jnp.sum, params))
    jax.block_until_ready((run(params, 0), read(params)))
    pairs = []
    for seed in range(steps):
        rollout = seconds(lambda: jax.block_until_ready(run(params, seed)))  # noqa: B023
        pairs.append((rollout, seconds(lambda: jax.block_until_ready(read(params)))))
    rollout, reading = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"decode  16 x 64 tokens {rollout:.2f} s (best {min(pairs)[0]:.2f}), prompts included: ", end="")
    print(f"{rollout / 64 * 1e3:.0f} ms a token; reading the weights once takes {reading * 1e3:.0f} ms", flush=True)


def measure_mfu(steps: int) -> None:
    if jax.default_backend() != "gpu":
        print("mfu     skipped: no GPU")
        return
    b, T = 8, 2_048
    config = models.SIZES["gpt3-1.3b"].replace(dtype="bfloat16", remat="dots")
    step = gradient_step(config, random_rows(config, b, T))
    step()
    elapsed = statistics.median(seconds(step) for _ in range(steps))
    flops = 3 * b * T * config.flops_per_token((T + 1) / 2)
    device = jax.devices()[0].device_kind
    print(f"mfu     1.3B, {b} x {T} tokens, {device}: {elapsed:.3f} s, {b * T / elapsed:,.0f} tokens/s, ", end="")
    print(f"{flops / elapsed / 1e12:.0f} TFLOP/s, MFU {flops / elapsed / PEAK_FLOPS:.1%} of {PEAK_FLOPS / 1e12:.0f}")


PARTS = {"step": measure_step, "head": measure_head, "decode": measure_decode, "mfu": measure_mfu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--parts", default=",".join(PARTS))
    flags = parser.parse_args()
    parts = flags.parts.split(",")
    if "step" in parts and importlib.util.find_spec("torch") is None:
        sys.exit("error: --parts=step must have torch to measure beside: pip install torch, or --parts=head,decode,mfu")
    for part in parts:
        PARTS[part](flags.steps)


if __name__ == "__main__":
    main()
