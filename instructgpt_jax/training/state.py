"""The training state, gradients over microbatches, and the step that applies them.

Everything here is a pure function of its arguments and is jitted by the stage that calls it.
"""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax

from instructgpt_jax.sharding import TRAIN_RULES, constrain_params

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
    """What one optimiser owns.

    Attributes:
      step: () int32, number of optimiser updates made.
      params: parameter tree, float32.
      opt_state: state of the optax transformation.
      ema: tree like `params`, float32, or None where no average is kept.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None = None


def create(params: PyTree, tx: optax.GradientTransformation, with_ema: bool) -> TrainState:
    """A state at step 0. The average, where wanted, starts as a copy: donated buffers must not alias."""
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), ema=ema)


def count_nonempty(segments: jax.Array) -> jax.Array:
    """Number of microbatches to run: one past the last that holds a token.

    Args:
      segments: (M, B, T) int32, 0 = padding.

    Returns:
      () int32 in [0, M], the trip count of `accumulate_gradients`.
    """
    chex.assert_rank(segments, 3)
    nonempty = jnp.any(segments > 0, axis=(1, 2))  # (M,)
    return jnp.max(jnp.where(nonempty, jnp.arange(1, segments.shape[0] + 1), 0)).astype(jnp.int32)


def accumulate_gradients(
    loss_fn: Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: PyTree,
    microbatches: PyTree,
    trip_count: jax.Array,
    start: PyTree | None = None,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Sums the gradients of `loss_fn` over the first `trip_count` microbatches.

    The loop's trip count is a traced scalar, so empty microbatches at the end cost nothing although their shapes
    are static; each gradient is taken inside the loop's body, so only one microbatch's activations are alive. Under a
    mesh the running sum is sharded like the parameters.

    Args:
      loss_fn: `(params, microbatch, index) -> (total, sums)`; `total` () float32 is what is differentiated, a sum
        (or a share of the batch's mean), never a mean of the microbatch alone; `sums` holds whatever adds up.
      params: parameter tree.
      microbatches: tree of arrays with the same leading axis M.
      trip_count: () int32, `count_nonempty` of the batch. With M = 1 there is no loop and it is not read.
      start: gradients to add to (another loss of the same network), or None for zeros.

    Returns:
      (gradients like `params` in float32, `sums` added up; floating sums in float32).
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(microbatches)}
    if len(lengths) != 1:
        raise ValueError(f"microbatches must share one leading axis, got lengths {sorted(lengths)}")
    gradient_fn = jax.grad(loss_fn, has_aux=True)

    def one(index):
        microbatch = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, axis=0, keepdims=False), microbatches
        )
        grads, sums = gradient_fn(params, microbatch, index)
        # Left to the compiler, each device would hold and add the whole gradient when the rows are sharded.
        return constrain_params(_float32(grads), TRAIN_RULES), _float32(sums)

    if lengths == {1}:
        grads, sums = one(jnp.zeros((), jnp.int32))
        return (grads if start is None else jax.tree.map(jnp.add, start, grads)), sums
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.zeros((), jnp.int32)))
    carry = (constrain_params(zeros[0], TRAIN_RULES) if start is None else start, zeros[1])
    return jax.lax.fori_loop(0, trip_count, lambda index, carry: jax.tree.map(jnp.add, carry, one(index)), carry)


def apply_gradients(
    state: TrainState, grads: PyTree, tx: optax.GradientTransformation, ema_decay: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser update: `params + tx.update(grads)`, then `ema = decay * ema + (1 - decay) * params`.

    Args:
      state: the state before the update; `state.ema` is left out when it is None.
      grads: tree like `state.params`; clipping is part of `tx`, so the norm reported is the one before it.
      tx: the optimiser of `state.opt_state`.
      ema_decay: decay of the average, in [0, 1); not read when `state.ema` is None.

    Returns:
      (new state, norms), norms = `gradient_norm`, `update_norm`, `parameter_norm`: global L2 norms, () float32, the
      last after the update, so that a non-finite new parameter shows in this step's metrics.
    """
    chex.assert_trees_all_equal_shapes(grads, state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: ema_decay * e + (1.0 - ema_decay) * p.astype(e.dtype), ema, params)
    norms = {
        "gradient_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
    }
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), norms


def _float32(tree: PyTree) -> PyTree:
    """Floating leaves in float32, others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
