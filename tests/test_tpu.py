"""Programs for TPUs, compiled without one; skipped without the extra `plan`."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instructgpt_jax import models, sharding
from instructgpt_jax.models import ModelConfig, flash

pytest.importorskip("libtpu", reason="pip install -e .[plan]")

T = 256
CONFIG = ModelConfig(
    vocab_size=256,
    num_layers=2,
    width=128,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=256,
    max_length=T,
    positions="rotary",
    dtype="bfloat16",
    remat="light",
)


@pytest.fixture
def devices(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return lambda name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def gradient_program(config, mesh, branches: bool):
    """The lowered gradient of a sum over the hidden states of packed rows."""
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    describe = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    params = jax.tree.map(describe, shapes, sharding.param_shardings(mesh, shapes))
    row = jax.ShapeDtypeStruct((4, T), jnp.int32, sharding=NamedSharding(mesh, P(sharding.BATCH)))

    def total(params, tokens, positions, segments):
        hidden = models.hidden(config, params, tokens, positions, segments, segments if branches else None)
        return jnp.square(hidden).sum(dtype=jnp.float32)

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(total)).lower(params, row, row, row)


@pytest.mark.parametrize("windows,branches", [((0, 128), False), ((0,), True)])
def test_a_gradient_runs_splash_and_holds_no_scores(devices, windows, branches):
    """Windowed and dense layers or branches, grouped queries, rows and heads sharded."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices("v5e:2x2"))
    text = gradient_program(CONFIG.replace(windows=windows), mesh, branches).compile().as_text()
    kernels = set(re.findall(r"splash_mha_(fwd|dq|dkv)_segmented", text))
    assert kernels == {"fwd", "dq", "dkv"}
    assert f",{T},{T}]" not in text


def test_windows_over_branches_fall_back_with_a_word(devices, monkeypatch, caplog):
    flash._say_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices("v5e:2x2"))
    with caplog.at_level(logging.WARNING, logger="absl"):
        text = gradient_program(CONFIG.replace(windows=(0, 128)), mesh, branches=True).as_text()
    assert "tpu_custom_call" not in text and f"x{T}x{T}x" in text
    assert any("branches of a shared prompt; xla does it" in record.getMessage() for record in caplog.records)


def test_a_mesh_may_cut_the_axes_of_the_torus(devices):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 8}, devices("v5p:4x4x4"))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 8}
    assert len({device.id for device in mesh.devices.flat}) == 64
