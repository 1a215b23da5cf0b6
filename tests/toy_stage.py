"""A stage small enough to kill: a two-layer network on noisy data, with the shape of a real one.

As a script: `python toy_stage.py WORKDIR '{"config.key": value, …}'` runs it on one device; with two more arguments,
`PROCESS PORT`, as one of two processes.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.training import checkpoint, loop, optimizer, state

OPTIMIZER = dict(
    algorithm="adam", lr=0.01, schedule="constant", final_fraction=0.1, warmup_steps=0, warmup_start=0.0, b1=0.9,
    b2=0.95, eps=1e-8, eps_form="optax", weight_decay=0.1, max_grad_norm=1.0,
)  # fmt: skip
SPECS = {"in": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "out": {"kernel": P("tensor", "fsdp")}}


def config(**overrides):
    result = ConfigDict(
        dict(
            stage="toy",
            seed=1,
            models=dict(model=dict(size="toy", init_from="")),
            data=dict(demonstrations=("simulated:toy",), cache_dir="", allow_changed=False),
            toy=dict(num_steps=12, optimizer=OPTIMIZER, sleep=0.0, poison_step=-1),
            mesh=dict(data=1, fsdp=1, tensor=1),
            log=dict(wandb=""),
            log_every=1,
            eval_every=5,
            snapshot_every=0,
            watch=dict(factor=10.0, seconds=60.0, copies_every=3),
            checkpoint=dict(every=4, keep_last=2, best_metric="", best_mode="min"),
        )
    )
    result.update_from_flattened_dict(overrides)
    return result


def init_params(key):
    keys = jax.random.split(key, 2)
    return {
        "in": {"kernel": 0.3 * jax.random.normal(keys[0], (8, 16)), "bias": jnp.zeros((16,))},
        "out": {"kernel": 0.3 * jax.random.normal(keys[1], (16, 8))},
    }


def build(config, mesh):
    tx = optimizer.make_optimizer(config.toy.optimizer, config.toy.num_steps)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, P))
    everywhere = NamedSharding(mesh, P())
    abstract_params = jax.eval_shape(init_params, jax.random.key(0))
    state_shardings = state.TrainState(
        everywhere, shardings, optimizer.state_shardings(tx, abstract_params, shardings), shardings
    )
    rows = NamedSharding(mesh, P(None, ("data", "fsdp"), None))

    def init_fn():
        return state.create(init_params(jax.random.key(config.seed)), tx, with_ema=True)

    def predict(params, x):
        return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]

    def update_fn(current, frozen, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), current.step)

        def loss_fn(params, microbatch, index):
            noise = jax.random.normal(jax.random.fold_in(key, index), microbatch.shape)
            total = jnp.mean((predict(params, microbatch + 0.1 * noise) - frozen["scale"] * microbatch) ** 2)
            poison = jnp.where(current.step == config.toy.poison_step, jnp.nan, 1.0)
            return total * poison, {"loss": total}  # the gradient alone: the loss that is logged stays finite

        grads, sums = state.accumulate_gradients(loss_fn, current.params, batch, jnp.int32(2))
        current, norms = state.apply_gradients(current, grads, tx, ema_decay=0.9)
        metrics = {"toy/loss": sums["loss"], "perf/tokens": jnp.float32(32), "perf/flops": jnp.float32(1e4)}
        return current, metrics | {f"toy/{key}": value for key, value in norms.items()}

    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init_fn), state_shardings
    )
    abstract_batch = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32, sharding=rows)
    abstract_frozen = {"scale": jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)}
    update = jax.jit(update_fn, donate_argnums=0, out_shardings=(state_shardings, everywhere))

    def data(start):
        index = start
        while True:
            time.sleep(config.toy.sleep)
            host = np.random.default_rng(index).normal(size=(3, 8, 8)).astype(np.float32)
            yield jax.make_array_from_callback(host.shape, rows, lambda where, host=host: host[where])
            index += 1

    @jax.jit
    def error(params):
        x = jnp.linspace(-1, 1, 8)[None]
        return jnp.mean((predict(params, x) - x) ** 2)

    def evaluate(current, frozen):
        value = float(error(current.ema))
        return {"validation/loss": value}, [{"prompt": "é", "score": value}]

    return loop.Stage(
        init=jax.jit(init_fn, out_shardings=state_shardings),
        frozen=lambda: {"scale": jax.device_put(jnp.float32(1.0), everywhere)},
        update=update,
        data=data,
        evaluate=evaluate,
        programs=lambda: {"update": (update, (abstract_state, abstract_frozen, abstract_batch))},
        num_steps=config.toy.num_steps,
        models={},
        read={},
        rates=lambda length, step: {"toy/lr": float(optimizer.make_schedule(config.toy.optimizer, length)(step))},
    )


def run(workdir, devices=None, **overrides):
    settings = config(**overrides)
    mesh = make_mesh(settings.mesh.to_dict(), devices)
    return loop.run(build(settings, mesh), settings, workdir)


def final_state(workdir):
    """The newest checkpoint as numpy arrays on one device."""
    settings = config()
    stage = build(settings, make_mesh(settings.mesh.to_dict(), jax.devices()[:1]))
    with checkpoint.Checkpoints(workdir, 100, "", "min") as checkpoints:
        return jax.tree.map(np.asarray, checkpoints.restore(stage.programs()["update"][1][0]))


def main(workdir, overrides, process="", port=""):
    if process:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(process))
        jax.config.update("jax_enable_compilation_cache", False)  # see main.keep_programs
    run(workdir, **json.loads(overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
