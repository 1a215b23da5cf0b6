"""Small files of every kind, and configurations of SFT and the reward model on them that run in seconds.

Also a configuration file: `--config=tests/tiny_supervised.py:STAGE,FOLDER` runs `sft` or `reward` on the FOLDER that
`make_world` filled; `sft+adapter` trains an adapter on the base that `make_base` has put there, `sft+nf4` in nf4.
"""

import contextlib
import copy
import json
import math
import pathlib
import sys

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import common
from instructgpt_jax import models, sharding
from instructgpt_jax.data import tokenizer

WORDS = "red blue small old river stone bird fox sees finds gives takes near far under over again never".split()
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
MODEL = dict(vocab_size=300, num_layers=2, width=32, num_heads=4, mlp_width=64, max_length=96, residual_dropout=0.1)


def make_world(folder: pathlib.Path) -> pathlib.Path:
    """A tokenizer and files of demonstrations and of comparisons by three labeler groups; the same wherever called."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    demonstrations, comparisons = [], []
    for i in range(60):
        prompt = f"{i}: {text(1, 6)}"
        completions = [text(1, 5) for _ in range(rng.integers(2, 5))]
        longest_first = sorted({len(c) for c in completions}, reverse=True)
        ranking = [1 + longest_first.index(len(c)) for c in completions]
        demonstrations.append({"prompt": prompt, "completion": completions[0]})
        comparisons.append({"prompt": prompt, "completions": completions, "ranking": ranking, "group": "abc"[i % 3]})
    for name, records in (("demonstrations", demonstrations), ("comparisons", comparisons)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer.train([text(5, 9) for _ in range(200)], 300, folder / "bpe")
    return folder


def write_for_ppo(folder: pathlib.Path) -> None:
    """Prompts, and text for the pretraining term."""
    prompts = [{"prompt": f"{a} {b}:"} for a in "abcd" for b in "xyz12"]
    texts = [{"text": "the red fox sees a small stone " * 4}] * 30
    for name, records in (("prompts", prompts), ("text", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_base(folder: pathlib.Path) -> pathlib.Path:
    """A directory in Hugging Face format with a fresh language model and the tokenizer of the world in `folder`."""
    net = models.SIZES["tiny"].replace(**MODEL).without_dropout()
    params, made = models.init(net, jax.random.key(5)), tokenizer.load(folder / "bpe").pretrained(pad=False)
    models.hf.save(folder / "base", net, params, made)
    return folder / "base"


def on_adapter(settings, folder: pathlib.Path, **changes):
    """The run with an adapter of rank 4 on the base in `folder`, in place of a fresh network."""
    adapter = dict(rank=4, alpha=8.0, targets=("query", "value", "out", "up", "down"), dropout=0.1) | changes
    settings.models.model = common.network(init_from=str(folder / "base"), adapter=common.adapter(**adapter))
    return settings


def config(stage: str, folder: pathlib.Path, **changes):
    """A run of 6 updates, a checkpoint every 2; `changes` by their dotted names."""
    settings = common.config(stage)
    settings.log_every = 1
    settings.eval_every = 3
    settings.checkpoint.every = 2
    settings.mesh = dict(data=1, fsdp=1, tensor=1)
    settings.data.update(tokenizer=str(folder / "bpe"), valid_fraction=0.2)
    settings.data.demonstrations = (f"jsonl:{folder}/demonstrations.jsonl",)
    settings.models.model = common.network("tiny", **MODEL)
    rows = dict(batch_size=8, num_epochs=2, num_steps=6, row_length=96, microbatch_rows=8)
    if stage == "sft":
        settings.sft = rows | dict(loss_on_prompt=False, pretraining_fraction=0.0, pretraining_fraction_of="loss")
    else:
        settings.data.comparisons = (f"jsonl:{folder}/comparisons.jsonl",)
        settings.reward = rows | dict(
            max_completions=4, shared_prompt=True, eos_init="", head_examples=0, head_l2=0.02, bias_examples=20,
            folds=0, fold_by="group", fold_seeds=1, held_out_groups=(),
        )  # fmt: skip
    settings[stage].optimizer = common.optimizer(3e-3, "cosine")
    settings.update_from_flattened_dict(changes)
    return settings


def check_meshes(build, config, loss: str, meshes=((1, 8, 1), (1, 2, 4), (2, 2, 2))) -> None:
    """Two updates on eight devices, laid out in some ways, equal two on one: metrics and parameters, to rounding.

    The second loss follows the first update, and dropout draws the same masks.
    """

    def run(*sizes):
        settings = copy.deepcopy(config)
        settings[settings.stage].optimizer.eps = 0.01  # else Adam steps by the sign of gradients that are all rounding
        devices = jax.devices()[: math.prod(sizes)]  # by its name, which `one_device` gives way to
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), devices=devices)
        with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
            stage = build(settings, mesh)
            update, arguments = stage.programs()["update"]
            update = update.lower(*arguments).compile(QUICK)
            state, frozen = stage.init(), stage.frozen()
            batches = stack.enter_context(contextlib.closing(stage.data(0)))
            logged = []
            for _ in range(2):
                state, values = update(state, frozen, next(batches))
                logged.append({key: float(value) for key, value in values.items()})
        return logged, jax.tree.map(np.asarray, state.params)

    one, params = run(1, 1, 1)
    assert one[0][loss] != one[1][loss]
    for sizes in meshes:
        many, sharded = run(*sizes)
        for left, right in zip(one, many, strict=True):
            values = [[side[key] for key in left] for side in (right, left)]
            np.testing.assert_allclose(*values, rtol=2e-5, err_msg=f"{sizes}: {[*left]}")
        assert jax.tree.structure(params) == jax.tree.structure(sharded)
        for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(sharded), strict=True):
            np.testing.assert_allclose(right, left, rtol=1e-4, atol=3e-6, err_msg=str(sizes))


def get_config(arg: str):
    name, folder = arg.split(",")
    stage, _, adapter = name.partition("+")
    settings = config(stage, pathlib.Path(folder))
    form = "" if adapter == "adapter" else adapter
    return on_adapter(settings, pathlib.Path(folder), base=form) if adapter else settings
