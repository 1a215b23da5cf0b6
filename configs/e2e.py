"""InstructGPT from public human rankings: restaurant descriptions from meaning representations, on two CPU cores.

Paper:    the three steps of figure 2 at the smallest scale where every label is human: demonstrations of the E2E
          challenge (Novikova et al. 2017) and RankME rankings of five systems' texts (Novikova et al. 2018).
Command:  python -m instructgpt_jax.main --config=configs/e2e.py --config.demonstrations=jsonl:DEMONSTRATIONS \
              --config.comparisons=jsonl:RANKINGS --config.text=jsonl:TEXT
          docs/e2e.md says where to get them. One stage alone: --config.only=reward. Another seed: --config.seed=1.
          `:tiny` runs every stage for a few updates on the simulated world, without files.
Hardware: two CPU cores.
Writes:   a workdir for each stage and report/ under runs/e2e/.

An eighth of the meaning representations is held out of every stage, by prompt. The reward model of PPO and the judge
learn from halves of the rankings that share no prompt.
"""

from configs import common, measured

HELD_OUT = 0.12  # of the meaning representations
CONTEXT = 384  # tokens
PROMPT, RESPONSE = 80, 72  # tokens: the longest meaning representation has 64, the longest text 67
ANSWERS = {"max_prompt_length": PROMPT, "response_length": RESPONSE, "row_length": PROMPT + RESPONSE}
TINY = {  # of `:tiny`
    "sft.row_length": 256,  # sentences of the simulated world are longer
    "reward.max_completions": 9,
    "reward.row_length": CONTEXT,
    "reward.head_examples": 64,
    "evaluate.slots": False,
    "evaluate.distributions.e2e": ("simulated:prompts:train:400",),
    "evaluate.references": (),
    "evaluate.accuracy": ("simulated:comparisons:train:100",),
    "evaluate.pretraining.num_sequences": 16,
    "evaluate.overoptimisation.prompts": ("simulated:prompts:train:400",),
}


def get_config(arg=""):
    stages = {}
    stages["pretrain"] = common.config("pretrain")
    stages["pretrain"].data.tokenizer = "train:2048"
    stages["pretrain"].models.model = fresh()
    stages["pretrain"].pretrain = common.pretraining(6e-3, batch_size=16, num_steps=2048, row_length=128)
    stages["pretrain"].pretrain.microbatch_rows = 4
    stages["pretrain"].pretrain.optimizer.update({"algorithm": "muon", "warmup_steps": 100})
    stages["pretrain"].eval_every = 512

    stages["sft"] = fine_tuning(num_epochs=8, pretraining_fraction=0.0)
    stages["rlhf_init"] = fine_tuning(num_epochs=12, pretraining_fraction=0.1)
    stages["rlhf_init"].sft.pretraining_fraction_of = "examples"  # about a third of the loss tokens: docs/e2e.md

    stages["reward"] = ranking(part=1)
    stages["judge"] = ranking(part=2)
    stages["judge"].seed = 1000

    stages["ppo"] = policy(ptx_coef=0.0)
    stages["ppo_ptx"] = policy(ptx_coef=2.0)  # 27.8 is for large models: here it drowns the gradient of PPO
    stages["evaluate"] = evaluation(tuple(stages))
    for stage in stages.values():
        stage.data.valid_fraction = HELD_OUT
        sources(stage)
    if arg == "tiny":
        shrink(stages)
    given = (
        "demonstrations",  # {"prompt": meaning representation, "completion": text}
        "comparisons",  # {"prompt", "completions", "ranking"}
        "text",  # {"text"}: what the base model reads besides the texts of the demonstrations
    )
    return common.pipeline(stages, given)


def fresh():
    """The shape of all networks: 1.1 million parameters."""
    return common.network("tiny", num_layers=4, width=128, num_heads=2, mlp_width=512, max_length=CONTEXT)


def fine_tuning(num_epochs, pretraining_fraction):
    """A stage that continues from the base model on demonstrations."""
    config = common.config("sft")
    config.models.model = common.network(init_from="{workdir}/pretrain", residual_dropout=0.1)
    config.sft = common.fine_tuning(1e-3, 16, num_epochs, pretraining_fraction)
    config.sft.update({"row_length": 160, "microbatch_rows": 4})
    return config


def ranking(part):
    """A reward model on one half of the rankings."""
    config = common.config("reward")
    config.models.model = common.network(init_from="{workdir}/sft", residual_dropout=0.1)
    config.reward = common.rankings(lr=4e-4, batch_size=16)
    config.reward.update({"num_epochs": 2, "max_completions": 5, "row_length": 256, "microbatch_rows": 4})
    config.reward.update({"eos_init": ".", "head_examples": 2000})  # right more often on unseen prompts: docs/e2e.md
    config.data.comparisons = (f"{{comparisons}}#{part}/2",)
    return config


def policy(ptx_coef):
    """PPO, or with a ptx_coef PPO-ptx."""
    config = common.ppo(policy_lr=1e-4, value_lr=3e-4, ptx_coef=ptx_coef)
    config.models.policy = common.network(init_from="{workdir}/rlhf_init")
    config.models.reward = common.network(init_from="{workdir}/reward")
    config.data.max_prompt_tokens = PROMPT
    config.rollout.wave = 0
    config.eval_every = 8
    config.snapshot_every = 8
    config.ppo.update(
        ANSWERS
        | {
            "iterations": 48,
            "batch_size": 128,
            "num_minibatches": 4,
            "kl_coef": 0.2,  # ten times the paper's: the reward model of 400 comparisons is soon exploited
            "microbatch_rows": 4,
            "ema_decay": 0.95,  # the run is short
            "ptx_ratio": 1,
            "ptx_row_length": 128,
            "ptx_microbatch_rows": 4,
        }
    )
    config.ppo.policy_optimizer.warmup_steps = 20
    return config


def evaluation(trained):
    """The policies on the meaning representations that no stage has seen."""
    frozen = {"reward": "reward", "judge": "judge", "ref_policy": "rlhf_init"}
    policies = measured.policies("pretrain", "1.1M")
    config = measured.evaluation("E2E: descriptions of restaurants, from human rankings", frozen, policies)
    config.data.max_prompt_tokens = PROMPT
    own = {
        "distributions": {"e2e": ("{demonstrations}",)},
        "answers_per_prompt": 4,  # one to each of 119 prompts leaves 3 points of BLEU to chance
        "split": "valid",
        "references": ("{demonstrations}",),
        "slots": True,
        "accuracy": ("{comparisons}",),
        "overoptimisation": {
            "runs": {"ppo": "{workdir}/ppo", "ppo_ptx": "{workdir}/ppo_ptx"},
            "prompts": ("{demonstrations}",),
        },
        "curves": {name: "{workdir}/" + name for name in trained},
        "batch_size": 128,
        "microbatch_rows": 4,
    }
    config.evaluate.update(ANSWERS | own)
    return config


def sources(config):
    """Fills in where the records of a stage come from."""
    demonstrations, text = "{demonstrations}", "{text}"
    config.data.demonstrations = (demonstrations,)
    config.data.comparisons = config.data.comparisons or ("{comparisons}",)
    config.data.prompts = (f"{demonstrations}#unique",)
    config.data.pretraining = (f"{demonstrations}#text=completion@0.35", f"{text}@0.65")


def shrink(stages):
    """A few updates of networks of 170 thousand parameters on the simulated world."""
    stages["pretrain"].models.model = common.network("tiny", max_length=CONTEXT)
    for stage in stages.values():
        common.shrink(stage, TINY)
        for kind in ("demonstrations", "comparisons", "prompts", "pretraining"):
            stage.data[kind] = (f"simulated:{kind}:train",)
