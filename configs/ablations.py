"""The paper's experiments with the settings of PPO, appendix E.6 to E.11, as stages beside a pipeline's own runs.

A sweep is a run of the pipeline, the usual one, and copies of it in which one thing differs. Numbers are the paper's
where the shapes allow it, else so many times the usual value as the paper's are of its own.
"""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import measured

KL = (0.0, 0.001, 0.01, 0.02, 0.1, 0.3, 1.0, 2.0)  # E.6 and E.7: from 0.0001 to 2
PTX = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # E.6: from 1 to 150, around the 27.8 that the paper takes
RATES = tuple(10 ** (n / 6) for n in range(-3, 4))  # E.9: seven, the last ten times the first; here of the usual rate
RATIOS = (1, 4, 8, 32)  # E.11: 4, 8 and 32; 1 is what the quickstart takes
BATCHES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # E.11: 64 to 1,024 where 512 is usual
MINIBATCHES = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # E.11: 8 to 64 where 64 is usual, and one larger
MIXES = ((0.0, 1), (0.1, 1), (0.5, 1), (0.0, 2), (0.1, 2), (0.5, 2))  # E.8: share of pretraining, halves of the epochs
SEEDS = (1, 2, 3, 4)  # beside the pipeline's own: how far the same run comes out elsewhere


class Sweep(NamedTuple):
    """Stages of a sweep, and what the evaluation needs of it.

    key: what differs.
    values: of it, in their order.
    policies: for each value the name of its policy.
    stages: those to run; values that a run of the pipeline has are not among them.
    named: the policies of these stages.
    """

    key: str
    values: tuple
    policies: tuple[str, ...]
    stages: dict[str, ConfigDict]
    named: list[measured.Policy]


def varied(stage: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a stage with other values of some keys.

    Raises:
      ValueError: a key that the stage does not have.
    """
    copy = stage.copy_and_resolve_references()
    for key, value in changes.items():
        section, inner = copy, copy
        for name in key.split("."):
            section = inner
            if not isinstance(section, ConfigDict) or name not in section:
                near = difflib.get_close_matches(name, section if isinstance(section, ConfigDict) else (), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"a sweep must be over a key of stage {stage.stage!r}, it has no {key!r}{hint}")
            inner = section[name]
        section[name] = value
    return copy


def sweep(
    name: str,
    key: str,
    values: Iterable,
    usual: tuple[str, ConfigDict, Any],
    method: str,
    more: dict | None = None,
    shown: tuple = (),
) -> Sweep:
    """One value a run.

    Args:
      name: of the sweep and the beginning of its stages'.
      key: of the stage.
      values: in their order.
      usual: a run of the pipeline, its configuration, and the value that it has: it stands for this one; None = none.
      method: of the policies, ppo or ppo_ptx.
      more: value -> other keys that are not the usual run's.
      shown: what stands for the values in the report; () = they.
    """
    start, stage, known = usual
    values, policies, stages, named = tuple(values), [], {}, []
    shown = shown or values
    for number, value in enumerate(values):
        if value == known:
            policies.append(start)
            continue
        own = f"{name}_{number}"
        stages[own] = varied(stage, {key: value} | (more or {}).get(value, {}))
        stages[own].snapshot_every = 0
        label = f"{'PPO-ptx' if method == 'ppo_ptx' else 'PPO'}, {name} {written(shown[number])}"
        named.append(measured.Policy(own, own, label, method, "small"))
        policies.append(own)
    return Sweep(key, shown, tuple(policies), stages, named)


def all_sweeps(ppo: ConfigDict, ptx: ConfigDict, base: str) -> dict[str, Sweep]:
    """Those of one start of PPO and one reward model; the longest runs first.

    Args:
      ppo, ptx: stages `ppo` and `ppo_ptx` of the pipeline.
      base: stage of the pretrained model.
    """
    of_ptx, of_ppo = ("ppo_ptx", ptx), ("ppo", ppo)
    rate, kl, coef, ratio = "ppo.policy_optimizer.lr", "ppo.kl_coef", "ppo.ptx_coef", "ppo.ptx_ratio"
    rates = tuple(ppo.ppo.policy_optimizer.lr * factor for factor in RATES)
    batch, iterations = ptx.ppo.batch_size, ptx.ppo.iterations
    part = batch // ptx.ppo.num_minibatches
    batches, parts = {}, {}
    for factor in BATCHES:  # as many episodes, in minibatches of the same size where the batch has one
        size = int(factor * batch)
        batches[size] = sized(ptx, size, min(part, size)) | {
            "ppo.iterations": max(1, iterations * batch // size),
            "rollout.wave": min(ptx.rollout.wave, size),
            "eval_every": max(1, ptx.eval_every * batch // size),
            "checkpoint.every": max(1, ptx.checkpoint.every * batch // size),
        }
    for factor in MINIBATCHES:
        size = max(1, int(factor * part))
        parts[batch // size] = sized(ptx, batch, size)
    sizes = tuple(batch // number for number in parts)
    # A batch of ptx_coef 0 reads no text: the run of PPO stands for it.
    coefs = sweep("ptx_coef", coef, PTX[1:], (*of_ptx, ptx.ppo.ptx_coef), "ppo_ptx")
    coefs = coefs._replace(values=PTX, policies=("ppo", *coefs.policies))
    reference = dict.fromkeys(KL, {"models.ref_policy.init_from": "{workdir}/" + base})
    return {
        "ptx_ratio": sweep("ptx_ratio", ratio, RATIOS, (*of_ptx, ptx.ppo.ptx_ratio), "ppo_ptx"),
        "ptx_coef": coefs,
        "kl_coef": sweep("kl_coef", kl, KL, (*of_ppo, ppo.ppo.kl_coef), "ppo"),
        "kl_coef_base": sweep("kl_coef_base", kl, KL, (*of_ppo, None), "ppo", reference),
        "kl_coef_ptx": sweep("kl_coef_ptx", kl, KL, (*of_ptx, ptx.ppo.kl_coef), "ppo_ptx"),
        "episodes": sweep("episodes", "ppo.iterations", (iterations, 2 * iterations), (*of_ptx, iterations), "ppo_ptx"),
        "batch": sweep("batch", "ppo.batch_size", batches, (*of_ptx, batch), "ppo_ptx", batches),
        "minibatch": sweep(
            "minibatch", "ppo.num_minibatches", parts, (*of_ptx, ptx.ppo.num_minibatches), "ppo_ptx", parts, sizes
        ),
        "lr": sweep("lr", rate, rates, (*of_ppo, ppo.ppo.policy_optimizer.lr), "ppo"),
        "lr_ptx": sweep("lr_ptx", rate, rates, (*of_ptx, ptx.ppo.policy_optimizer.lr), "ppo_ptx"),
        "seed": sweep("seed", "seed", (0, *SEEDS), (*of_ppo, 0), "ppo"),
        "seed_ptx": sweep("seed_ptx", "seed", (0, *SEEDS), (*of_ptx, 0), "ppo_ptx"),
    }


def written(value) -> str:
    """As it stands below an axis: 6.3e-5 of a small number."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:g}" if isinstance(value, float) else str(value)


def sized(stage: ConfigDict, batch: int, minibatch: int) -> dict[str, int]:
    """What a size of batch and of minibatch changes: microbatches of text are no larger than a minibatch's text."""
    text = stage.ppo.ptx_ratio * minibatch
    return {
        "ppo.batch_size": batch,
        "ppo.num_minibatches": batch // minibatch,
        "ppo.ptx_microbatch_rows": min(stage.ppo.ptx_microbatch_rows, text),
    }


def starts(init: ConfigDict, ptx: ConfigDict, text: tuple[str, ...]) -> Sweep:
    """Appendix E.8: PPO-ptx from starts with other shares of pretraining, and of half as many epochs.

    Args:
      init: stage `rlhf_init` of the pipeline, whose epochs stand for the paper's 2.
      ptx: stage `ppo_ptx`.
      text: sources of pretraining text.
    """
    epochs, usual = init.sft.num_epochs, init.sft.pretraining_fraction
    policies, stages, named, values = [], {}, [], []
    for number, (share, halves) in enumerate(MIXES):
        values.append(f"{100 * share:.0f} %, {epochs * halves // 2} epochs")
        if (share, halves) == (usual, 2):
            policies.append("ppo_ptx")
            continue
        begun, own = f"start_{number}", f"start_{number}_ppo_ptx"
        changes = {"sft.pretraining_fraction": share, "sft.num_epochs": epochs * halves // 2}
        stages[begun] = varied(init, changes | {"data.pretraining": text if share else ()})
        stages[own] = varied(ptx, {"models.policy.init_from": "{workdir}/" + begun})
        stages[own].snapshot_every = 0
        named.append(measured.Policy(own, own, f"PPO-ptx after {values[-1]}", "ppo_ptx", "small"))
        policies.append(own)
    return Sweep("sft.pretraining_fraction", tuple(values), tuple(policies), stages, named)


def ends(whole: Sweep) -> Sweep:
    """The first and the last value alone, for `:full_tiny`."""
    policies = (whole.policies[0], whole.policies[-1])
    return Sweep(
        whole.key,
        (whole.values[0], whole.values[-1]),
        policies,
        {name: stage for name, stage in whole.stages.items() if f"{name}_ppo_ptx" in policies or name in policies},
        [policy for policy in whole.named if policy.name in policies],
    )


def section(sweeps: dict[str, Sweep], beside: tuple[str, ...]) -> dict:
    """`config.evaluate.sweeps` of a stage that evaluates all of them.

    Args:
      beside: policies that the sweeps are compared with.
    """
    return {
        "runs": {
            name: {
                "key": one.key,
                "values": tuple(map(written, one.values)),
                "policies": one.policies,
            }
            for name, one in sweeps.items()
            if one.key != "seed"
        },
        "repeats": {name: one.policies for name, one in sweeps.items() if one.key == "seed"},
        "beside": beside,
    }
