"""Seconds of a PPO iteration by phase; real tokens a second on ragged lengths; tokens a second of published work.

    python benchmarks/ppo.py [--iterations=3] [--peer NAME="PYTHON SCRIPT ARGUMENTS" …] [--rounds=2]
    python benchmarks/ppo.py --lengths [--shrink=8]
    python benchmarks/ppo.py --deepspeed [--shrink=64]

The first form: four networks of GPT-2's 124M shape, 16 prompts of 64 tokens, 64 response tokens each, 8 minibatches
of 2, so 8 Adam updates of the policy and 8 of the value model, float32, no pretraining term. Each `--peer` is the
command of another implementation of the same iteration; it and this one are run in turn, `--rounds` times, on the same
machine. A peer must end with a line of JSON that holds `iter_s`, the seconds of each iteration; the first is left out.

`--lengths`: prompts with the statistics of the paper's table 9 and responses of mixed length, packed against padded to
the batch maximum. `--deepspeed`: DeepSpeed-Chat's published workload, for a GPU.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from instructgpt_jax import episodes as ep
from instructgpt_jax import models, ppo, rollout
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.training import optimizer

GPT2 = models.SIZES["gpt3-125m"].replace(max_length=1024)
ADAM = dict(
    algorithm="adam", lr=1e-5, schedule="constant", final_fraction=0.0, warmup_steps=0, warmup_start=0.0, b1=0.9,
    b2=0.95, eps=1e-8, eps_form="optax", weight_decay=0.0, max_grad_norm=1.0,
)  # fmt: skip
SETTINGS = dict(
    kl_coef=0.02, temperature=1.0, gamma=1.0, lam=0.95, clip_range=0.2, clip_range_value=0.2, inner_epochs=1,
    whiten_rewards=False, whiten_advantages="batch", score_clip=0.0, missing_eos_score=None,
    adaptive_kl=dict(target=0.0), ema_decay=0.0, ptx_coef=0.0, old_logprobs="auto",
    policy_optimizer=ADAM, value_optimizer=ADAM,
)  # fmt: skip


def algorithm(policy: ModelConfig, value: ModelConfig, wave: int | None = None, eos_id: int | None = None, **settings):
    """A PPO run as `ppo_stage.build` would describe it, without data; the reward model has the value model's shape.

    Args:
      settings: those of `config.ppo` that are not in SETTINGS, or other than there.
    """
    config = ConfigDict(SETTINGS | settings)
    value = value.replace(head="scalar")
    tx = optimizer.make_optimizer(config.policy_optimizer, num_steps=10**6)
    return ppo.Algorithm(config, policy, value, value, policy_tx=tx, value_tx=tx, eos_id=eos_id, seed=0, wave=wave)


def random_weights(a: ppo.Algorithm) -> tuple[ppo.PPOState, dict]:
    """Fresh networks: the state, and the frozen two in the dtype they compute in."""

    def init(config, seed):
        return jax.jit(lambda key: models.init(config, key))(jax.random.key(seed))

    start = jax.jit(lambda *networks: ppo.start(a, *networks), donate_argnums=(0, 1))
    ref_policy, reward = (
        models.cast(init(config, seed), config.dtype) for seed, config in enumerate((a.policy, a.value))
    )
    return start(init(a.policy, 0), init(a.value, 1)), {"ref_policy": ref_policy, "reward": reward}


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> dict:
    """Prompts that all have `length` tokens."""
    tokens = np.random.default_rng(seed).integers(2, vocab_size, (count, length), dtype=np.int32)
    return {"prompts": jnp.asarray(tokens), "prompt_lengths": jnp.full(count, length, jnp.int32)}


class Stopwatch:
    """Wall-clock and processor seconds of named pieces of work, each waited for."""

    def __init__(self):
        self.seconds, self.processor = {}, {}

    def __call__(self, name, function, *arguments):
        wall, processor = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function(*arguments))
        self.seconds[name] = time.perf_counter() - wall
        self.processor[name] = time.process_time() - processor
        return result


def iterate(phases: ppo_stage.Phases, state: ppo.PPOState, frozen: dict, prompts: list[dict]):
    """One iteration on each of `prompts`, the first to compile.

    Returns:
      (Stopwatch, metrics) of each but the first, the state after the last, and its experience.
    """
    measured = []
    for batch in prompts:
        watch = Stopwatch()
        episodes, logprobs = watch("rollout", phases.rollout, state.policy.params, batch, state.step)
        experience, metrics = watch("experience", phases.experience, state, frozen, episodes, logprobs)
        state, metrics = watch("learn", phases.learn, state, experience, None, metrics)
        if not measured:
            seconds = ", ".join(f"{name} {s:.1f} s" for name, s in watch.seconds.items())
            print(f"first iteration, compilation included: {seconds}", flush=True)
        measured.append((watch, metrics))
    return measured[1:], state, experience


def updates_apart(a: ppo.Algorithm, state: ppo.PPOState, experience: ppo.Experience) -> Stopwatch:
    """Times one policy update and one value update, each a program of its own; uses the state up."""
    size = experience.old_values.shape[0] // a.config.num_minibatches
    minibatch = jax.tree.map(lambda x: x[:size], experience)
    packed = jax.jit(ep.pack, static_argnums=(1, 2))(minibatch.episodes, a.config.row_length, a.config.microbatch_rows)
    policy_step = jax.jit(lambda part: ppo.policy_step(a, part, minibatch, packed, None), donate_argnums=0)
    value_step = jax.jit(lambda part: ppo.value_step(a, part, minibatch, packed), donate_argnums=0)
    watch, policy, value = Stopwatch(), state.policy, state.value
    for _ in range(2):
        policy, _ = watch("  a policy update", policy_step, policy)
        value, _ = watch("  a value update", value_step, value)
    return watch


def iteration_by_phase(arguments) -> dict:
    """The first form: prints phases, returns what a peer prints."""
    prompt, response, minibatches = 64, 64, 8
    a = algorithm(
        GPT2, GPT2, response_length=response, row_length=prompt + response, microbatch_rows=16,
        num_minibatches=minibatches,
    )  # fmt: skip
    prompts = [random_prompts(16, prompt, GPT2.vocab_size, seed) for seed in range(arguments.iterations + 1)]
    measured, state, experience = iterate(ppo_stage.compile_phases(a), *random_weights(a), prompts)
    totals = print_phases([watch for watch, _ in measured])
    print_phases([updates_apart(a, state, experience)])
    return {"iter_s": [0.0, *totals], "rollout_s": [watch.seconds["rollout"] for watch, _ in measured]}


def print_phases(watches: list[Stopwatch]) -> list[float]:
    """Prints the medians of each phase; returns the seconds of each iteration."""
    print(f"{'median seconds':18} {'wall':>9} {'processor':>11}")
    for name in watches[0].seconds:
        print_row(name, [w.seconds[name] for w in watches], [w.processor[name] for w in watches])
    totals = [sum(w.seconds.values()) for w in watches]
    print_row("together", totals, [sum(w.processor.values()) for w in watches])
    return totals


def print_row(name: str, wall: list[float], processor: list[float]) -> None:
    print(f"{name:18} {statistics.median(wall):9.2f} {statistics.median(processor):11.2f}", flush=True)


def beside_peers(arguments) -> None:
    """Runs this iteration and the peers' in turn, each in its own process; prints medians and ratios."""
    own = [sys.executable, __file__, f"--iterations={arguments.iterations}"]
    commands = {"ours": own} | {name: command.split() for name, command in arguments.peer}
    seconds = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            iterations = json.loads(output.strip().splitlines()[-1])["iter_s"][1:]
            seconds[name] += iterations
            print(f"{name:16} {', '.join(f'{s:.2f}' for s in iterations)} s", flush=True)
    ours = statistics.median(seconds["ours"])
    for name, values in seconds.items():
        print(f"{name:16} median {statistics.median(values):6.2f} s   {statistics.median(values) / ours:5.2f} x ours")


# Tokens. Prompts as (median, sigma) of a lognormal distribution: those of PPO in table 9 have quartiles 19, 62, 179 and
# mean 166. Responses by their mean: what labelers wrote to customers' prompts, table 11. Both end at 1,024 (app. C).
PROMPTS, RESPONSE_MEAN, LIMIT = (62, 1.5), 88, 1024


def ragged_lengths(arguments) -> None:
    """The second form: lengths are those of the paper divided by `shrink`, everything else is small too.

    Both sides answer the same prompts with the same tokens, in waves of the same size, so with equal caches. The padded
    side takes its waves as they come and gives each episode a row as long as the longest prompt and response.
    """
    shrink, batch, wave = arguments.shrink or 8, 32, 8
    limit, vocab, eos = LIMIT // shrink, 1024, 1
    net = ModelConfig(
        vocab_size=vocab, num_layers=2, width=256, num_heads=4, mlp_width=1024, max_length=2 * limit, head_bias=True
    )
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(math.log(PROMPTS[0]), PROMPTS[1], (arguments.iterations + 1, batch)) / shrink
    lengths = np.clip(np.round(lengths), 1, limit).astype(np.int32)
    lengths[:, 0] = limit  # one program for every batch: the longest prompt is always there
    prompts = [
        {"prompts": jnp.asarray(rng.integers(2, vocab, (batch, limit)), jnp.int32), "prompt_lengths": jnp.asarray(row)}
        for row in lengths
    ]
    settings = dict(response_length=limit, row_length=2 * limit, num_minibatches=2)
    end = math.log((vocab - 1) / (RESPONSE_MEAN / shrink - 1))  # the bias that gives the end its probability

    def run(a, phases):
        state, frozen = random_weights(a)
        head = state.policy.params["head"]
        head["bias"] = head["bias"].at[eos].set(end)
        return iterate(phases, state, frozen, prompts)[0]

    results = {}
    with unittest.mock.patch.object(rollout, "PREFILL_CHUNK", max(rollout.PREFILL_CHUNK // shrink, 1)):
        a = algorithm(net, net, wave, eos, microbatch_rows=1, **settings)
        results["packed"] = run(a, ppo_stage.compile_phases(a))
        a = algorithm(net, net, wave, eos, microbatch_rows=16, **settings)
        with unittest.mock.patch.object(ep, "first_fit_decreasing", a_row_each):
            results["padded"] = run(a, ppo_stage.compile_phases(a)._replace(rollout=padded_rollout(a)))
    speeds = {}
    for name, measured in results.items():
        print(name)
        seconds = print_phases([watch for watch, _ in measured])
        tokens = [float(metrics["perf/tokens"]) for _, metrics in measured]
        speeds[name] = sum(tokens) / sum(seconds)
        print(f"real tokens an iteration {tokens}, {speeds[name]:,.0f} real tokens/s")
    print(f"packed {speeds['packed'] / speeds['padded']:.2f} x padded")


def a_row_each(lengths: jax.Array, row_length: int):
    """In place of episodes.first_fit_decreasing: every episode at the start of its own row."""
    zeros = jnp.zeros_like(lengths)
    return jnp.arange(lengths.shape[0], dtype=jnp.int32), zeros, zeros + 1


def padded_rollout(a: ppo.Algorithm):
    """ppo.rollout with waves in the order of the prompts."""

    def run(params, batch, iteration):
        wave = lambda x: x.reshape(-1, a.wave, *x.shape[1:])  # noqa: E731
        inputs = (batch["prompts"], batch["prompt_lengths"], jnp.arange(batch["prompt_lengths"].shape[0]))

        def one(inputs):
            prompts, lengths, episodes = inputs
            given = (a.policy, params, prompts, lengths, a.config.response_length, a.seed, a.config.temperature)
            return rollout.generate(*given, eos_id=a.eos_id, iteration=iteration, episodes=episodes)

        answers = jax.lax.map(one, jax.tree.map(wave, inputs))
        tokens, logprobs, mask = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), answers)
        return ep.Episodes(batch["prompts"], batch["prompt_lengths"], tokens, mask), logprobs

    return jax.jit(run)


def deepspeed_chat(arguments) -> None:
    """The third form: 1.3B actor and reference, 350M critic and reward model, 1,024 episodes of 256 + 256 tokens.

    DeepSpeed-Chat (Yao et al. 2023, table 1) counts prompt and generated tokens of 1,024 episodes with one update each
    of actor and critic. `shrink` makes the batch smaller and the networks tiny, to see that it runs.
    """
    shrink = arguments.shrink or 1
    batch, length, published = 1024 // shrink, 256, 3_212
    sizes = ("tiny", "tiny") if shrink > 1 else ("gpt3-1.3b", "gpt3-350m")
    policy, value = (models.SIZES[size].replace(dtype="bfloat16", remat="full") for size in sizes)
    a = algorithm(
        policy, value, wave=batch // 2, response_length=length, row_length=2 * length, microbatch_rows=min(32, batch),
        num_minibatches=1,
    )  # fmt: skip
    prompts = [random_prompts(batch, length, policy.vocab_size, seed) for seed in range(arguments.iterations + 1)]
    measured, _, _ = iterate(ppo_stage.compile_phases(a), *random_weights(a), prompts)
    seconds = statistics.median(print_phases([watch for watch, _ in measured]))
    speed = batch * 2 * length / seconds
    kind = jax.devices()[0].device_kind
    beside = f", {speed / published:.2f} x the {published:,} published for one A100-80G" if shrink == 1 else ""
    print(f"{kind}: {speed:,.0f} tokens/s{beside}")  # smaller networks are another workload
    memory = jax.devices()[0].memory_stats() or {}  # a CPU has none
    if "peak_bytes_in_use" in memory:
        print(f"peak of device memory: {memory['peak_bytes_in_use'] / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    pair = lambda text: text.split("=", 1)  # noqa: E731
    parser.add_argument("--peer", action="append", default=[], type=pair, metavar="NAME=COMMAND")
    parser.add_argument("--lengths", action="store_true")
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--shrink", type=int, help="divides lengths (8 by default), or the batch of --deepspeed (1)")
    arguments = parser.parse_args()
    if arguments.peer:
        beside_peers(arguments)
    elif arguments.lengths:
        ragged_lengths(arguments)
    elif arguments.deepspeed:
        deepspeed_chat(arguments)
    else:
        print(json.dumps(iteration_by_phase(arguments)))


if __name__ == "__main__":
    main()
