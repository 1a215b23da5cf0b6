"""Answers to prompts, by any trained model or Hugging Face directory.

Command:  python -m instructgpt_jax.main --config=configs/sample.py --config.models.model.init_from=runs/ppo_ptx_1b3
              then type prompts; or with --config.sample.prompts="('First prompt', 'Second prompt')"
              or with --config.data.template=chat: a dialogue in turns, an empty line begins another
              or with --config.sample.file=prompts.jsonl (records {"prompt": …}; another suffix: a prompt a line)
Hardware: the model in bfloat16 or float32, sharded over the mesh.
Expected: each answer printed, and added to samples.jsonl in the workdir.
"""

from configs import common


def get_config(arg=""):
    config = common.config("sample")
    config.models.model = common.network(init_from="runs/ppo_ptx_1b3")
    config.sample = common.sampling(response_length=256) | {"prompts": (), "file": "", "batch_size": 8}
    return common.shrink(config) if arg == "tiny" else config
