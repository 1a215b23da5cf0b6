"""Attention backends on the device at hand: agreement, and speed and memory of forward and backward passes.

    python benchmarks/attention.py                                          (an H200, or a TPU)
    python benchmarks/attention.py --sizes=tiny --rows=2 --tokens=256 --attention=xla,splash      (a CPU, to try it)

First each backend against `xla` on random packed rows: the largest difference of the hidden states and of the
gradients, as a share of their norm, in bfloat16; the share between `xla` in bfloat16 and in float32 stands beside it as
the measure of rounding. Then, for each size, backend and remat policy, forward and backward through the language-model
loss: seconds (median), MFU, and the memory that the compiled program needs. What does not fit is printed so.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import models
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.training.supervised import language_model_loss

PEAK_FLOPS = {"NVIDIA H200": 989e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}  # bf16, published


def packed_rows(config: ModelConfig, b: int, T: int, segments: int) -> dict:
    """Rows of that many random sequences without padding; every token but the first of a sequence is a loss token."""
    rng = np.random.default_rng(0)
    cuts = [np.sort(rng.choice(np.arange(1, T), segments - 1, replace=False)) for _ in range(b)]
    ids = np.array([np.searchsorted(cut, np.arange(T), side="right") + 1 for cut in cuts])
    starts = np.array([np.concatenate([[0], cut])[row - 1] for cut, row in zip(cuts, ids, strict=True)])
    positions = np.arange(T) - starts
    tokens = rng.integers(0, config.vocab_size, (b, T))
    rows = {"tokens": tokens, "positions": positions, "segments": ids, "loss_mask": positions > 0}
    return {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}


def agreement(backend: str) -> None:
    """Prints the differences to `xla`, for dense and windowed layers with grouped queries."""
    shape = dict(vocab_size=512, num_layers=2, width=512, num_heads=8, num_kv_heads=4, mlp_width=1_024, max_length=256)
    config = ModelConfig(**shape, positions="rotary", windows=(0, 100), dtype="bfloat16")
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    rows = packed_rows(config, 4, 256, 3)

    def results(config):
        def total(params):
            hidden = models.hidden(config, params, rows["tokens"], rows["positions"], rows["segments"])
            hidden = hidden.astype(jnp.float32)
            return (hidden * jnp.sin(jnp.arange(hidden.size).reshape(hidden.shape))).sum(), hidden

        return jax.jit(jax.grad(total, has_aux=True))(params)

    def share(ours, theirs):
        pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
        return max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)

    reference = results(config.replace(attention="xla"))
    ours = results(config.replace(attention=backend))
    rounding = results(config.replace(attention="xla", dtype="float32"))
    for name, index in (("hidden states", 1), ("gradients", 0)):
        print(
            f"agreement {backend:6} {name:13} differ by {share(ours[index], reference[index]):.2e} of their norm; "
            f"bfloat16 from float32 by {share(reference[index], rounding[index]):.2e}",
            flush=True,
        )


def measure(config: ModelConfig, rows: dict, steps: int) -> str:
    """One line on forward and backward of these rows."""
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    step = jax.jit(jax.grad(lambda params: language_model_loss(config, params, rows, None)[0]))
    try:
        compiled = step.lower(params).compile()
        memory = compiled.memory_analysis()
        jax.block_until_ready(compiled(params))
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            jax.block_until_ready(compiled(params))
            times.append(time.perf_counter() - start)
    except jax.errors.JaxRuntimeError as error:
        return f"failed: {str(error).splitlines()[0][:120]}"
    seconds = statistics.median(times)
    b, T = rows["tokens"].shape
    context = float(jnp.mean(rows["positions"] + 1.0))
    flops = 3 * b * T * config.flops_per_token(context)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    kind = jax.devices()[0].device_kind
    mfu = f"MFU {flops / seconds / PEAK_FLOPS[kind]:.1%}" if kind in PEAK_FLOPS else "no MFU"
    return f"{seconds:.3f} s, {b * T / seconds:,.0f} tokens/s, {mfu}, {used / 1e9:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="gpt3-1.3b,gpt3-6.7b")
    parser.add_argument("--attention", default="")
    parser.add_argument("--remat", default="none,light,dots,full")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2_048, help="of a row")
    parser.add_argument("--segments", type=int, default=4, help="sequences in a row")
    parser.add_argument("--steps", type=int, default=5)
    flags = parser.parse_args()
    fast = {"gpu": "xla,cudnn", "tpu": "xla,splash"}.get(jax.default_backend(), "xla")
    backends = (flags.attention or fast).split(",")
    for backend in backends:
        if backend != "xla":
            agreement(backend)
    for size in flags.sizes.split(","):
        for backend in backends:
            for remat in flags.remat.split(","):
                config = models.SIZES[size].replace(dtype="bfloat16", attention=backend, remat=remat)
                rows = packed_rows(config, flags.rows, flags.tokens, flags.segments)
                print(f"{size} {backend:6} {remat:5} {measure(config, rows, flags.steps)}", flush=True)


if __name__ == "__main__":
    main()
