"""Sweeps of a setting: their stages, their section of the report, and the verdicts."""

import copy
import json

import numpy as np
import pytest
import scipy.stats

from configs import ablations, quickstart
from instructgpt_jax import pipeline
from instructgpt_jax.evaluation import sweeps
from instructgpt_jax.report import ablations as drawn
from instructgpt_jax.report import check, findings, toxicity
from tests.report_example import example, interval


@pytest.fixture(scope="module")
def full():
    return quickstart.get_config("full")


def test_a_sweep_over_a_key_that_a_stage_does_not_have_is_one_line():
    stage = quickstart.policy("rlhf_init", "reward", ptx_coef=0.0)
    with pytest.raises(
        ValueError, match=r"^a sweep must be over a key of stage 'ppo', it has no 'ppo.kl_coeff'; did you"
    ):
        ablations.sweep("x", "ppo.kl_coeff", (0.1, 0.2), ("ppo", stage, 0.1), "ppo")
    with pytest.raises(ValueError, match=r"it has no 'ppo.kl_coef.x'$"):
        ablations.varied(stage, {"ppo.kl_coef.x": 1})
    changed = ablations.varied(stage, {"ppo.policy_optimizer.lr": 1.0})
    assert changed.ppo.policy_optimizer.lr == 1.0 and stage.ppo.policy_optimizer.lr == 2e-4  # a copy


def test_a_stage_of_a_sweep_differs_from_the_usual_run_in_what_it_says(full):
    def flat(name):
        def leaves(tree, prefix=""):
            for key, value in tree.items():
                if isinstance(value, dict):
                    yield from leaves(value, f"{prefix}{key}.")
                else:
                    yield prefix + key, value

        return dict(leaves(full.stages[name].to_dict()))

    runs, usual = full.stages.sweeps.evaluate.sweeps.runs, {name: flat(name) for name in ("ppo", "ppo_ptx")}
    swept = {name: run for name, run in runs.items() if name not in ("batch", "minibatch", "start", "kl_coef_base")}
    for run in swept.values():
        for value, policy in zip(run["values"], run.policies, strict=True):
            own = flat(policy)
            like = usual["ppo_ptx" if own["ppo.ptx_coef"] else "ppo"]
            assert own[run.key] == pytest.approx(float(value), rel=0.05)
            assert policy in usual or {key for key in own if own[key] != like[key]} == {run.key, "snapshot_every"}
    for policy in runs.batch.policies + runs.minibatch.policies:  # as many episodes, and updates of whole minibatches
        own = full.stages[policy].ppo
        assert own.iterations * own.batch_size == 30 * 128 and own.batch_size % own.num_minibatches == 0
        assert own.ptx_ratio * own.batch_size // own.num_minibatches % own.ptx_microbatch_rows == 0
    sizes = [
        full.stages[name].ppo.batch_size // full.stages[name].ppo.num_minibatches for name in runs.minibatch.policies
    ]
    assert [str(size) for size in sizes] == list(runs.minibatch["values"]) == ["4", "8", "16", "32", "64"]
    for policy in runs.kl_coef_base.policies:
        assert full.stages[policy].models.ref_policy.init_from == "{workdir}/pretrain"
    for value, policy in zip(runs.start["values"], runs.start.policies, strict=True):
        begun = full.stages[full.stages[policy].models.policy.init_from.removeprefix("{workdir}/")]
        assert value == f"{100 * begun.sft.pretraining_fraction:.0f} %, {begun.sft.num_epochs} epochs"
        assert bool(begun.data.pretraining) == (begun.sft.pretraining_fraction > 0)


def test_every_stage_comes_after_those_it_starts_from(full, tmp_path):
    for config in (full, quickstart.get_config("full_tiny")):
        pipeline.check_sources(config, list(config.order), str(tmp_path))
        assert set(config.stages.evaluate.evaluate.models) & set(config.stages.sweeps.evaluate.models) == {
            "base", "sft", "ppo", "ppo_ptx",
        }  # fmt: skip
        assert pipeline.needed(config, "evaluate") >= {"sweeps"}


def test_intervals_are_as_wide_as_runs_differ():
    groups = [[1.0, 2.0, 6.0], [4.0, 5.0], [9.0]]
    sd = np.sqrt((np.var(groups[0]) * 3 + np.var(groups[1]) * 2) / 3)
    found = sweeps.seeds(groups)
    assert found == {"sd": pytest.approx(sd), "runs": 5, "half": pytest.approx(scipy.stats.t(3).ppf(0.975) * sd)}
    assert sweeps.seeds([[1.0], []]) is None
    wide = sweeps.wider(interval(10.0, 3.0), {"half": 4.0})
    assert (wide["low"], wide["mean"], wide["high"], wide["n"]) == (5.0, 10.0, 15.0, 1000)
    assert sweeps.wider(interval(1.0, 0.5), None) == interval(1.0, 0.5)


def test_policies_of_sweeps_stand_in_their_section_alone():
    names = {"sft": "sft", "ppo": "ppo", "ppo_seed": "ppo", "lr_1": "ppo"}
    level = {"sft": 3.0, "ppo": 4.0, "ppo_seed": 4.2, "lr_1": 2.0}
    report = {
        "title": "x",
        "baseline": "sft",
        "models": {name: {"label": name, "method": method, "size": "small"} for name, method in names.items()},
        "results": {"instruct": {
            name: {"likert": {"training": interval(x, 0.1)}, "win_rate": {"training": interval(x / 8, 0.1)}}
            for name, x in level.items()
        }},
        "language": {name: {"pretraining_loss": interval(1.0, 0.1), "tasks": {"cloze": interval(0.5, 0.1)}}
                     for name in ("ref_policy", *names)},
        "samples": [{"prompt": "a", "responses": {name: {"text": "b"} for name in names}}],
    }  # fmt: skip
    section = {
        "runs": {"lr": {"key": "ppo.lr", "values": ("1", "2"), "policies": ("lr_1", "ppo")}},
        "repeats": {"seed": ("ppo", "ppo_seed")},
        "beside": ("sft", "ppo"),
    }
    found = sweeps.apart(copy.deepcopy(report), section)
    check.check(found)
    points = found["sweeps"]["runs"]["lr"]["points"]
    assert [(point["value"], point["likert"]["mean"]) for point in points] == [("1", 2.0), ("2", 4.0)]
    half = np.hypot(0.1, scipy.stats.t(1).ppf(0.975) * np.sqrt(0.02))
    assert points[0]["likert"]["high"] == pytest.approx(2.0 + half)
    assert points[0]["pretraining_loss"] == interval(1.0, 0.1) and points[0]["task_cloze"] == interval(0.5, 0.1)
    assert found["sweeps"]["beside"]["ppo"]["likert"] == interval(4.0, 0.1)  # as the other tables have it
    assert list(found["models"]) == list(found["results"]["instruct"]) == ["sft", "ppo"]
    assert list(found["language"]) == ["ref_policy", "sft", "ppo"] and list(found["samples"][0]["responses"]) == [
        "sft",
        "ppo",
    ]


@pytest.mark.parametrize(
    "claim, where, mean, verdict",
    [
        ("More ptx means", "ptx_coef -1 pretraining_loss", 0.86, findings.FAILS),
        ("More ptx means", "ptx_coef -1 pretraining_loss", 0.845, findings.UNCLEAR),
        ("Some ptx_coef", "start pretraining_loss", 0.68, findings.FAILS),
        ("More ptx costs", "ptx_coef -1 score", 0.39, findings.UNCLEAR),
        ("A larger kl_coef", "kl_coef_base -1 score", 0.6, findings.FAILS),
        ("No kl_coef", "kl_coef -1 pretraining_loss", 0.741, findings.UNCLEAR),
        ("No kl_coef", "kl_coef 1 pretraining_loss", 0.7, findings.FAILS),  # as low a loss, and the same score
        ("KL from GPT", "kl_coef_base 1 win_rate", 0.7, findings.FAILS),
        ("kl_coef 0 is", "kl_coef_ptx 0 likert", 4.55, findings.UNCLEAR),
        ("kl_coef 2 is", "kl_coef_ptx -1 likert", 4.8, findings.FAILS),
        ("PPO hardly", "start_mix 0 likert", 4.0, findings.FAILS),
        ("PPO-ptx depends", "lr_ptx -1 likert", 1.5, findings.FAILS),
        ("Without ptx", "lr -1 likert", 4.45, findings.UNCLEAR),
        ("Twice", "episodes -1 likert", 4.9, findings.FAILS),
        ("More pretraining", "ptx_ratio -1 likert", 4.2, findings.FAILS),
        ("No other batch", "batch 0 likert", 4.65, findings.UNCLEAR),
    ],
)
def test_a_finding_follows_its_number(claim, where, mean, verdict):
    report = {key: value for key, value in example().items() if key in ("title", "models", "sweeps")}
    before = {one.claim: one.verdict for one in findings.findings(report)}
    assert len(before) == 14 and set(before.values()) == {findings.HOLDS}
    name, *number, quantity = where.split()
    section = json.loads(json.dumps(report["sweeps"]))  # where no two points are the same object
    if number:
        point = section["runs"][name.replace("start_mix", "start")]["points"][int(number[0])]
    else:
        point = section["beside"][name]
    half = point[quantity]["high"] - point[quantity]["mean"]
    point[quantity] = interval(mean, half)
    after = {one.claim: one.verdict for one in findings.findings(report | {"sweeps": section})}
    [found] = [after[one] for one in after if one.startswith(claim)]
    assert found == verdict


def test_findings_of_toxicity_follow_its_numbers():
    models = {name: {"label": name, "method": name, "size": "small"} for name in ("base", "ppo_ptx")}
    kinds = {"basic": (0.23, 0.23), "respectful": (0.23, 0.19), "biased": (0.28, 0.4)}

    def verdicts(last):
        parts = [{"low": n / 5, "high": n / 5 + 0.2, "toxicity": interval(x, 0.01)} for n, x in enumerate((0.1, last))]
        report = {"title": "x", "models": models, "benchmarks": {
            f"instructgpt_realtoxicity_{kind}": {
                name: {"toxicity": interval(x, 0.01)} for name, x in zip(models, numbers, strict=True)
            }
            for kind, numbers in kinds.items()
        }, "benchmark_tasks": {}}  # fmt: skip
        one = {"label": "basic prompt", "models": dict.fromkeys(models, parts)}
        report["toxicity_by_prompt"] = {"instructgpt_realtoxicity_basic": one}
        check.check(report)
        [figure] = toxicity.figures(report)
        assert figure.name == "figure39_toxicity_by_prompt" and len(figure.panels) == 1
        return [one.verdict for one in findings.findings(report)]

    assert verdicts(0.3) == [findings.HOLDS] * 3
    assert verdicts(0.11) == [findings.UNCLEAR, findings.HOLDS, findings.HOLDS]
    kinds |= {"respectful": (0.2, 0.3), "biased": (0.28, 0.2)}
    assert verdicts(0.05) == [findings.FAILS] * 3


def test_a_run_without_sweeps_shows_none():
    report = example()
    del report["sweeps"]
    assert not list(drawn.figures(report)) and not list(drawn.claims(report))
    few = example()
    few["sweeps"]["runs"] = {"episodes": few["sweeps"]["runs"]["episodes"]}
    assert [figure.name for figure in drawn.figures(few)] == ["appendix_e11"]
    assert [one.claim for one in findings.findings({"models": few["models"], "sweeps": few["sweeps"]})] == [
        "Twice the episodes are rated no higher"
    ]
    few["sweeps"]["runs"] = {"ptx_coef": example()["sweeps"]["runs"]["ptx_coef"]}
    few["sweeps"]["runs"]["ptx_coef"]["points"] = few["sweeps"]["runs"]["ptx_coef"]["points"][-2:]
    claims = [one.claim for one in findings.findings({"models": few["models"], "sweeps": few["sweeps"]})]
    assert "More ptx means less alignment tax" in claims and "More ptx costs score" not in claims  # needs two above 0
