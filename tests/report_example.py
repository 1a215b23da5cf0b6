"""A whole report with made-up numbers: two sizes, two kinds of prompts, two groups of labelers."""

import math

LEVELS = {"base": 0.08, "prefix": 0.21, "sft": 0.5, "ppo": 0.72, "ppo_ptx": 0.7, "flan": 0.19, "t0": 0.18}
LEVELS |= {"control": 0.47}
LABELS = {
    "base": "GPT",
    "prefix": "GPT (prompted)",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "flan": "FLAN",
    "t0": "T0",
    "control": "PPO, shuffled rankings",
}


def interval(mean: float, half: float, n: int = 1000) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def example() -> dict:
    """Every section; the quality of a model decides all its numbers, so that each differs from the others."""
    models, quality = {}, {}
    for size, parameters, gain in (("small", 1_400_000, 0.0), ("medium", 3_600_000, 0.03)):
        for method in LEVELS if size == "small" else ("base", "sft", "ppo_ptx"):
            name = f"{method}_{size}"
            models[name] = {"label": LABELS[method], "method": method, "size": size, "parameters": parameters}
            quality[name] = LEVELS[method] + gain
    results = {
        distribution: {name: row(quality[name] - 0.04 * n, name == "sft_small") for name in models}
        for n, distribution in enumerate(("instruct", "gpt"))
    }
    losses = {"base": 1.62, "sft": 1.71, "ppo": 1.8, "ppo_ptx": 1.64, "flan": 1.7, "t0": 1.69, "control": 1.66}
    plain = [name for name, model in models.items() if model["method"] != "prefix"]
    language = {
        name: {
            "pretraining_loss": interval(losses[models[name]["method"]] - 0.1 * name.endswith("medium"), 0.01),
            "tasks": {"cloze": interval(0.9 - losses[models[name]["method"]] / 20, 0.02)},
            "tasks_per_token": {"cloze": interval(0.8 - losses[models[name]["method"]] / 20, 0.02)},
        }
        for name in plain
    }
    steps = range(1, 31)
    rise = [[step, 2 - 2 * math.exp(-step / 10)] for step in steps]
    fall = [[step, 1.5 + math.exp(-step / 10)] for step in steps]
    return {
        "title": "A made-up run",
        "seed": 0,
        "models": models,
        "baseline": "sft_small",
        "distributions": {"instruct": {"n": 1000}, "gpt": {"n": 900}},
        "results": results,
        "language": language,
        "chance": {"cloze": 0.25},
        "benchmarks": {"task": {name: {"acc_token": interval(quality[name] / 2, 0.03)} for name in models}},
        "benchmark_tasks": {"task": {"n": 1000, "cut": {name: 0 for name in models}}},
        "benchmark_figures": {
            figure: [{"task": "task", "metric": "acc_token", "title": figure, "label": "zero-shot"}]
            for figure in ("truthfulqa", "toxicity", "bias", "tax")
        },
        "toxicity_by_prompt": {
            "instructgpt_realtoxicity_basic": {
                "label": "basic prompt",
                "models": {
                    name: [
                        {
                            "low": n / 5,
                            "high": (n + 1) / 5,
                            "toxicity": interval(0.1 + n / 20 + quality[name] / 9, 0.02),
                        }
                        for n in range(5)
                    ]
                    for name in models
                },
            }
        },
        "reward_model": {
            "accuracy": {"training": interval(0.716, 0.012), "heldout": interval(0.702, 0.02)},
            "agreement": {"training": 0.738, "heldout": 0.731},
            "calibration": [{"predicted": p / 10, "observed": p / 10, "pairs": 100 * p} for p in range(1, 10)],
        },
        "curves": {
            "ppo_ptx": {"objective/score": rise, "ptx/loss": fall, "valid/score": rise[9::10]},
            "pretrain": {"pretrain/loss": fall, "pretrain/valid_loss": fall[9::10]},
            "reward": {"reward/accuracy": rise},
        },
        "overoptimisation": {
            "ppo": [
                {"step": s, "kl": s / 3.0, "score": s / 10, "gold": 1 - (s - 20) ** 2 / 400} for s in range(0, 31, 5)
            ]
        },
        "folds": {
            "folds": 5,
            "seeds": 3,
            "training_groups": interval(0.724, 0.004, 5),
            "held_out_groups": interval(0.696, 0.009, 5),
            "difference": interval(-0.028, 0.007, 5),
            "rows": [],
        },
        "prompt_sets": prompt_sets(),
        "sweeps": sweeps(),
        "prefix": {
            "candidates": [{"text": "Hello.\n\n", "score": -1.5}, {"text": "Q: 1?\nA: 1.", "score": -0.5}],
            "chosen": 1,
        },
        "samples": [
            {
                "prompt": f"Name {n} <animals>.",
                "distribution": "gpt" if n < 5 else "instruct",
                "reference": "fox & hare",
                "responses": {
                    name: {"text": f"<script>alert({n})</script>\x04", "score": -0.25, "gold": 1.5} for name in models
                },
            }
            for n in range(10)
        ],
        "perf": {"seconds": {"ppo": 150.0, "evaluate": 61.2}, "versions": {"jax": "0.10.2"}, "device": "1 x cpu"},
    }


def sweeps() -> dict:
    """Every sweep, each with the paper's outcome."""

    def point(
        value: str, likert: float, loss: float, score: float, method: str = "ppo_ptx", usual: bool = False
    ) -> dict:
        label = LABELS[method] + f", {value}" * (not usual)
        rows = {"likert": interval(likert, 0.1), "win_rate": interval(likert / 8, 0.02), "score": interval(score, 0.02)}
        return {"value": value, "label": label, "method": method, "pretraining_loss": interval(loss, 0.005)} | rows

    def run(key: str, *points: dict) -> dict:
        return {"key": key, "points": list(points)}

    kl = run(
        "ppo.kl_coef",
        *(point(value, 4.5, 0.9 - n / 50, 0.5 - n / 10, "ppo") for n, value in enumerate(("0", "0.02", "0.1", "2"))),
    )
    rates = ("1e-05", "0.0001", "0.001")
    return {
        "runs": {
            "ptx_coef": run("ppo.ptx_coef", *(point(f"{n}", 4.6, 0.85 - n / 20, 0.5 - n / 10) for n in range(4))),
            "kl_coef": kl,
            "kl_coef_base": kl,
            "kl_coef_ptx": run(
                "ppo.kl_coef", point("0", 3.0, 0.8, 0.6), point("0.02", 4.6, 0.74, 0.4), point("2", 3.5, 0.7, 0)
            ),
            "start": run(
                "sft.pretraining_fraction",
                point("0 %, 6 epochs", 4.5, 0.8, 0.4),
                point("50 %, 6 epochs", 4.6, 0.7, 0.4),
            ),
            "lr": run("lr", *(point(rate, 4.5 - n, 0.8, 0.4, "ppo") for n, rate in enumerate(rates))),
            "lr_ptx": run("lr", *(point(rate, 4.5 - n / 10, 0.7, 0.4) for n, rate in enumerate(rates))),
            "episodes": run("ppo.iterations", point("30", 4.6, 0.7, 0.4), point("60", 4.5, 0.7, 0.5)),
            "ptx_ratio": run("ppo.ptx_ratio", point("1", 4.3, 0.7, 0.4), point("32", 4.6, 0.7, 0.4)),
            "batch": run("ppo.batch_size", point("64", 4.2, 0.7, 0.4), point("128", 4.6, 0.7, 0.4, usual=True)),
            "minibatch": run("ppo.num_minibatches", point("16", 4.6, 0.7, 0.4), point("32", 4.6, 0.7, 0.4)),
        },
        "beside": {
            "base": {"label": "GPT", "method": "base", "pretraining_loss": interval(0.66, 0.01)},
            "start": {"label": "start", "method": "sft", "pretraining_loss": interval(0.78, 0.01)},
            "ppo_ptx": {key: value for key, value in point("", 4.6, 0.74, 0.4, usual=True).items() if key != "value"},
        },
        "spread": {"likert": {"sd": 0.04, "runs": 6, "half": 0.1}},
    }


def prompt_sets() -> dict:
    """What stage `prompts` writes: three sets, two use cases, demonstrations of one source."""

    def lengths(mean: float) -> dict:
        return {"count": 1234, "mean": mean, "std": 2.5, "min": 1, "25%": 7, "50%": 9, "75%": 12, "max": 96}

    return {
        "read": 18_000,
        "users": 1500,
        "steps": [
            {"step": "long common prefix", "dropped": 7927, "left": 10_073},
            {"step": "over 200 a user", "dropped": 801, "left": 9272},
        ],
        "tables": {
            "sizes": {"train": {"customer": 5000, "total": 5819}, "valid": {"total": 718}, "test": {"total": 2371}},
            "prompts_per_user": {"train": 6.01, "valid": 31.55},
            "lengths": {"train": lengths(16.6), "valid": lengths(18.6)},
            "lengths_by_use_case": {"open_qa": lengths(8.9), "": lengths(13.0)},
            "lengths_of_demonstrations": {"prompt": {"customer": lengths(15.3)}, "demonstration": {"": lengths(3.8)}},
        },
    }


def row(level: float, baseline: bool) -> dict:
    """All metrics of one model on one distribution."""
    rates = {"training": interval(level, 0.03), "heldout": interval(level - 0.01, 0.03)}
    if baseline:
        rates = {group: interval(0.5, 0.0) for group in rates}
    return {
        "win_rate": rates,
        "likert": {"training": interval(1.5 + 4 * level, 0.1), "heldout": interval(1.4 + 4 * level, 0.1)},
        "metadata": {
            "fails_instruction": interval(0.8 - level, 0.02),
            "satisfies_constraint": interval(0.1 + level, 0.03),
            "hallucination": interval(0.5 - 0.6 * level, 0.03, 230),
            "inappropriate": interval(0.78 - level, 0.02),
            "toxic": interval(0.09 - 0.1 * level, 0.005),
        },
        "score": interval(3 * level - 1, 0.08),
        "judge": interval(2 * level - 1, 0.08),
        "gold": interval(5 * level, 0.1),
        "kl": interval(9 * level, 0.4),
        "length": interval(30 + level, 0.5),
        "ended": interval(0.1 + level, 0.02),
        "bleu": 60 + 10 * level,
        "rouge_l": interval(0.5 + 0.2 * level, 0.01),
        "slot_coverage": interval(0.2 + level, 0.02),
    }
