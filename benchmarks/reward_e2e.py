"""The reward model of the E2E pipeline against a linear model of words, on prompts that neither has seen.

    python benchmarks/reward_e2e.py --comparisons=jsonl:RANKINGS --workdir=runs/reward_e2e \
        --init=sft=runs/e2e/sft --init=pretrain=runs/e2e/pretrain --init=none=

The comparisons are dealt into five folds by their prompts (`config.reward.fold_by = "prompt"`). For each `--init`, a
name and the workdir that the reward model starts from (empty: a fresh model of the pipeline's shape), five reward
models are trained as configs/e2e.py trains its own; complete folds are read again. The linear model is a logistic
regression on the differences of the completions' binary uni- and bigram counts, lower-cased; its L2 strength is chosen
on the training folds of each fold, by folds over their prompts. Printed: pair accuracy of both, equal scores counted
half, and the paired difference with the 95 % interval of a bootstrap over prompts.
"""

import argparse
import itertools
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from instructgpt_jax.evaluation import baselines, statistics  # noqa: E402


def difference(ours: np.ndarray, theirs: np.ndarray, prompts: list[str]) -> str:
    """Mean of ours - theirs over pairs, and its interval over prompts, for people."""
    found = statistics.paired_difference(ours, theirs, 0, prompts)
    return "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found)


def reward_model(
    comparisons: str, init_from: str, tokenizer: str, workdir: pathlib.Path, seed: int, head_examples: int
) -> list[dict]:
    """Every comparison with the scores of a reward model that did not see its prompt."""
    from configs import e2e
    from instructgpt_jax import main

    config = e2e.ranking(part=1)
    config.seed, config.reward.head_examples = seed, head_examples
    config.data.tokenizer = tokenizer
    config.data.comparisons, config.data.valid_fraction = (comparisons,), 0.0
    config.reward.folds, config.reward.fold_by = baselines.FOLDS, "prompt"
    config.eval_every = 0
    if init_from:
        config.models.model.init_from = init_from
    else:
        dropout = config.models.model.residual_dropout
        config.models.model = e2e.fresh()
        config.models.model.residual_dropout = dropout
    main.run(config, str(workdir))
    return [json.loads(line) for line in (workdir / "held_out.jsonl").read_bytes().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparisons", required=True, help="a data source")
    parser.add_argument("--init", action="append", required=True, help="NAME=WORKDIR, or NAME= for a fresh model")
    parser.add_argument("--tokenizer", default="", help="of a fresh model; that of the first --init by default")
    parser.add_argument("--workdir", required=True, type=lambda path: pathlib.Path(path).expanduser())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head_examples", type=int, default=2000, help="0: a head that starts at random")
    arguments = parser.parse_args()
    inits = dict(init.split("=", 1) for init in arguments.init)
    text = arguments.tokenizer or f"{next(iter(inits.values()))}/tokenizer"
    results = {}
    for name, init_from in inits.items():
        options = text, arguments.workdir / name, arguments.seed, arguments.head_examples
        rows = reward_model(arguments.comparisons, init_from, *options)
        margins = np.array([row["scores"][i] - row["scores"][j] for row in rows for i, j in baselines.pairs(row)])
        results[name] = baselines.right(margins)
    folds = np.array([row["fold"] for row in rows])
    x, places, _ = baselines.differences(rows)
    margins, chosen = baselines.held_out(x, folds[places])
    prompts = [row["prompt"] for row in rows for _ in baselines.pairs(row)]
    print(f"{len(rows)} comparisons of {len(set(prompts))} prompts, {len(prompts)} pairs")
    print(f"linear model: {baselines.right(margins).mean():.4f} (strengths {chosen})")
    for name, hits in results.items():
        against = difference(hits, baselines.right(margins), prompts)
        print(f"reward model from {name}: {hits.mean():.4f}, difference {against}")
    for name, other in itertools.combinations(results, 2):
        print(f"from {name} less from {other}: {difference(results[name], results[other], prompts)}")


if __name__ == "__main__":
    main()
