"""Stages on dialogues: public preference data through SFT, reward model and PPO; sampling in turns; collecting."""

import gzip
import json

import numpy as np
import pytest
from test_chats import checkpoint

from configs import common, ppo_ptx_1b3, reward_6b, sft_1b3
from instructgpt_jax import main
from instructgpt_jax.data import tokenizer as tokenizers

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = dict(num_layers=1, width=32, num_heads=4, mlp_width=64, max_length=512)
COUNT = 24  # records of each set, the shortest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with the control tokens of ChatML, its template a file."""
    return checkpoint(tmp_path_factory.mktemp("checkpoint"), "chatml")


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (f"jsonl:{path}",)


def turns_of(prompt):
    """The messages of a text in the form of hh-rlhf."""
    messages = []
    for turn in prompt.removesuffix("\n\nAssistant:").split("\n\n")[1:]:
        name, colon, said = turn.partition(": ")
        if colon and name in ("Human", "Assistant"):
            messages.append({"role": "user" if name == "Human" else "assistant", "content": said})
        else:
            messages[-1]["content"] += "\n\n" + turn
    return messages


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    found = [record for record in found if len(set(record["ranking"])) > 1 and all(record["completions"])]
    return sorted(found, key=lambda record: len(record["prompt"]) + max(map(len, record["completions"])))[:COUNT]


def files_of(data, folder, as_messages):
    """Demonstrations, comparisons and prompts of a file of comparisons: the best of each is demonstrated."""
    demonstrations, comparisons, prompts = [], [], []
    for number, record in enumerate(read(data)):
        asked = {"prompt": record["prompt"]}
        texts = record["completions"]
        if as_messages:
            asked, texts = {"messages": turns_of(record["prompt"])}, [text.strip() for text in texts]
        best = texts[record["ranking"].index(1)]
        demonstrations.append(asked | {"completion": best})
        if as_messages and number % 2:  # whole dialogues, each turn of the assistant demonstrated
            demonstrations[-1] = {"messages": [*asked["messages"], {"role": "assistant", "content": best}]}
        comparisons.append(asked | {"completions": texts, "ranking": record["ranking"]})
        prompts.append(asked)
    made = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
    text = [{"text": " ".join(texts) + " " + str(number)} for number in range(12)]
    return {kind: write(folder / f"{kind}.jsonl", records) for kind, records in (made | {"pretraining": text}).items()}


def run(config, workdir, files, **changes):
    config.data.update(files | {"max_prompt_tokens": 0, "valid_fraction": 0.1})
    config.checkpoint.every, config.eval_every, config.snapshot_every = 100, 0, 0
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    main.run(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {key: value for line in lines for key, value in line.items()}


@pytest.mark.parametrize("name, template", [("hh_rlhf_helpful-base", "human_assistant"), ("oasst_kwise", "chat")])
def test_public_preferences_train_every_stage(name, template, folder, shared_data, tmp_path):
    """hh-rlhf as its strings, OASST as messages under ChatML."""
    files = files_of(shared_data / "comparisons" / f"{name}.jsonl.gz", tmp_path, template == "chat")
    data = {"data__tokenizer": str(folder), "data__template": template}
    config = sft_1b3.get_config("tiny")
    config.models.model = common.network("tiny", **MODEL)
    found = run(config, tmp_path / "sft", files, **data, sft__num_steps=2, sft__batch_size=8, sft__row_length=512,
                sft__num_epochs=9)  # fmt: skip
    assert np.isfinite(found["sft/loss"]) and np.isfinite(found["sft/valid_loss"])
    data["data__tokenizer"] = ""  # what the model brings
    start = {"models__model__init_from": f"{tmp_path}/sft"}
    found = run(reward_6b.get_config("tiny"), tmp_path / "reward", files, **data, **start, reward__num_steps=2,
                reward__batch_size=8, reward__row_length=512, reward__num_epochs=9)  # fmt: skip
    assert np.isfinite(found["reward/loss"]) and found["reward/pairs"] > 0
    config = ppo_ptx_1b3.get_config("tiny")
    found = run(config, tmp_path / "ppo", files, **data, models__policy__init_from=f"{tmp_path}/sft",
                models__reward__init_from=f"{tmp_path}/reward", ppo__iterations=1, ppo__batch_size=8,
                ppo__num_minibatches=2, ppo__max_prompt_length=480, ppo__response_length=8, ppo__row_length=512,
                ppo__ptx_row_length=64, ppo__ptx_ratio=1, ppo__missing_eos_score=-1.0)  # fmt: skip
    assert np.isfinite(found["objective/score"]) and np.isfinite(found["ptx/loss"])
    ours = tokenizers.load(tmp_path / "ppo" / "tokenizer")
    assert ours.chat.name == template and ours == tokenizers.load(tmp_path / "sft" / "tokenizer")
    shown = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    end = "\n\nAssistant:" if template == "human_assistant" else "<|im_start|>assistant\n"
    assert shown and all(line["prompt"].endswith(end) for line in shown)
