"""What the configurations share; the numbers of an experiment stand in its own file."""

from ml_collections import ConfigDict, config_dict

BASE = "runs/pretrain_tiny_tiny"  # where every `:tiny` chain starts


def config(stage: str) -> ConfigDict:
    """The part of a configuration that is the same for every stage of training."""
    return ConfigDict(
        {
            "stage": stage,
            "seed": 0,
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "slices": 1},  # slices: how many, on the slow network
            "log": {"wandb": ""},  # a project of Weights & Biases, beside metrics.jsonl and TensorBoard
            "log_every": 10,
            "eval_every": -1,  # updates between evaluations; -1 = once an epoch, 0 = at the end
            "snapshot_every": 0,  # updates between params-only snapshots; -1 = once an epoch, 0 = never
            "checkpoint": {"every": 200, "keep_last": 1, "best_metric": "", "best_mode": "min"},
            # A step is told that takes `factor` (0 = none) times the median and `seconds`; updates between comparisons
            # of what several processes hold copies of, 0 = never.
            "watch": {"factor": 10.0, "seconds": 120.0, "copies_every": 100},
            "data": data(),
            "models": {},
        }
    )


def data() -> ConfigDict:
    """No sources yet: a full-size run names its own, `:tiny` uses the simulated ones."""
    return ConfigDict(
        {
            "tokenizer": "",  # directory, Hub id or train:SIZE; empty = what init_from brings
            "template": "",  # of chats: chat (the tokenizer's own), human_assistant or a Jinja file; empty = plain text
            "end_tokens": (),  # texts of the tokens that end a response; empty = those that the checkpoint names
            "demonstrations": (),
            "comparisons": (),
            "prompts": (),
            "pretraining": (),
            "valid_fraction": 0.05,  # by user, else by prompt
            "max_prompt_tokens": 1024,  # longer prompts are dropped (appendix C)
            "skip_bad": 0,  # malformed records that may be left out
            "skip_long": False,  # records that do not fit a row are left out and counted; else they are malformed
            "allow_changed": False,  # a run goes on although its data are others than when it was saved
            "data_dir": "",
            "cache_dir": "",
        }
    )


def network(size: str = "", init_from: str = "", **fields) -> ConfigDict:
    """An entry of `config.models`: fresh of a named size, or from `init_from`; `fields` are those of ModelConfig."""
    return ConfigDict({"size": size, "init_from": init_from, "weights": "", "adapter": adapter(), **fields})


def adapter(**changes) -> dict:
    """What of a network trains where not everything does: an adapter on `targets` (LoRA, Hu et al. 2021)."""
    settings = {
        "rank": 16,
        "alpha": 32.0,  # the change is multiplied by alpha / rank
        "targets": (),  # of query, key, value, out, up, gate, down, or all; () = no adapter, every parameter trains
        "dropout": 0.0,
        "base": "",  # how the frozen weights are stored: int8 or nf4; "" = in the compute dtype
    }
    return settings | changes


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


def pretraining(lr: float, batch_size: int, num_steps: int, row_length: int) -> ConfigDict:
    """`config.pretrain`: GPT-3's recipe (Brown et al. 2020, appendix B): weight decay 0.1, cosine to 10 %."""
    return ConfigDict(
        {
            "batch_size": batch_size,
            "num_epochs": 0,  # for ever; num_steps ends it
            "num_steps": num_steps,
            "row_length": row_length,
            "microbatch_rows": batch_size,
            "optimizer": optimizer(lr, "cosine", weight_decay=0.1),
        }
    )


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
            "fold_by": "group",  # ... or, with "labeler", of the labelers in equal parts, with "prompt" of the prompts
            "fold_seeds": 1,  # models of each fold of people
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
    settings.rollout = {
        "wave": 128,  # slots that answer, each a prompt at a time: bounds the cache; 0 = all that fit
        "cache": "full",  # keys and values as computed; or int8: half the memory, not quite the policy that trains
    }
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
        "microbatch_rows": 16,  # the last of a minibatch is filled up with empty rows
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
        "ptx_microbatch_rows": 64,  # of 512, always full: the more at once, the fewer times weights are gathered
        "ema_decay": 0.992,
        "old_logprobs": "auto",
        "distribution_every": 0,  # iterations between checks of rollout/distribution_gap; 0 = never
        "eval_batches": 1,
        "num_samples": 8,
        # Warm-up from a tenth over 10 iterations of 8 updates, then constant.
        "policy_optimizer": optimizer(policy_lr, "constant", warmup_steps=80),
        "value_optimizer": optimizer(value_lr, "constant"),
    }
    return settings


def sampling(response_length: int) -> dict:
    """What every stage that draws answers has in its section; PPO has the temperature alone."""
    return {
        "response_length": response_length,
        "temperature": 1.0,  # 0 = greedy
        "top_k": 0,  # 0 = all
        "top_p": 1.0,  # 1 = all
    }


def collection() -> ConfigDict:
    """Completions of the policies in `config.models`, ranked by simulated labelers or left to rank."""
    settings = config("collect")
    settings.collect = sampling(1024) | {
        "num_prompts": 0,  # 0 = all
        "completions": (4, 9),  # of a prompt: K is drawn between them (section 3.5)
        "labelers": ("training",),  # groups of the simulated ones, each ranks; () = nobody
        "shuffled": False,  # also a file whose ranks say nothing
        "batch_size": 64,
        "max_prompt_length": 1024,
    }
    return settings


def export() -> dict:
    """How a network is written for other programs."""
    return {
        "dtype": "float32",  # or bfloat16: half the size, and what transformers then computes in
        "format": "merged",  # or peft: of a network that trained an adapter, the adapter alone
        "base": "",  # of `peft`: the adapter's base in Hugging Face format; "" = what it was trained from
    }


def labeling(kind: str) -> ConfigDict:
    """A questionnaire for people, one of the kinds of `instructgpt_jax/labeling/`; files alone, no network."""
    settings = config("label")
    settings.label = {
        "kind": kind,
        "step": "make",  # then push, pull or read
        "purpose": "training",  # helpfulness goes first; or evaluation: truth and harmlessness do (section 3.4)
        "source": (),  # what is asked about
        "num_tasks": 0,  # of them; 0 = all
        "labelers": "labelers.jsonl",  # who they are
        "groups": ("training",),  # who of them is asked
        "overlap": 2,  # how many get the same task, 0 = all ...
        "overlap_share": 0.1,  # ... of so many of the tasks; most were labelled once (section 5.3)
        "projects": "labeler",  # a project each, so that nobody sees what others say; or shared
        "pairs": 4,  # room for so many queries with responses on a few-shot page
        "example": "Input: {query}\nOutput: {response}",  # how a few-shot prompt writes them
        "separator": "\n\n",  # between a prompt and the answer that was written for it
        "instructions": "",  # a Markdown file of your own
        "url": "",  # of a Label Studio server
        "export": (),  # files that read takes; () = those that pull has fetched
        "skip_answers": 0,  # of people, that do not fit the questionnaire: so many may be left out
    }
    return settings


def prompt_sets() -> ConfigDict:
    """Raw prompts to the sets of a run; the paper gives neither the length of the prefix nor the shares."""
    settings = config("prompts")
    settings.prompts = {
        "prefix_chars": 200,  # prompts that share so many first characters are repeats
        "max_per_user": 200,  # section 3.2
        "split_key": "instructgpt",  # any text; another one shuffles users between the splits
        "valid_share": 0.32,  # of users; about the paper's ratio of prompts (table 6)
        "test_share": 0.06,  # of users (table 9)
        "max_tokens": 1024,  # appendix C
        "language_sample": 10_000,  # prompts that the language classifier sees
        "few_shot": (),  # sources of instructions with pairs
        "example": "Input: {query}\nOutput: {response}",  # how a pair is written
        "shots": 0,  # pairs before the query; 0 = all others
        "shot_sets": 1,  # different sets of them for each pair (appendix A.3)
    }
    return settings


def selection() -> ConfigDict:
    """The choice among the snapshots of a run; the paper does not say how answers are drawn: as in PPO."""
    settings = config("select")
    settings.rollout = {"wave": 64, "cache": "full"}
    settings.select = sampling(1024) | {
        "by": "score",  # or loss
        "batch_size": 512,
        "num_batches": 2,  # validation prompts: at most so many batches
        "max_prompt_length": 1024,
        "row_length": 2048,
        "microbatch_rows": 8,
        "num_samples": 8,
    }
    return settings


def pipeline(
    stages: dict[str, ConfigDict],
    sources: tuple[str, ...] = (),
    texts: dict | None = None,
    only_with: dict | None = None,
) -> ConfigDict:
    """Several stages as one configuration; `--config.seed` and `--config.log.wandb` are theirs all.

    A stage's own seed is added to it.

    Args:
      stages: in their order.
      sources: keys that the user sets to one or several data sources, `{KEY}` in the stages.
      texts: keys that the user sets to a text, likewise, and what they are before.
      only_with: stage -> key among these texts without which it is left out.
    """
    seed = config_dict.FieldReference(0)
    wandb = config_dict.FieldReference("")
    for stage in stages.values():
        stage.seed = seed + stage.seed if stage.seed else seed
        stage.log.wandb = wandb
    settings = {
        "stage": "pipeline",
        "only": "",  # or the name of one stage
        "parallel": 2,  # stages at once, on a CPU
        "seed": seed,
        "log": {"wandb": wandb},
        "order": tuple(stages),
        "only_with": only_with or {},
        "stages": stages,
    }
    return ConfigDict(settings | dict.fromkeys(sources, ()) | (texts or {}))


PAPER_TO_TINY = {  # beside what `shrink` changes in every run
    "sft.batch_size": 16, "sft.num_epochs": 1, "sft.row_length": 256, "reward.row_length": 512,
    "evaluate_reward.batch_size": 32, "evaluate_reward.row_length": 512,
    "collect.batch_size": 32, "collect.max_prompt_length": 96, "collect.response_length": 32,
    "select.batch_size": 32, "select.num_batches": 1, "select.num_samples": 4, "select.max_prompt_length": 96,
    "select.response_length": 32, "select.row_length": 128, "sample.response_length": 32, "ppo.num_minibatches": 4,
    "ppo.num_samples": 4, "ppo.max_prompt_length": 96, "ppo.response_length": 32, "ppo.row_length": 128,
    "ppo.ptx_row_length": 128,
}  # fmt: skip


def shrink(settings: ConfigDict, own: dict | None = None) -> ConfigDict:
    """`:tiny`: a few updates, in seconds on a laptop's CPU, on as many as eight devices.

    Args:
      own: `stage.key` -> value, what an experiment changes beside. None: a run of the paper's size, which gets
        simulated data and starts from the tiny runs of earlier stages.
    """
    stage, section = settings.stage, settings[settings.stage]
    few = 2 if stage == "ppo" else 4
    settings.log_every = 1
    settings.checkpoint.every = 4
    settings.snapshot_every = settings.snapshot_every and few
    if own is None:
        own = PAPER_TO_TINY
        settings.eval_every = settings.checkpoint.every = few
        _leave_the_cluster(settings)
    if "microbatch_rows" in section:
        section.microbatch_rows = 8
    if stage in ("pretrain", "sft", "reward"):
        section.update({"batch_size": 8, "num_steps": 8})
    if stage == "pretrain":
        section.optimizer.warmup_steps = 2
    elif stage == "collect":
        section.num_prompts = 40
    elif stage == "ppo":
        settings.eval_every = few
        section.update({"iterations": 4, "batch_size": 32, "ptx_microbatch_rows": 8})
        section.policy_optimizer.warmup_steps = 4
    elif stage == "evaluate":
        section.num_samples = 2
    section.update_from_flattened_dict(own, strip_prefix=f"{stage}.")
    return settings


def _leave_the_cluster(settings: ConfigDict) -> None:
    """One machine, simulated data, and the networks of earlier tiny runs."""
    settings.mesh.update({"data": 1, "fsdp": -1, "tensor": 1, "slices": 1})
    if "rollout" in settings:
        settings.rollout.wave = 0
    settings.data.update({"tokenizer": "", "max_prompt_tokens": 96})
    for kind, size in {"demonstrations": 400, "comparisons": 200, "prompts": 400, "pretraining": 2000}.items():
        settings.data[kind] = (f"simulated:{kind}:{size}",)
    for entry in settings.models.values():
        if entry.init_from.startswith("runs/"):
            entry.init_from += "_tiny"
        elif entry.init_from or entry.size:
            entry.update(network(init_from=BASE))
        if "dtype" in entry:
            entry.update({"dtype": "float32", "remat": "none"})
