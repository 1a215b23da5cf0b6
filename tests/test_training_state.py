"""Gradients over microbatches, and the step that applies them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructgpt_jax.sharding import make_mesh, param_shardings
from instructgpt_jax.training import state


def test_count_nonempty():
    segments = np.zeros((4, 2, 3), np.int32)
    assert int(state.count_nonempty(jnp.array(segments))) == 0
    segments[0, 1, 0] = 1
    segments[2, 0, 2] = 5  # a hole at 1 is run over, not cut off
    assert int(state.count_nonempty(jnp.array(segments))) == 3
    segments[3, 1, 1] = 1
    assert state.count_nonempty(jnp.array(segments)).dtype == jnp.int32
    assert int(state.count_nonempty(jnp.array(segments))) == 4


def loss_fn(params, microbatch, index):
    error = (microbatch["x"] @ params["w"] - microbatch["y"]) * (1.0 + index)
    return jnp.sum(error**2), {"loss": jnp.sum(error**2), "rows": jnp.int32(error.shape[0])}


def problem(microbatches, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    batch = {"x": jnp.array(rng.normal(size=(microbatches, 4, 3)), dtype), "y": jnp.ones((microbatches, 4), dtype)}
    return {"w": jnp.array([0.5, -1.0, 2.0], dtype)}, batch


def by_hand(params, batch, count):
    """d/dw of sum_m (1 + m)^2 |x_m w - y_m|^2 in float64."""
    w = np.asarray(params["w"], np.float64)
    gradient, loss = np.zeros(3), 0.0
    for m in range(count):
        x, y = np.asarray(batch["x"][m], np.float64), np.asarray(batch["y"][m], np.float64)
        gradient += 2 * (1 + m) ** 2 * x.T @ (x @ w - y)
        loss += (1 + m) ** 2 * np.sum((x @ w - y) ** 2)
    return gradient, loss


@pytest.mark.parametrize("total, count", [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_gradients_sum_over_the_trip_count(total, count):
    params, batch = problem(total)
    grads, sums = jax.jit(lambda n: state.accumulate_gradients(loss_fn, params, batch, n))(jnp.int32(count))
    gradient, loss = by_hand(params, batch, count)
    np.testing.assert_allclose(grads["w"], gradient, rtol=1e-5)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    assert int(sums["rows"]) == 4 * count and sums["rows"].dtype == jnp.int32


def test_microbatches_after_the_trip_count_are_not_run():
    params, batch = problem(4)
    batch["x"] = batch["x"].at[2:].set(jnp.nan)  # 0 * nan is nan: only not running them keeps it out
    grads, sums = jax.jit(lambda n: state.accumulate_gradients(loss_fn, params, batch, n))(jnp.int32(2))
    assert np.all(np.isfinite(grads["w"])) and np.isfinite(sums["loss"])


def test_sums_are_float32_whatever_the_parameters_are():
    params, batch = problem(3, jnp.bfloat16)
    grads, sums = state.accumulate_gradients(loss_fn, params, batch, jnp.int32(3))
    assert grads["w"].dtype == jnp.float32 and sums["loss"].dtype == jnp.float32
    # 1 + 255 halves of an ulp: in bfloat16 the running sum would stay at 1.
    ones = {"x": jnp.concatenate([jnp.ones((1, 1)), jnp.full((256, 1), 2.0**-9)]).astype(jnp.bfloat16)}
    linear = lambda p, m, i: (jnp.sum(p["w"] * m["x"]), {})  # noqa: E731
    grads, _ = state.accumulate_gradients(linear, {"w": jnp.ones((1,), jnp.bfloat16)}, ones, jnp.int32(257))
    assert float(grads["w"][0]) == 1.5


def test_one_microbatch_has_no_loop():
    for total, loops in ((1, False), (2, True)):
        params, batch = problem(total)
        text = str(jax.make_jaxpr(lambda n, p=params, b=batch: state.accumulate_gradients(loss_fn, p, b, n))(1))
        assert ("while[" in text) == loops


def test_unequal_leading_axes_are_refused():
    params, batch = problem(3)
    with pytest.raises(ValueError, match=r"one leading axis, got lengths \[2, 3\]"):
        state.accumulate_gradients(loss_fn, params, {"x": batch["x"], "y": batch["y"][:2]}, jnp.int32(2))


def test_running_sums_are_sharded_like_the_parameters():
    mesh = make_mesh(dict(data=1, fsdp=8, tensor=1))
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.ones((1, 64, 8))}}}}  # (L, D, F), D over fsdp
    shardings = param_shardings(mesh, params)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    x = jax.device_put(jnp.ones((3, 16, 64)), rows)

    def quadratic(params, microbatch, index):
        return jnp.sum((microbatch @ params["blocks"]["mlp"]["up"]["kernel"][0]) ** 2), {}

    def step(params, batch, count):
        return state.accumulate_gradients(quadratic, params, batch, count)[0]

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(jax.device_put(params, shardings), x, jnp.int32(3)).compile()
    grads = compiled(jax.device_put(params, shardings), x, jnp.int32(3))
    gradient, sharding = jax.tree.leaves(grads)[0], jax.tree.leaves(shardings)[0]
    assert gradient.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_allclose(gradient, np.full((1, 64, 8), 3 * 16 * 2 * 64.0))


def test_apply_gradients_by_hand():
    tx = optax.sgd(0.5)
    start = state.create({"w": jnp.float32([3.0]), "b": jnp.float32([1.0])}, tx, with_ema=True)
    grads = {"w": jnp.float32([6.0]), "b": jnp.float32([8.0])}
    after, norms = state.apply_gradients(start, grads, tx, ema_decay=0.9)
    assert int(after.step) == 1 and after.step.dtype == jnp.int32
    assert float(after.params["w"][0]) == 0.0 and float(after.params["b"][0]) == -3.0  # p - 0.5 g
    np.testing.assert_allclose([after.ema["w"][0], after.ema["b"][0]], [2.7, 0.6], rtol=1e-6)  # 0.9 p + 0.1 p'
    assert {key: float(value) for key, value in norms.items()} == {
        "gradient_norm": 10.0,
        "update_norm": 5.0,
        "parameter_norm": 3.0,
    }
    without = state.create({"w": jnp.float32([3.0])}, tx, with_ema=False)
    assert without.ema is None
    assert state.apply_gradients(without, {"w": jnp.float32([6.0])}, tx, ema_decay=0.9)[0].ema is None


def test_a_state_can_be_donated():
    tx = optax.adam(0.1)
    start = state.create({"w": jnp.ones(4)}, tx, with_ema=True)
    step = jax.jit(lambda s: state.apply_gradients(s, {"w": jnp.ones(4)}, tx, 0.9)[0], donate_argnums=0)
    assert int(step(step(start)).step) == 2  # fails if params and ema were one buffer
