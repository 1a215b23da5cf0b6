"""AdamW, or Muon, with global-norm clipping and the paper's schedules, built from one config section.

The section (`config.<stage>.optimizer`) holds `algorithm, lr, schedule, final_fraction, warmup_steps, warmup_start, b1,
b2, eps, eps_form, weight_decay, max_grad_norm`; InstructGPT trains every model by Adam with betas (0.9, 0.95)
(appendix C).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from instructgpt_jax.sharding import path_name

PyTree = Any


def make_schedule(config, num_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates made before this one.

    Warm-up goes linearly from `warmup_start * lr` to `lr` over `warmup_steps` updates; the schedule then runs over
    the remaining `num_steps - warmup_steps`: 'constant' stays at lr, 'linear' and 'cosine' reach
    `final_fraction * lr` at `num_steps` and stay there.

    Args:
      config: the optimiser section.
      num_steps: updates of the whole run.
    """
    if not 0 <= config.warmup_steps <= num_steps:
        raise ValueError(f"optimizer.warmup_steps must be in [0, {num_steps}], got {config.warmup_steps!r}")
    rest = max(num_steps - config.warmup_steps, 1)
    if config.schedule == "constant":
        main = optax.constant_schedule(config.lr)
    elif config.schedule == "linear":
        main = optax.linear_schedule(config.lr, config.lr * config.final_fraction, rest)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_fraction)
    else:
        raise ValueError(f"optimizer.schedule must be 'constant', 'linear' or 'cosine', got {config.schedule!r}")
    if config.warmup_steps == 0:
        return main
    warmup = optax.linear_schedule(config.lr * config.warmup_start, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def decay_mask(params: PyTree) -> PyTree:
    """True for the leaves that weight decay shrinks: kernels and embeddings; no bias, nothing of a norm.

    GPT-3 says only that decay 0.1 is used. Megatron-LM and nanoGPT, which reproduce it, decay every matrix; the token
    embedding is also the output matrix, so it decays like any other. The test goes by name: layers are stacked on a
    leading axis, so a bias has two axes or three, and the scalar head's kernel one.
    """

    def decays(path, _):
        name = path_name(path)
        return not (name.endswith(("bias", "scale")) or "norm" in name)

    return jax.tree_util.tree_map_with_path(decays, params)


def scale_by_adam_tensorflow(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with TensorFlow's epsilon, outside the bias correction:

        sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

    Kingma & Ba 2015, end of section 2 ("epsilon hat"); `tf.train.AdamOptimizer`. optax and PyTorch correct v first,
    so that eps weighs `sqrt(1 - b2^t)` times less: with eps 1e-5 and b2 0.999 their first steps are several times
    larger where gradients are small, which is the regime of early PPO.
    """

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=zeros(), nu=zeros())

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def matrices(params: PyTree) -> PyTree:
    """Which axes the kernels of the blocks sum over and which they write; None for every other leaf.

    Kernels are stacked over layers and keep heads apart: (layers, width, heads, head size) of queries, keys and values,
    (layers, heads, head size, width) of the output, (layers, in, out) of the MLP.
    """

    def axes(path, leaf):
        name = path_name(path)
        if not (name.startswith("blocks") and name.endswith("kernel")):
            return None
        first = leaf.ndim - 1 if name.endswith("out/kernel") else 2
        return MuonDimensionNumbers(tuple(range(1, first)), tuple(range(first, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def scale_by_matrix_rms(rms: float) -> optax.GradientTransformation:
    """Gives the orthogonal updates of `matrices` (their mean square is 1 / the longer side) entries of size `rms`."""

    def scale(update, axes):
        sides = (math.prod(update.shape[i] for i in side) for side in axes)
        return update * rms * math.sqrt(max(sides))

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, matrices(updates)))


def scale_by_muon_or(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, `adam` for embeddings, biases, norms and heads.

    The momentum of a matrix is replaced by the nearest orthogonal one (Newton-Schulz; Jordan et al. 2024). Entries of
    size 0.2, as Adam's have in practice, let learning rate and weight decay be those of AdamW (Liu et al. 2025, "Muon
    is scalable for LLM training", section 2.2).
    """
    muon = optax.chain(scale_by_muon(weight_dimension_numbers=matrices), scale_by_matrix_rms(0.2))

    def labels(params):
        is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
        return jax.tree.map(lambda axes: "muon" if axes else "adam", matrices(params), is_leaf=is_leaf)

    return optax.partition({"muon": muon, "adam": adam}, labels)


def make_optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Muon, decoupled weight decay (masked), learning rate.

    Args:
      config: the optimiser section; `algorithm` is 'adam' or 'muon', `max_grad_norm` 0 = no clipping, `weight_decay`
        0 = none.
      num_steps: updates of the whole run, for the schedule.
    """
    if config.eps_form == "optax":
        adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    elif config.eps_form == "tensorflow":
        adam = scale_by_adam_tensorflow(config.b1, config.b2, config.eps)
    else:
        raise ValueError(f"optimizer.eps_form must be 'optax' or 'tensorflow', got {config.eps_form!r}")
    if config.algorithm not in ("adam", "muon"):
        raise ValueError(f"optimizer.algorithm must be 'adam' or 'muon', got {config.algorithm!r}")
    steps = [scale_by_muon_or(adam) if config.algorithm == "muon" else adam]
    if config.max_grad_norm:
        steps.insert(0, optax.clip_by_global_norm(config.max_grad_norm))
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    steps.append(optax.scale_by_learning_rate(make_schedule(config, num_steps)))
    return optax.chain(*steps)


def state_shardings(tx: optax.GradientTransformation, params: PyTree, shardings: PyTree) -> PyTree:
    """Shardings of `tx.init(params)`: moments as their parameters, counters replicated.

    Without them `jit(tx.init)` leaves the moments, two thirds of the state, replicated on every device.

    Args:
      tx: the optimiser.
      params: parameter tree, arrays or ShapeDtypeStructs.
      shardings: tree like `params` of NamedSharding, all on one mesh.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return optax.tree.map_params(
        tx,
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # of `optax.partition`
    )
