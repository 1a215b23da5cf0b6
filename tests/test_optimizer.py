"""The optimiser against plain loops in float64, its schedules at known points, its mask and its shardings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from instructgpt_jax import models
from instructgpt_jax.sharding import make_mesh, param_shardings, path_name
from instructgpt_jax.training import optimizer


def config(**changes):
    result = ConfigDict(
        dict(
            algorithm="adam", lr=0.1, schedule="constant", final_fraction=0.1, warmup_steps=0, warmup_start=0.0,
            b1=0.9, b2=0.95, eps=1e-8, eps_form="optax", weight_decay=0.0, max_grad_norm=0.0,
        )
    )  # fmt: skip
    result.update(changes)
    return result


def run(settings, gradients, start):
    tx = optimizer.make_optimizer(settings, num_steps=len(gradients))
    params = start
    state = tx.init(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("form", ["optax", "tensorflow"])
def test_adam_against_a_loop(form):
    settings = config(eps=1e-3, eps_form=form, weight_decay=0.2, lr=0.05)
    rng = np.random.default_rng(0)
    gradients = [{"kernel": rng.normal(size=3) * 1e-2, "bias": rng.normal(size=3) * 1e-2} for _ in range(6)]
    start = {"kernel": np.array([1.0, -2.0, 3.0]), "bias": np.array([0.5, 0.5, 0.5])}
    got = run(settings, [jax.tree.map(jnp.float32, g) for g in gradients], jax.tree.map(jnp.float32, start))
    for name, decay in (("kernel", 0.2), ("bias", 0.0)):
        p, m, v = start[name].copy(), 0.0, 0.0
        for t, grads in enumerate(gradients, start=1):
            g = grads[name]
            m = 0.9 * m + 0.1 * g
            v = 0.95 * v + 0.05 * g * g
            if form == "optax":
                step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)
            else:
                step = math.sqrt(1 - 0.95**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-3)
            p = p - 0.05 * (step + decay * p)
        np.testing.assert_allclose(got[name], p, rtol=2e-6)


def test_tensorflow_form_by_hand():
    # One step, g = 1e-4, b2 = 0.999, eps = 1e-5: m = 1e-5, v = 1e-11; sqrt(1 - b2) / (1 - b1) = 0.316228, and
    # sqrt(v) + eps = 3.16228e-6 + 1e-5, so the step is lr * 0.316228 * 1e-5 / 1.316228e-5 = lr * 0.240253.
    # With eps after the correction it is lr * 1e-4 / (1e-4 + 1e-5) = lr * 0.909091: 3.8 times larger.
    settings = dict(b2=0.999, eps=1e-5, lr=1.0)
    gradient, start = [{"w": jnp.float32([1e-4])}], {"w": jnp.zeros(1)}
    tensorflow = run(config(eps_form="tensorflow", **settings), gradient, start)["w"][0]
    np.testing.assert_allclose(tensorflow, -0.240253, rtol=1e-5)
    np.testing.assert_allclose(run(config(**settings), gradient, start)["w"][0], -0.909091, rtol=1e-5)


def test_the_forms_agree_without_eps():
    gradients = [{"w": jnp.float32([0.3, -2.0])}, {"w": jnp.float32([-0.1, 5.0])}, {"w": jnp.float32([0.7, 0.2])}]
    start = {"w": jnp.ones(2)}
    results = [run(config(eps=0.0, eps_form=form), gradients, start)["w"] for form in ("optax", "tensorflow")]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    # Norm of all the leaves: sqrt(3^2 + 4^2 + 12^2) = 13. A large eps makes Adam nearly linear, so the clip shows.
    gradient = {"a": jnp.float32([3.0, 4.0]), "b": jnp.float32([12.0])}
    start = jax.tree.map(jnp.zeros_like, gradient)
    clipped = run(config(eps=1e4, max_grad_norm=1.0), [gradient], start)
    by_hand = run(config(eps=1e4), [jax.tree.map(lambda g: g / 13, gradient)], start)
    plain = run(config(eps=1e4), [gradient], start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, by_hand)
    assert float(plain["b"][0] / clipped["b"][0]) == pytest.approx(13, rel=1e-2)


def test_schedules_at_known_points():
    cosine = optimizer.make_schedule(config(schedule="cosine", lr=2.0), num_steps=100)
    assert [float(cosine(n)) for n in (0, 50, 100, 200)] == pytest.approx([2.0, 1.1, 0.2, 0.2])
    quarter = 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2
    assert float(cosine(25)) == pytest.approx(quarter)
    linear = optimizer.make_schedule(config(schedule="linear", final_fraction=0.0, lr=2.0), num_steps=10)
    assert [float(linear(n)) for n in (0, 5, 10)] == pytest.approx([2.0, 1.0, 0.0])
    # PPO: 10 steps from a tenth of the rate, then constant.
    warm = optimizer.make_schedule(config(warmup_steps=10, warmup_start=0.1, lr=1.0), num_steps=1000)
    assert [float(warm(n)) for n in (0, 5, 10, 999)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    # The cosine reaches its end at num_steps with a warm-up too.
    both = optimizer.make_schedule(config(schedule="cosine", warmup_steps=20, lr=1.0), num_steps=120)
    assert [float(both(n)) for n in (0, 10, 20, 70, 120)] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "cosin"}, "optimizer.schedule must be .* got 'cosin'"),
        ({"algorithm": "lion"}, "optimizer.algorithm must be .* got 'lion'"),
        ({"eps_form": "torch"}, "optimizer.eps_form must be .* got 'torch'"),
        ({"warmup_steps": 11}, r"optimizer.warmup_steps must be in \[0, 10\], got 11"),
    ],
)
def test_bad_settings_name_their_key(changes, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make_optimizer(config(**changes), num_steps=10)


def real_params(head):
    settings = models.SIZES["tiny"]
    return jax.eval_shape(lambda: models.init(settings.replace(head=head), jax.random.key(0)))


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_decay_mask_of_the_real_networks(head):
    params = real_params(head)
    mask = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
    decayed = {path_name(path) for path, decays in mask if decays}
    assert {"embed/tokens", "blocks/attention/out/kernel", "blocks/mlp/up/kernel"} <= decayed
    assert ("scalar_head/kernel" in decayed) == (head == "scalar")
    kept = {path_name(path) for path, decays in mask if not decays}
    assert {"blocks/norm1/scale", "final_norm/scale", "blocks/mlp/up/bias", "blocks/attention/query/bias"} <= kept
    assert all(name.endswith(("bias", "scale")) for name in kept)


def test_muon_against_a_loop():
    """Orthogonal momentum for the blocks' kernels, joined over heads; Adam, as it is alone, for everything else."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": {"tokens": (5, 8)},
        "blocks": {
            "attention": {"query": {"kernel": (2, 8, 2, 3), "bias": (2, 2, 3)}, "out": {"kernel": (2, 2, 3, 8)}},
            "mlp": {"up": {"kernel": (2, 8, 12)}},
        },
    }
    draw = lambda: jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
    gradients, start = [draw() for _ in range(3)], draw()
    settings = dict(lr=0.05, weight_decay=0.2)
    single = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
    got = run(config(algorithm="muon", **settings), [single(g) for g in gradients], single(start))
    adam = run(config(**settings), [single(g) for g in gradients], single(start))
    for name in ("embed/tokens", "blocks/attention/query/bias"):
        np.testing.assert_array_equal(leaf(got, name), leaf(adam, name))
    for name, rows in (("attention/query", 8), ("attention/out", 6), ("mlp/up", 8)):
        name = f"blocks/{name}/kernel"
        p, m = leaf(start, name).reshape(2, rows, -1).copy(), 0.0
        for t, tree in enumerate(gradients, start=1):
            g = leaf(tree, name).reshape(p.shape)
            m = 0.95 * m + 0.05 * g
            ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            step = np.stack([newton_schulz(x) for x in ahead]) * 0.2 * math.sqrt(max(p.shape[1:]))
            p = p - 0.05 * (step + 0.2 * p)
        np.testing.assert_allclose(leaf(got, name).reshape(p.shape), p, rtol=1e-4, atol=1e-5)


def newton_schulz(x):
    """Five steps of x <- a x + b (x x') x + c (x x')^2 x: singular values go near 1."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    assert (np.linalg.svd(x)[1] < 1.3).all()
    return x


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return np.asarray(tree)


@pytest.mark.parametrize("algorithm", ["adam", "muon"])
def test_a_real_tree_on_a_mesh(algorithm):
    """Moments lie as their parameters do, and an update is that of one device."""
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    params = models.init(models.SIZES["tiny"], jax.random.key(0))
    shardings = param_shardings(mesh, params)
    tx = optimizer.make_optimizer(config(algorithm=algorithm), num_steps=10)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    wanted, _ = jax.jit(tx.update)(gradients, jax.jit(tx.init)(params), params)
    state = jax.jit(tx.init, out_shardings=optimizer.state_shardings(tx, params, shardings))(params)
    updates, _ = jax.jit(tx.update)(jax.device_put(gradients, shardings), state, jax.device_put(params, shardings))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), updates, wanted)
    state = {path_name(path): moment for path, moment in jax.tree_util.tree_leaves_with_path(state)}
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        name = path_name(path)
        moments = [moment for key, moment in state.items() if key.endswith(f"/{name}")]
        matrix = name.startswith("blocks") and name.endswith("kernel")
        assert len(moments) == (1 if matrix and algorithm == "muon" else 2), name
        assert all(moment.sharding == sharding for moment in moments), name


@pytest.mark.parametrize("form", ["optax", "tensorflow"])
def test_moments_are_sharded_like_their_parameters(form):
    mesh = make_mesh(dict(data=1, fsdp=2, tensor=4))
    params = {"a": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones((16,))}}
    specs = {"a": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    tx = optimizer.make_optimizer(config(eps_form=form, weight_decay=0.1, max_grad_norm=1.0), num_steps=10)
    wanted = optimizer.state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=wanted)(jax.device_put(params, shardings))
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    for moments in (adam.mu, adam.nu):
        assert moments["a"]["kernel"].addressable_shards[0].data.shape == (4, 4)
        assert moments["a"]["bias"].addressable_shards[0].data.shape == (4,)
    assert adam.count.sharding.is_fully_replicated
