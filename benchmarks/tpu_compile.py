"""TPU programs compiled on any machine: which attention kernel is in them, and the memory of a device.

    pip install -e .[plan]
    python benchmarks/tpu_compile.py --size=gpt3-1.3b --topology=v5e:2x2 --program=train
    python benchmarks/tpu_compile.py --size=llama2-7b --topology=v5p:4x4x4 --program=sft --rows=4 --hlo=sft_7b.hlo

Programs: `forward` (log-probabilities of packed rows), `train` (its gradients), `sft` (a whole update of the SFT stage:
loss, gradients, clipping, AdamW, norms), `score` (scores of up to 9 completions on branches of each shared prompt, four
prompts a row), `reward` (the gradients of their ranking loss) and `decode` (prompts of 1,024 tokens and 1,024 sampled
ones). With --hlo the compiled program is written for tools that read it, and the model FLOPs of a device are printed
beside it.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import common
from instructgpt_jax import models, reward, sharding
from instructgpt_jax.episodes import row_logprobs
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.rollout import generate
from instructgpt_jax.training import optimizer, supervised
from instructgpt_jax.training.supervised import language_model_loss

LLAMA2_7B = ModelConfig(
    vocab_size=32_000,
    num_layers=32,
    width=4_096,
    num_heads=32,
    mlp_width=11_008,
    max_length=4_096,
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    tied_embeddings=False,
)
SIZES = models.SIZES | {"llama2-7b": LLAMA2_7B}
T = 2_048
PASSES = {"forward": 1, "train": 3, "sft": 3, "score": 1, "reward": 3, "decode": 1}  # forward, and backward twice that


def abstract_params(config: ModelConfig, mesh) -> dict:
    shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
    describe = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(describe, shapes, sharding.param_shardings(mesh, shapes))


def abstract_rows(names, shape: tuple[int, ...], mesh) -> dict:
    """Packed rows; the last two axes are rows and tokens."""
    split = NamedSharding(mesh, P(*[None] * (len(shape) - 2), sharding.BATCH))
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name in names}


def build(program: str, config: ModelConfig, mesh, rows: int):
    """A jitted function and what it takes, for `rows` rows in all."""
    params = abstract_params(config, mesh)
    if program == "forward":
        function = functools.partial(row_logprobs, config.replace(remat="full"), temperature=1.0)
        batch = abstract_rows(("tokens", "positions", "segments", "predicts", "targets"), (rows, T), mesh)
        return jax.jit(lambda params, rows: function(params, rows)), (params, batch)
    names = ("tokens", "positions", "segments", "loss_mask")
    if program == "train":
        gradient = jax.grad(lambda p, batch: language_model_loss(config, p, batch, None)[0])
        shardings = jax.tree.map(lambda x: x.sharding, params)
        return jax.jit(gradient, out_shardings=shardings), (params, abstract_rows(names, (rows, T), mesh))
    if program == "sft":
        tx = optimizer.make_optimizer(common.optimizer(1e-5, "cosine"), 1_000)
        shardings = supervised.state_shardings(tx, params, mesh)
        loss = functools.partial(language_model_loss, config)
        update = functools.partial(supervised.update, loss=loss, count="loss_tokens", tx=tx, seed=0)
        state = supervised.abstract_state(params, tx, shardings)
        jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
        return jitted, (state, {}, abstract_rows(names, (1, rows, T), mesh))
    if program in ("score", "reward"):
        batch = abstract_rows(("tokens", "positions", "segments", "branches"), (rows, T), mesh)
        whole = sharding.replicated(mesh)
        for name, shape in (("ends", (4 * rows, 9, 2)), ("ranks", (4 * rows, 9))):
            batch[name] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
        if program == "score":
            return jax.jit(lambda p, batch: reward.row_scores(config, p, batch, None)), (params, batch)
        gradient = jax.grad(lambda p, batch: reward.comparison_loss(config, p, batch, None)[0])
        return jax.jit(gradient, out_shardings=jax.tree.map(lambda x: x.sharding, params)), (params, batch)
    prompts = abstract_rows(("prompts",), (rows, T // 2), mesh)["prompts"]
    lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=NamedSharding(mesh, P(sharding.BATCH)))
    decode = jax.jit(lambda p, prompts, lengths: generate(config, p, prompts, lengths, T // 2, 0))
    return decode, (params, prompts, lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt3-1.3b")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--program", choices=tuple(PASSES), default="train")
    parser.add_argument("--rows", type=int, default=4, help="rows of 2,048 tokens (decode: sequences) a device")
    parser.add_argument("--mesh", default="1,-1,1", help="data, fsdp, tensor")
    parser.add_argument("--layers", type=int, help="in place of the size's own: compile two depths, go on in a line")
    parser.add_argument("--options", default="", help="of the compiler: name=value,…")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--hlo", default="", help="where the compiled program goes")
    flags = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=flags.topology).devices
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, map(int, flags.mesh.split(",")), strict=True)), devices)
    config = SIZES[flags.size].replace(dtype="bfloat16", remat=flags.remat, attention=flags.attention)
    if flags.layers:
        config = config.replace(num_layers=flags.layers)
    if flags.program in ("score", "reward"):
        config = config.replace(head="scalar")
    rows = flags.rows * len(devices)
    function, arguments = build(flags.program, config, mesh, rows)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
        lowering, start = time.perf_counter() - start, time.perf_counter()
        compiled = lowered.compile(dict(option.split("=") for option in flags.options.split(",") if option))
    text = compiled.as_text()
    kernels = sorted(set(re.findall(r"splash_m[hq]a_\w+?(?=_no_residuals|_residuals)", text)))
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes / 1e9
    flops = PASSES[flags.program] * flags.rows * T * config.flops_per_token((T + 1) / 2)
    print(
        f"{flags.size} {flags.topology} {flags.program} rows={flags.rows} mesh={flags.mesh} remat={flags.remat}: "
        f"lower {lowering:.0f} s, compile {time.perf_counter() - start:.0f} s, HBM peak {peak:.2f} GB, kernels "
        f"{', '.join(kernels) or 'none'}, model FLOPs a device {flops:.4e}"
    )
    if flags.hlo:
        pathlib.Path(flags.hlo).write_text(text)


if __name__ == "__main__":
    main()
