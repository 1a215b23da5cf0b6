"""What every configuration has, in one place; the numbers of an experiment stand in its own file."""

from ml_collections import ConfigDict


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
            "data": {
                "tokenizer": "",  # directory, Hub id or train:SIZE; empty = what init_from brings
                "demonstrations": (),
                "comparisons": (),
                "prompts": (),
                "pretraining": (),
                "valid_fraction": 0.05,  # by user, else by prompt
                "max_prompt_tokens": 1024,  # longer prompts are dropped (appendix C)
                "skip_bad": 0,
                "data_dir": "",
                "cache_dir": "",
            },
            "models": {},
        }
    )


def network(size: str = "", init_from: str = "", **fields) -> ConfigDict:
    """An entry of `config.models`: fresh of a named size, or from `init_from`; `fields` are those of ModelConfig."""
    return ConfigDict({"size": size, "init_from": init_from, "weights": "", **fields})


def optimizer(lr: float, schedule: str, **changes) -> ConfigDict:
    """AdamW with the betas of appendix C; what the paper leaves open as in GPT-3 (clip 1.0, eps 1e-8), no weight decay."""
    settings = ConfigDict(
        {
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
