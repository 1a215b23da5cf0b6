"""--plan: seconds of programs whose cost is known, shapes and memory of stages, and what is refused."""

import doctest
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import common, ppo_1b3, ppo_ptx_1b3, pretrain_tiny, rlhf_init_1b3, sft_175b
from instructgpt_jax import models, networks, sharding
from instructgpt_jax.plan import answer, command, cost, flags, hlo, rings, sampling, search, shapes, topology
from instructgpt_jax.plan.rings import Group
from instructgpt_jax.plan.topology import Chip

CHIP = Chip(flops=1e14, bandwidth=1e12, capacity=16e9, link=1e10)
NOTHING = shapes.Known({}, {})


def text_of(function, *shapes_given):
    compiled = jax.jit(function).lower(*shapes_given).compile()
    return compiled.as_text()


def estimate(text, laps=(), group=None):
    return cost.estimate(text, CHIP, lambda op: group or Group(1, "none", 1, 1), dict(laps))


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_large_product_takes_its_flops_near_the_peak():
    found = estimate(text_of(lambda a, b: a @ b, array(2048, 4096), array(4096, 1024)))
    flops = 2 * 2048 * 4096 * 1024
    assert found.flops == flops
    assert flops / CHIP.flops < found.compute < 1.2 * flops / CHIP.flops


def test_an_elementwise_operation_takes_its_bytes_near_the_bandwidth():
    found = estimate(text_of(lambda a, b: a * b + 1.0, array(1024, 4096), array(1024, 4096)))
    moved = 3 * 4 * 1024 * 4096
    assert found.bytes == moved and found.flops == 0
    assert found.compute == pytest.approx(moved / (cost.MEMORY * CHIP.bandwidth))


@pytest.mark.parametrize("counted", [True, False])
def test_a_scan_takes_its_body_times_its_trips(counted):
    """`counted`: by the attribute of XLA for CPUs; TPU programs have none, so that the condition must tell."""

    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = text_of(scanned, array(256, 512), array(13, 512, 512))
    text = text if counted else text.replace("known_trip_count", "unknown")
    found = estimate(text)
    assert [loop.laps for loop in found.loops] == [13] and not found.loops[0].guessed
    assert found.flops == 13 * 2 * 256 * 512 * 512


def test_a_loop_that_hangs_on_data_takes_the_laps_of_its_function():
    def repeated(x, count):
        return jax.lax.fori_loop(0, count, lambda i, x: jnp.tanh(x @ x), x)

    text = text_of(repeated, array(256, 256), array(dtype=jnp.int32))
    name = f"{test_a_loop_that_hangs_on_data_takes_the_laps_of_its_function.__name__}.<locals>.repeated"
    one = 2 * 256**3
    assert estimate(text, {name: 7}).flops == 7 * one
    unknown = estimate(text)
    assert unknown.flops == one and unknown.loops[0].guessed


def test_a_collective_takes_its_ring():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    gather = jax.jit(lambda x: x * 2.0, out_shardings=NamedSharding(mesh, P()))
    reduce = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, P()))
    for function, kind, whole in ((gather, "all-gather", 4 * 1024 * 512), (reduce, "all-reduce", 4 * 512)):
        text = function.lower(x).compile().as_text()
        found = cost.estimate(text, CHIP, rings.groups_on(mesh.devices, mesh.axis_names, 4), {})
        ((key, some),) = found.collectives.items()
        assert key[:2] == (kind, "fsdp") and some.bytes == whole
        moved = (2 if kind == "all-reduce" else 1) * whole * 3 / 4
        assert some.seconds == pytest.approx(moved / (rings.LINKS * CHIP.link) + rings.LATENCY)


def test_a_ring_across_slices_waits_for_the_network():
    chip = CHIP._replace(network=1e8)
    inside, across = (rings.ring_seconds(chip, "all-reduce", 1e9, Group(8, "data", 2, slices)) for slices in (1, 2))
    # Eight devices, four in a slice: each carries a quarter of what its slice sends, and the links are faster.
    assert inside == pytest.approx(2e9 * 7 / 8 / (rings.LINKS * 2e10) + rings.LATENCY)
    assert across == pytest.approx(2e9 * 7 / 8 / 4 / (rings.LINKS * 1e8) + rings.LATENCY)


def test_a_transfer_between_slices_takes_the_network():
    text = """HloModule m

ENTRY %main (a: f32[64,8,128]) -> f32[64,8,128] {
  %a = f32[64,8,128]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[64,8,128]{2,1,0}, u32[], token[]) send(%a, %token), channel_id=5, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=4, is_host_transfer=true
  %done = (f32[64,8,128]{2,1,0}, token[]) recv-done(%recv), channel_id=4
  ROOT %b = f32[64,8,128]{2,1,0} get-tuple-element(%done), index=0
}
"""
    chip = CHIP._replace(network=1e8)
    found = cost.estimate(text, chip, lambda op: Group(1, "none", 1, 1), {})
    moved = 4 * 64 * 8 * 128  # twice the half of it
    assert found.overlapped == pytest.approx(moved / (rings.LINKS * 1e8) + rings.LATENCY)
    assert found.collectives[("all-reduce", "data", True)].bytes == moved and found.compute == 0


def test_products_of_the_tpu_compiler_are_convolutions():
    """A batched product is a convolution with a window over the batch, of which one tap meets each result."""
    text = """HloModule m

ENTRY %main (a: bf16[16,64,32], b: bf16[16,32,8]) -> bf16[16,64,8] {
  %a = bf16[16,64,32]{2,1,0} parameter(0)
  %b = bf16[16,32,8]{2,1,0} parameter(1)
  ROOT %c = bf16[16,64,8]{2,1,0} convolution(%a, %b), window={size=16 stride=15 pad=0_0 lhs_dilate=16}, \
dim_labels=0bf_0io->0bf
}
"""
    assert estimate(text).flops == 2 * 16 * 64 * 32 * 8


def test_a_text_s_frames_name_the_functions():
    module = hlo.parse(text_of(lambda x: jnp.tanh(x), array(8)))
    chains = [module.functions(op) for one in module.computations.values() for op in one.ops.values()]
    assert any("<lambda>" in name for chain in chains for name in chain)


def tiny(stage="pretrain"):
    config = pretrain_tiny.get_config("tiny")
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    return ConfigDict(config.to_dict())


def test_a_plan_knows_the_arrays_of_a_stage_and_touches_no_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = command.run(tiny(), "pretrain_tiny", flags.Asked("cpu:8", records=80, price=2.0))
    (program,) = told["stages"]["pretrain"]["programs"].values()
    shape = shapes.architecture(tiny(), "model", NOTHING)
    count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: models.init(shape, jax.random.key(0)))))
    held = program["bytes"]
    assert held["parameters"] > 4 * count / 8  # norms lie whole on each device
    assert held["parameters"] == pytest.approx(4 * count / 8, rel=0.1)
    assert held["moments"] == pytest.approx(2 * held["parameters"], rel=0.01)
    assert program["total_bytes"] == pytest.approx(sum(held.values()), abs=8) and program["fits"]
    assert told["stages"]["pretrain"]["run"]["steps"] == 10  # 80 records in batches of 8
    assert json.loads((tmp_path / "plans/pretrain_tiny_cpu_8/plan.json").read_text()) == told
    assert [path.name for path in tmp_path.iterdir()] == ["plans"]


def test_a_plan_of_ppo_has_its_four_networks_and_its_programs():
    config = ppo_1b3.get_config("tiny")
    config.ppo.update({"batch_size": 8, "num_minibatches": 1, "max_prompt_length": 8, "response_length": 8})
    config.ppo.update({"row_length": 16, "microbatch_rows": 8})
    found = topology.describe("cpu:8")
    _, mesh, planned = command._prepared(config, found, NOTHING, "")
    assert list(planned.programs) == ["rollout", "experience", "learn", "validation"]
    learn = planned.programs["learn"]
    with jax.set_mesh(mesh):
        told = answer.of(learn, "learn", found, mesh, {})
    assert {"policy moments", "policy average", "value moments", "reference", "reward model"} <= set(told.memory)
    # Forward and backward of policy and value over 8 episodes of 16 tokens.
    shape = shapes.architecture(config, "policy", NOTHING)
    scalar = shape.replace(head="scalar")
    assert learn.flops == pytest.approx(3 * 128 * (shape.flops_per_token(8.5) + scalar.flops_per_token(8.5)))


@pytest.mark.parametrize(("fraction_of", "records"), [("loss", 29), ("examples", 28.8)])
def test_texts_mixed_in_take_places_of_a_batch(fraction_of, records):
    """Three of 32 where they have a tenth of the loss: 877 updates for two epochs of the paper's demonstrations."""
    config = rlhf_init_1b3.get_config()
    config.sft.pretraining_fraction_of = fraction_of
    known = shapes.Known(shapes.parse_sizes("model=gpt3-1.3b"), {})
    _, _, planned = command._prepared(config, topology.describe("cpu:8"), known, "")
    assert planned.records == pytest.approx(records) and planned.epochs == 2


def test_shapes_follow_the_configurations_that_would_make_them():
    sizes = shapes.parse_sizes("policy=gpt3-1.3b,reward=gpt3-6.7b")
    config = ppo_1b3.get_config()
    found = [shapes.architecture(config, name, shapes.Known(sizes, {})).width for name in ("policy", "value", "reward")]
    assert found == [2_048, 4_096, 4_096]
    start = ConfigDict({"stage": "sft", "data": common.data(), "models": {"model": {"init_from": "runs/sft_175b"}}})
    assert shapes.architecture(start, "model", NOTHING).width == sft_175b.get_config().models.model.get("width", 12_288)
    with pytest.raises(ValueError, match=r"policy.init_from must have a shape.*--plan_size=policy=SIZE"):
        start.models = {"policy": {"init_from": "runs/nothing_there"}}
        shapes.architecture(start, "policy", NOTHING)


def test_a_network_is_abstract():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    shape = models.SIZES["gpt3-175b"]
    leaves = jax.tree.leaves(networks.abstract(shape, mesh))
    assert sum(x.size for x in leaves) > 174e9 and all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert answer.device_bytes(leaves) == pytest.approx(4 * 174.6e9 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("v7:2x2", "must be a topology"),
        ("v5p", "must be a topology"),
        ("cpu:0", "at least one device"),
        ("gpu:a9x1", "must name a GPU"),
    ],
)
def test_an_unknown_topology_is_one_line(name, wanted):
    with pytest.raises(ValueError, match=wanted) as error:
        topology.describe(name)
    assert "\n" not in str(error.value) and repr(name) in str(error.value)


def test_libtpu_that_is_missing_or_of_another_range_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs libtpu.*\[plan\]"):
        topology.describe("v5p:2x2x2")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: "99.1")
    with pytest.raises(ValueError, match="pip install 'libtpu.*got libtpu 99.1"):
        topology.describe("v5p:2x2x2")


def test_a_mesh_and_a_size_that_cannot_be_are_named():
    config = tiny()
    config.mesh = {"data": 3, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="config.mesh must multiply to the number of devices, 8"):
        command.run(config, "x", flags.Asked("cpu:8"))
    with pytest.raises(ValueError, match="--plan_size must be SIZE"):
        command.run(tiny(), "x", flags.Asked("cpu:8", size="gpt5"))


def test_a_gpu_without_the_plugin_is_arithmetic(monkeypatch):
    monkeypatch.setattr(topology, "_has_plugin", lambda: False)
    found = topology.describe("gpu:24GBx1")
    assert found.by.startswith("arithmetic") and found.chip.capacity == pytest.approx(24e9 * topology.MEMORY_FRACTION)
    _, mesh, planned = command._prepared(tiny(), found, NOTHING, "")
    told = answer.of(planned.programs["update"], "update", found, mesh, {})
    assert told.compiled == 0 and told.memory[answer.REST] > 0 and "arithmetic" in told.notes[0]


def test_mends_take_from_what_takes_the_most():
    config = ppo_1b3.get_config()
    config.ppo.microbatch_rows = 16
    config.models.policy.remat = "light"

    def mends(blame, name):
        one = answer.Answer({blame: 2.0, "other": 1.0}, 1.0, 0, 0, 1, 0, 0, [], {}, [])
        return search.mends(config, one, name, 8)

    assert mends("cache", "rollout")[0] == {"rollout.wave": 64}
    assert mends("cache", "rollout")[-1] == {"rollout.cache": "int8"}
    config.ppo.old_logprobs = "sampling"  # which int8 does not allow
    assert {"rollout.cache": "int8"} not in mends("cache", "rollout")
    assert mends(answer.REST, "learn")[:2] == [{"ppo.microbatch_rows": 8}, {"models.policy.remat": "full"}]
    assert mends("value moments", "learn")[0] == {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}


def test_a_cache_in_8_bits_has_its_scales_with_it():
    mesh, sizes = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1}), {}
    for cache in ("full", "int8"):
        network = models.SIZES["gpt3-6.7b"].replace(dtype="bfloat16")  # heads of 128
        sizes[cache] = sampling.cache_bytes(sampling.Sampled(network, 8, 100, 10, 50.0, cache), mesh)
    assert sizes["full"] == 2 * 32 * 100 * 4096 * 2 and sizes["int8"] / sizes["full"] == 132 / 256


def test_depths_are_extrapolated():
    assert answer._extrapolated(10.0, 14.0, (2, 4, 24)) == 54.0
    assert answer._extrapolated(10.0, ()) == 10.0


@pytest.mark.parametrize("module", [answer, flags, hlo, rings])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_compiler_options_are_those_of_the_run():
    given = "--xla_tpu_scoped_vmem_limit_kib=65536 --nothing --xla_flag"
    assert flags.options(given) == {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_flag": "true"}


def test_sampling_is_known_by_the_functions_of_rollout():
    """The names by which the laps of its loops are given are there in what is compiled."""
    config = ppo_1b3.get_config("tiny")
    config.ppo.update({"batch_size": 8, "num_minibatches": 1, "max_prompt_length": 8, "response_length": 8})
    config.ppo.update({"row_length": 512, "max_prompt_length": 64, "response_length": 448})
    _, mesh, planned = command._prepared(config, topology.describe("cpu:8"), NOTHING, "")
    function, arguments = planned.programs["rollout"].make(1)
    with jax.set_mesh(mesh):
        text = function.lower(*arguments).compile().as_text()
    laps = planned.programs["rollout"].laps
    found = cost.estimate(text, CHIP, rings.groups_on(mesh.devices, mesh.axis_names, 4), laps)
    # The loop of each read, for the steps whose longest sequence has 64 to 128 tokens, to 256, to 511.
    assert [loop.laps for loop in found.loops if loop.function.endswith("/_decode")] == [65, 128, 255]
    assert {loop.function for loop in found.loops if loop.guessed} == {"_run.<locals>.loop"}
    assert np.isfinite(found.seconds)


def test_programs_compile_for_tpus_that_are_not_here(tmp_path):
    """PPO on the chip that Colab has, and an update on two slices, whose gradients are summed inside each first."""
    pytest.importorskip("libtpu")
    config = ppo_ptx_1b3.get_config("tiny")
    told = command.run(config, "ppo", flags.Asked("v5e:1x1", out=str(tmp_path / "one")))["stages"]["ppo"]
    assert set(told["programs"]) == {"rollout", "experience", "learn", "validation"} and told["fits"]
    assert told["step"]["seconds"] > 0
    notes = told["programs"]["learn"]["notes"]
    assert not any("run once" in note for note in notes), notes  # the laps of every loop are known
    decode = told["programs"]["rollout"]["decode"]
    assert decode["milliseconds"] > decode["limit_milliseconds"] > 0

    config = tiny()
    config.models.model.update({"width": 256, "mlp_width": 1024})
    config.mesh = {"data": 2, "fsdp": -1, "tensor": 1, "slices": 2}
    told = command.run(config, "pretrain", flags.Asked("2xv5e:2x2", out=str(tmp_path / "two")))
    program = told["stages"]["pretrain"]["programs"]["update"]
    (between,) = (one for one in program["collectives"] if one["axes"] == "data")
    share = program["bytes"]["gradients"]  # of a device, once they were summed and scattered inside the slice
    assert between["kind"] == "all-reduce" and between["overlapped"]
    assert share <= between["bytes"] < 2 * share
    chip = topology.TPUS["v5e"]
    assert between["seconds"] > between["bytes"] / chip.network  # there and back, half of it each


def test_a_cache_is_moved_about_on_tpus_without_copies_of_it():
    """On a mesh with `tensor` in the memory order of decoding, which its loops do not leave."""
    pytest.importorskip("libtpu")
    settings = ConfigDict({"data": 1, "fsdp": 4, "tensor": 2, "slices": 1})
    mesh = sharding.make_mesh(settings, topology.describe("v5e:2x4").devices)
    config = models.SIZES["gpt3-125m"].replace(num_layers=8, width=1024, num_heads=8, dtype="bfloat16")
    spread = lambda x, *axes: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))  # noqa: E731
    with jax.set_mesh(mesh):
        empty = jax.eval_shape(lambda: models.init_cache(config, 64, 256))
        assert len(empty.keys) == 1, "layers of a TPU are one array"
        keys = (spread(empty.keys[0], sharding.BATCH, None, "tensor"),)
        cache = models.Cache(keys, keys, spread(empty.positions, sharding.BATCH))

        def moved(cache, column, kept):
            rewound = cache.rewound(column)
            return rewound, rewound.selected(kept)

        column, kept = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((4, 4), np.int32)
        compiled = jax.jit(moved, donate_argnums=0).lower(cache, column, kept).compile()
    account = compiled.memory_analysis()
    assert keys[0].shape == (64, 8, 8, 256, 128)
    assert account.temp_size_in_bytes < account.argument_size_in_bytes / 3, account
    assert "[16,8,4,256,128]{4,0,2,3,1" in compiled.as_text()  # slots lie beside each other, columns further apart
