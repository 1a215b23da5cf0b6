"""Configurations of real runs that take seconds: a world of a dozen words, read by the command line as a config file.

--config=tests/small_runs.py:FOLDER     a PPO-ptx run on the records that `write` has put into FOLDER
"""

import json
import pathlib
import random
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import common

VOCAB_SIZE = 272
MODEL = dict(num_layers=1, width=32, num_heads=4, mlp_width=64, max_length=64)
NOUNS, VERBS = ("cat", "dog", "cow", "hen"), ("sees", "likes", "hears")


def write(folder: pathlib.Path) -> None:
    """Text of small sentences, and prompts that never occur in it."""
    draw = random.Random(0)

    def sentence():
        return f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}."

    files = {
        "text": [{"text": " ".join(sentence() for _ in range(6))} for _ in range(300)],
        "prompts": [{"prompt": f"{a}{b}{c}?"} for a in "ABCD" for b in "0123456789" for c in "xyz"],
    }
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def pretrain(folder):
    """Step 0, until the sentences are known."""
    config = common.config("pretrain")
    config.data.tokenizer = f"train:{VOCAB_SIZE}"
    config.data.pretraining = (f"jsonl:{folder}/text.jsonl",)
    config.eval_every = 0
    config.models.model = common.network("tiny", **MODEL)
    config.pretrain = dict(
        batch_size=16, num_epochs=0, num_steps=300, row_length=32, microbatch_rows=16,
        optimizer=common.optimizer(1e-2, "cosine", warmup_steps=10),
    )  # fmt: skip
    return config


def get_config(folder):
    """Step 3, from fresh networks."""
    config = common.ppo(policy_lr=1e-3, value_lr=1e-3, ptx_coef=27.8)
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    config.data.tokenizer = f"train:{VOCAB_SIZE}"
    config.data.prompts = (f"jsonl:{folder}/prompts.jsonl",)
    config.data.pretraining = (f"jsonl:{folder}/text.jsonl",)
    config.data.valid_fraction = 0.1
    config.models.policy = common.network("tiny", **MODEL)
    config.models.reward = common.network("tiny", **MODEL)
    config.rollout.wave = 0
    config.eval_every = 4
    config.checkpoint.every = 3
    config.ppo.update(
        dict(
            iterations=12, batch_size=8, num_minibatches=2, max_prompt_length=8, response_length=8, row_length=16,
            microbatch_rows=4, ptx_ratio=2, ptx_row_length=32, ptx_microbatch_rows=8, num_samples=2,
            distribution_every=5,
        )
    )  # fmt: skip
    config.ppo.adaptive_kl.update(dict(target=0.01, horizon=40))
    config.ppo.policy_optimizer.warmup_steps = 4
    return config
