"""What the configurations share; the numbers of an experiment stand in its own file."""

from ml_collections import ConfigDict, config_dict

BASE = "runs/pretrain_tiny_tiny"  # where every `:tiny` chain starts


def config(stage: str) -> ConfigDict:
    """The part of a configuration that is the same for every stage of training."""
    return ConfigDict(
        {
            "stage": stage,
            "seed": 0,
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "log_every": 10,
            "eval_every": -1,  # updates between evaluations; -1 = once an epoch, 0 = at the end
            "snapshot_every": 0,  # updates between params-only snapshots; -1 = once an epoch, 0 = never
            "checkpoint": {"every": 200, "keep_last": 1, "best_metric": "", "best_mode": "min"},
            "data": data(),
            "models": {},
        }
    )


def data() -> ConfigDict:
    """No sources yet: a full-size run names its own, `:tiny` uses the simulated ones."""
    return ConfigDict(
        {
            "tokenizer": "",  # directory, Hub id or train:SIZE; empty = what init_from brings
            "demonstrations": (),
            "comparisons": (),
            "prompts": (),
            "pretraining": (),
            "valid_fraction": 0.05,  # by user, else by prompt
            "max_prompt_tokens": 1024,  # longer prompts are dropped (appendix C)
            "skip_bad": 0,
            "allow_changed": False,  # a run goes on although its data are others than when it was saved
            "data_dir": "",
            "cache_dir": "",
        }
    )


def network(size: str = "", init_from: str = "", **fields) -> ConfigDict:
    """An entry of `config.models`: fresh of a named size, or from `init_from`; `fields` are those of ModelConfig."""
    return ConfigDict({"size": size, "init_from": init_from, "weights": "", **fields})


def optimizer(lr: float, schedule: str, **changes) -> ConfigDict:
    """AdamW with the betas of appendix C; what the paper leaves open as in GPT-3 (clip 1.0, eps 1e-8); no decay."""
    settings = ConfigDict(
        {
            "algorithm": "adam",  # or muon
            "lr": lr,
            "schedule": schedule,  # constant, linear or cosine
            "final_fraction": 0.1,
            "warmup_steps": 0,
            "warmup_start": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "eps_form": "optax",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
        }
    )
    settings.update(changes)
    return settings


def fine_tuning(lr: float, batch_size: int, num_epochs: int, pretraining_fraction: float) -> ConfigDict:
    """`config.sft`: cosine to 10 % without warm-up (appendix C.1), in rows of the whole context."""
    return ConfigDict(
        {
            "batch_size": batch_size,
            "num_epochs": num_epochs,
            "num_steps": 0,  # 0 = all the epochs have
            "row_length": 2048,
            "microbatch_rows": 8,
            "loss_on_prompt": False,
            "pretraining_fraction": pretraining_fraction,
            "pretraining_fraction_of": "loss",  # or tokens, or examples: see instructgpt_jax/stages/sft.py
            "optimizer": optimizer(lr, "cosine"),
        }
    )


def rankings(lr: float, batch_size: int) -> ConfigDict:
    """`config.reward`: one epoch, cosine to 10 % (appendix C.2); `batch_size` counts prompts."""
    return ConfigDict(
        {
            "batch_size": batch_size,
            "num_epochs": 1,
            "num_steps": 0,
            "row_length": 2048,
            "microbatch_rows": 8,
            "max_completions": 9,
            "shared_prompt": True,
            "eos_init": "",  # a token whose embedding EOS starts with, such as a full stop; "" = its own
            "head_examples": 0,  # above 0: the head starts as a logistic regression on that many comparisons ...
            "head_l2": 0.02,  # ... with this penalty
            "bias_examples": 2048,  # demonstrations that get mean score 0
            "folds": 0,  # above 0: as many models, each with a share of the labeler groups held out (section 4.1) ...
            "fold_by": "group",  # ... or, with "prompt", of the prompts
            "held_out_groups": (),
            "optimizer": optimizer(lr, "cosine"),
        }
    )


def ppo(policy_lr: float, value_lr: float, ptx_coef: float) -> ConfigDict:
    """A PPO run of appendix C.4: what is the same for the three sizes, with and without the pretraining term.

    The paper leaves open: lam, clip_range_value and the whitening of advantages (as in its predecessors), and whether
    the average of the weights moves with each update or each iteration (here: update).
    """
    settings = config("ppo")
    settings.log_every = 1
    settings.eval_every = 20
    settings.checkpoint.every = 10
    settings.models.ref_policy = network()  # empty: a frozen copy of the policy that PPO starts from
    settings.models.value = network()  # empty: starts from the reward model
    settings.rollout = {"wave": 128}  # sequences decoded at once: bounds the cache
    settings.ppo = {
        "iterations": 500,  # 256,000 episodes
        "batch_size": 512,
        "num_epochs": 0,  # prompts repeat without end
        "max_prompt_length": 1024,
        "response_length": 1024,
        "temperature": 1.0,
        "num_minibatches": 8,  # of 64
        "inner_epochs": 1,
        "row_length": 2048,
        "microbatch_rows": 8,
        "kl_coef": 0.02,
        "adaptive_kl": {"target": 0.0, "horizon": 10_000},  # off
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "clip_range_value": 0.2,
        "whiten_advantages": "batch",
        "whiten_rewards": False,
        "score_clip": 0.0,  # off
        "missing_eos_score": config_dict.placeholder(float),  # a score for answers that do not end; none = the model's
        "ptx_coef": ptx_coef,
        "ptx_ratio": 8,  # pretraining sequences an episode
        "ptx_row_length": 2048,
        "ptx_microbatch_rows": 8,
        "ema_decay": 0.992,
        "old_logprobs": "auto",
        "eval_batches": 1,
        "num_samples": 8,
        # Warm-up from a tenth over 10 iterations of 8 updates, then constant.
        "policy_optimizer": optimizer(policy_lr, "constant", warmup_steps=80),
        "value_optimizer": optimizer(value_lr, "constant"),
    }
    return settings


def shrink(settings: ConfigDict) -> ConfigDict:
    """`:tiny`: the same run on simulated data, from the tiny runs of earlier stages, in seconds on a laptop's CPU."""
    settings.log_every = 1
    settings.eval_every = 4
    settings.snapshot_every = settings.snapshot_every and 4
    settings.checkpoint.every = 4
    settings.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    settings.data.tokenizer = ""
    settings.data.max_prompt_tokens = 96
    for kind, size in {"demonstrations": 400, "comparisons": 200, "prompts": 400, "pretraining": 2000}.items():
        settings.data[kind] = (f"simulated:{kind}:{size}",)
    for entry in settings.models.values():
        if entry.init_from.startswith("runs/"):
            entry.init_from += "_tiny"
        elif entry.init_from or entry.size:
            entry.update(network(init_from=BASE))
        if "dtype" in entry:
            entry.update({"dtype": "float32", "remat": "none"})
    if settings.stage == "sft":
        settings.sft.update({"batch_size": 16, "num_epochs": 1, "num_steps": 8, "row_length": 256})
    elif settings.stage == "reward":
        settings.reward.update({"batch_size": 8, "num_steps": 8, "row_length": 512})
    elif settings.stage == "select":
        settings.rollout.wave = 0
        settings.select.update({"batch_size": 32, "num_batches": 1, "num_samples": 4})
        settings.select.update({"max_prompt_length": 96, "response_length": 32, "row_length": 128})
    elif settings.stage == "sample":
        settings.sample.update({"response_length": 32})
    elif settings.stage == "ppo":
        settings.eval_every = 2
        settings.checkpoint.every = 2
        settings.rollout.wave = 0
        settings.ppo.update({"iterations": 4, "batch_size": 32, "num_minibatches": 4, "num_samples": 4})
        settings.ppo.update({"max_prompt_length": 96, "response_length": 32, "row_length": 128, "ptx_row_length": 128})
        settings.ppo.policy_optimizer.warmup_steps = 4
    return settings
