"""What the configurations that measure share: evaluations of policies and of reward models, and public benchmarks."""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs.common import config, network, sampling


class Policy(NamedTuple):
    """A policy of a pipeline's evaluation; those of one stage share an entry of `config.models`."""

    stage: str  # of the pipeline, where its weights are
    name: str  # in the report's files
    label: str  # in its figures
    method: str  # base, prefix (a base model with a few-shot prefix), sft, ppo, ppo_ptx, flan, t0 or control
    size: str


def policies(base: str, size: str) -> list[Policy]:
    """Those of one base model, in the order of the report.

    Args:
      base: the stage of the base model, and its name.
      size: of all.
    """
    rest = [
        ("sft", "SFT", "sft"), ("rlhf_init", "start of PPO", "sft"), ("ppo", "PPO", "ppo"),
        ("ppo_ptx", "PPO-ptx", "ppo_ptx"),
    ]  # fmt: skip
    trained = [Policy(stage, stage, label, method, size) for stage, label, method in rest]
    return [Policy(base, base, "base", "base", size), *trained]


def evaluation(title: str, frozen: dict[str, str], policies: list[Policy]) -> ConfigDict:
    """The last stage of a pipeline: its policies compared, one report. What is empty here is not measured.

    Args:
      title: of the report.
      frozen: `reward`, `ref_policy` and where there is one `judge` -> their stages.
      policies: in the order of the report; one of them is called `sft`.
    """
    settings = config("evaluate")
    networks, models = dict(frozen), {}
    for policy in policies:
        model = next(other.name for other in policies if other.stage == policy.stage)
        networks[model] = policy.stage
        models[policy.name] = {
            "label": policy.label,
            "method": policy.method,
            "size": policy.size,
            "model": model,
            "prefix": policy.method == "prefix",
        }
    for name, stage in networks.items():
        settings.models[name] = network(init_from=f"{{workdir}}/{stage}")
    settings.evaluate = sampling(1024) | {
        "title": title,
        "models": models,
        "order": tuple(models),
        "baseline": "sft",  # which the others win or lose against
        "distributions": {},  # name -> sources of prompts
        "num_prompts": 0,  # of a distribution; 0 = all
        "answers_per_prompt": 1,
        "split": "all",  # of the records; or valid: those that training holds out
        "labelers": False,  # the simulated ones judge the answers
        "rankings": (),  # sources of comparisons with `policies`: people judge, see `label`; more may come ...
        "ratings": (),  # ... as may their ratings, before report/ is removed and made again
        "preferences": (),  # reward or judge or both: what they prefer by their scores, named as theirs
        "references": (),  # sources of demonstrations: the answers' overlap with them
        "slots": False,  # whether an answer says all of its meaning representation
        "tasks": {},  # name -> sources of closed tasks
        "accuracy": (),  # sources of comparisons, for the reward model
        "pretraining": {"num_sequences": 512, "row_length": 128},  # the loss on text; 0 = not measured
        "prefix": {"candidates": (), "prompts": (), "max_length": 0},  # few-shot; the best on the prompts is taken
        "overoptimisation": {"runs": {}, "prompts": ()},  # name -> workdir with snapshots
        "curves": {},  # name -> workdir
        "prompt_sets": "",  # workdir of a stage `prompts` whose tables the report shows; "" = none
        "folds": "",  # workdir of a stage `reward` with folds of labelers, likewise
        "sweeps": {  # of policies that differ in one setting; they are compared with the baseline alone
            "runs": {},  # name -> the key, its values as text, and for each the policy
            "repeats": {},  # name -> policies that differ in their seed alone: how far a run comes out elsewhere
            "beside": (),  # policies that the report shows as ever; () = no sweeps
        },
        "sweep_report": "",  # workdir of a finished stage `evaluate` with sweeps, which the report shows; "" = none
        "parallel": 2,  # policies at once, on a CPU
        "batch_size": 64,
        "max_prompt_length": 1024,
        "row_length": 2048,
        "microbatch_rows": 8,
        "num_samples": 8,
        "seconds": "{workdir}/seconds.json",
        "report": "{workdir}/report",
    }
    return settings


def reward_evaluation() -> ConfigDict:
    """Reward models, the entries of `config.models`, on comparisons that people ranked."""
    settings = config("evaluate_reward")
    settings.evaluate_reward = {
        "comparisons": (),  # each source is told apart
        "bag_of_words": (),  # sources of the comparisons that a linear model of words learns from; () = none
        "split": "all",  # of the records; or valid: those that training holds out
        "best_of": (2, 4),  # numbers of completions to choose the best of
        "batch_size": 64,
        "row_length": 2048,
        "microbatch_rows": 8,
    }
    return settings


def benchmark(title: str, policies: list[Policy]) -> ConfigDict:
    """The paper's public benchmarks on policies.

    Args:
      title: of the report.
      policies: in its order; `stage` is where their weights are, in the pipeline or under runs/.
    """
    settings, models = config("benchmark"), {}
    for policy in policies:
        settings.models[policy.name] = network(init_from=f"{{workdir}}/{policy.stage}")
        about = {"label": policy.label, "method": policy.method, "size": policy.size}
        models[policy.name] = about | {"model": policy.name}
    settings.benchmark = {
        "title": title,
        "models": models,
        "order": tuple(models),
        "tasks": ("paper",),  # all of the paper's; or names of tasks, ours and lm-eval's
        "data_dir": "",  # of JSONL files (docs/benchmarks.md); what is not there comes from the Hub
        "limit": 0,  # documents of a task; 0 = all
        "num_fewshot": -1,  # as the task says
        "chat": False,  # prompts written by config.data.template
        "graders": {"true": "", "info": "", "toxicity": ""},  # models; toxicity also by `perspective`
        "perspective": {
            "endpoint": "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze",
            "per_second": 1.0,  # requests
            "attempts": 5,
            "wait": 2.0,  # seconds before the second attempt, twice as many before each next one
            "timeout": 30.0,  # seconds
        },
        "batch_size": 64,  # prompts answered at once
        "row_length": 512,  # of packed rows; longer contexts get longer ones
        "microbatch_rows": 16,
    }
    return settings
