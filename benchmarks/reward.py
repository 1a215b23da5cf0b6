"""Time and FLOPs of the reward model's two encodings: a prompt once for its K completions, or once for each.

    python benchmarks/reward.py [--size=gpt3-125m] [--prompt=256] [--completion=64] [--completions=9] [--repeats=5]

Forward and backward pass of the ranking loss of one comparison, both forms by turns in one run, the median of each.
FLOPs are counted twice: by the compiler (`cost_analysis` of the compiled program) and as model FLOPs (2 a weight and
token, attention over the keys that a token sees). Also prints how far the two losses and gradients lie apart. Exits 1
below `--at_least`.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instructgpt_jax import models, reward
from instructgpt_jax.data import packing


def microbatch(args: argparse.Namespace, vocab_size: int, shared_prompt: bool) -> dict[str, jax.Array]:
    """One comparison in the row that just holds it, or in one row a completion."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, vocab_size, args.prompt)
    completions = [rng.integers(1, vocab_size, args.completion) for _ in range(args.completions)]
    K = args.completions
    comparison = packing.Comparison(prompt, completions, list(range(1, K + 1)), -1)
    rows, row_length = (1, args.prompt + K * args.completion) if shared_prompt else (K, args.prompt + args.completion)
    batch = packing.pack_comparisons([comparison], row_length, 1, rows, 1, K, shared_prompt, first_row=0)
    return {name: jnp.asarray(array[0]) for name, array in batch.items()}


def compiler_flops(config: models.ModelConfig, rows: dict) -> float:
    """FLOPs that the compiler counts for the loss and its gradient.

    It counts the body of the loop over layers once, whatever its length: a program of one layer, times the layers. What
    stands outside the loop (embedding, head) is a few operations a token.
    """
    one = config.replace(num_layers=1)
    shapes = jax.eval_shape(lambda key: models.init(one, key), jax.random.key(0))
    program = jax.jit(jax.grad(lambda params, rows: reward.comparison_loss(one, params, rows, None)[0]))
    return config.num_layers * program.lower(shapes, rows).compile().cost_analysis()["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="gpt3-125m", choices=sorted(models.SIZES))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--completions", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--at_least", type=float, default=2.5, help="the speed-up asked for")
    args = parser.parse_args()
    config = models.SIZES[args.size].replace(head="scalar")
    params = models.init(config, jax.random.key(0))

    step = jax.jit(jax.value_and_grad(functools.partial(reward.comparison_loss, config), has_aux=True))
    forms = {
        "shared": microbatch(args, config.vocab_size, True),
        "separate": microbatch(args, config.vocab_size, False),
    }
    results = {name: jax.block_until_ready(step(params, rows, None)) for name, rows in forms.items()}  # compiles
    seconds = {name: [] for name in forms}
    for _ in range(args.repeats):
        for name, rows in forms.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(params, rows, None))
            seconds[name].append(time.perf_counter() - begin)

    table = {}
    for name, rows in forms.items():
        (_, aux), _ = results[name]
        table[name] = (statistics.median(seconds[name]), compiler_flops(config, rows), float(aux["flops"]))
        spent, compiled, model = table[name]
        flops = f"FLOPs: compiler {compiled:.3e}, model {model:.3e}"
        print(f"{name:9} {float(aux['tokens']):6.0f} tokens {spent:8.3f} s  {flops}")
    faster, compiled, model = (b / a for a, b in zip(*table.values(), strict=True))
    print(f"separate / shared: time {faster:.2f}, compiler FLOPs {compiled:.2f}, model FLOPs {model:.2f}")
    ((left, _), left_gradient), ((right, _), right_gradient) = results.values()
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, left_gradient, right_gradient)) / optax.tree.norm(right_gradient)
    print(f"losses {float(left):.7f} and {float(right):.7f}; gradients apart by {float(apart):.1e} of their norm")
    sys.exit(0 if faster >= args.at_least else 1)


if __name__ == "__main__":
    main()
