"""A trained policy or reward model in Hugging Face format.

Command:  python -m instructgpt_jax.main --config=configs/export.py --config.models.model.init_from=runs/ppo_ptx_1b3 \
              --workdir=exports/ppo_ptx_1b3
          Of a PPO run the averaged policy (EMA) is exported; `--config.models.model.weights=params` takes the raw one.
Hardware: the parameters in float32, sharded over the mesh.
Expected: a policy loads with transformers.AutoModelForCausalLM, a reward model with AutoModelForSequenceClassification
          (its score is the logit plus `reward_bias` of config.json). The workdir is empty or holds an earlier export,
          of which nothing stays. Where the model has no row for PAD, the tokenizer of a policy pads with EOS. The chat
          template and the generation_config.json of the checkpoint that training began with are kept. A network that
          trained an adapter is exported merged; with `--config.export.format=peft` the adapter alone, for `peft`.
"""

from configs import common


def get_config(arg=""):
    config = common.config("export")
    config.models.model = common.network(init_from="runs/ppo_ptx_1b3")
    config.export = common.export()
    return common.shrink(config) if arg == "tiny" else config
