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
import re
import sys

import numpy as np
import scipy.optimize
import scipy.sparse

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FOLDS = 5
STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0)  # of the L2 penalty; the log-likelihood is a sum over pairs


def features(text: str) -> set:
    """Words, punctuation marks and pairs of neighbours of a text."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return set(words) | set(itertools.pairwise(words))


def pairs(row: dict) -> list[tuple[int, int]]:
    """(better, worse) completions of a comparison; ties make none."""
    ranking = row["ranking"]
    return [(i, j) for i in range(len(ranking)) for j in range(len(ranking)) if ranking[i] < ranking[j]]


def differences(rows: list[dict]) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    """(pairs, features) of 1, 0 and -1: counts of the better completion less those of the worse; row of each pair."""
    names, entries, places = {}, [], []
    for number, row in enumerate(rows):
        found = [features(text) for text in row["completions"]]
        for i, j in pairs(row):
            signed = [(name, 1.0) for name in found[i] - found[j]] + [(name, -1.0) for name in found[j] - found[i]]
            # The order of a set of strings changes from run to run, that of the columns must not.
            for name, sign in sorted(signed, key=repr):
                entries.append((len(places), names.setdefault(name, len(names)), sign))
            places.append(number)
    at, column, sign = zip(*entries, strict=True)
    return scipy.sparse.csr_matrix((sign, (at, column)), (len(places), len(names))), np.array(places)


def fit(x: scipy.sparse.csr_matrix, strength: float) -> np.ndarray:
    """Weights that minimise -Σ log σ(x·w) + strength/2 · |w|²."""

    def loss(w):
        margins = x @ w
        value = np.logaddexp(0, -margins).sum() + 0.5 * strength * w @ w
        return value, strength * w - x.T @ (1 / (1 + np.exp(margins)))

    return scipy.optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x


def right(margins: np.ndarray) -> np.ndarray:
    """1 for a pair in the right order, a half for equal scores."""
    return (margins > 0) + 0.5 * (margins == 0)


def linear(rows: list[dict], folds: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Margins of all pairs by models that did not see their fold, and the strength chosen for each fold.

    Args:
      rows: comparisons.
      folds: the fold of each, all comparisons of a prompt in one.
    """
    x, places = differences(rows)
    fold, margins, chosen = folds[places], np.zeros(len(places)), []
    for held_out in np.unique(folds):
        inner = [(fold != held_out) & (fold != other) for other in np.unique(folds) if other != held_out]
        tests = [(fold != held_out) & ~train for train in inner]
        found = {}
        for strength in STRENGTHS:
            hits = [right(x[test] @ fit(x[train], strength)) for train, test in zip(inner, tests, strict=True)]
            found[strength] = np.concatenate(hits).mean()
        chosen.append(max(STRENGTHS, key=found.get))
        margins[fold == held_out] = x[fold == held_out] @ fit(x[fold != held_out], chosen[-1])
    return margins, chosen


def difference(ours: np.ndarray, theirs: np.ndarray, prompts: list[str]) -> str:
    """Mean of ours - theirs over pairs, and its interval over prompts, for people."""
    from instructgpt_jax.evaluation import statistics

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
    config.reward.folds, config.reward.fold_by = FOLDS, "prompt"
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
        margins = np.array([row["scores"][i] - row["scores"][j] for row in rows for i, j in pairs(row)])
        results[name] = right(margins)
    folds = np.array([row["fold"] for row in rows])
    margins, chosen = linear(rows, folds)
    prompts = [row["prompt"] for row in rows for _ in pairs(row)]
    print(f"{len(rows)} comparisons of {len(set(prompts))} prompts, {len(prompts)} pairs")
    print(f"linear model: {right(margins).mean():.4f} (strengths {chosen})")
    for name, hits in results.items():
        print(f"reward model from {name}: {hits.mean():.4f}, difference {difference(hits, right(margins), prompts)}")
    for name, other in itertools.combinations(results, 2):
        print(f"from {name} less from {other}: {difference(results[name], results[other], prompts)}")


if __name__ == "__main__":
    main()
