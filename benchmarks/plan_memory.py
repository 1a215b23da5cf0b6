"""The memory that `--plan=cpu:1` says a program takes, beside what the process takes when it runs.

    python benchmarks/plan_memory.py --stage=sft

Stages: sft, reward and ppo (its learning, with the pretraining term) of GPT-3 125M in float32 on short rows, so that
what is measured is the state, its gradients and the temporaries of the optimiser. The program is compiled first; then
its arguments are made, zeros, and it runs once. Measured is the most that the process held by then, above what it held
before the arguments were made (VmHWM and VmRSS of Linux).
"""

import argparse
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from configs import common
from instructgpt_jax.plan import answer, command, shapes, topology

SIZE, LENGTH = "gpt3-125m", 128


def config_of(stage: str):
    """A configuration of two rows of 128 tokens."""
    network = common.network(SIZE)
    if stage == "ppo":
        config = common.ppo(1e-5, 1e-5, 27.8)
        config.models.policy, config.models.reward = network, common.network(SIZE)
        rows = {"row_length": LENGTH, "microbatch_rows": 2, "ptx_row_length": LENGTH, "ptx_microbatch_rows": 2}
        config.ppo.update({"batch_size": 4, "num_minibatches": 2, "ptx_ratio": 1, "iterations": 100} | rows)
        config.ppo.update({"max_prompt_length": LENGTH // 2, "response_length": LENGTH // 2})
        return config
    config = common.config(stage)
    config.models.model = network
    config[stage] = common.rankings(1e-5, 2) if stage == "reward" else common.fine_tuning(1e-5, 2, 1, 0.0)
    config[stage].update({"row_length": LENGTH, "microbatch_rows": 2})
    if stage == "reward":
        config.reward.max_completions = 2
    return config


def held(name: str) -> int:
    """Bytes of the process by a line of /proc: VmRSS, or VmHWM, the most since it was last reset."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("sft", "reward", "ppo"), default="sft")
    stage = parser.parse_args().stage
    found = topology.describe("cpu:1")
    _, mesh, planned = command._prepared(config_of(stage), found, shapes.Known({}, {}), "")
    name = "learn" if stage == "ppo" else "update"
    program = planned.programs[name]
    with jax.set_mesh(mesh):
        predicted = answer.of(program, name, found, mesh, {}).total
        function, arguments = program.make(None)
        compiled = function.lower(*arguments).compile()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = held("VmRSS")
        filled = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype, device=x.sharding), arguments)
        beside = {"frozen": [jnp.ones(x.shape, x.dtype, device=x.sharding) for x in jax.tree.leaves(
            [program.resident.get(part) for part in ("reference", "reward model")])]}  # fmt: skip
        jax.block_until_ready((compiled(*filled), beside))
        measured = held("VmHWM") - before
    print(f"{stage} {name}: predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB, "
          f"{100 * (predicted / measured - 1):+.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
