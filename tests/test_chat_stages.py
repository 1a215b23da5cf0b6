"""Stages on dialogues: public preference data through SFT, reward model and PPO; sampling in turns; collecting."""

import gzip
import io
import json

import numpy as np
import pytest
from test_chats import checkpoint

from configs import common, measured, ppo_1b3, reward_6b, sample, sft_1b3
from instructgpt_jax import main
from instructgpt_jax.data import build, encoding, prompts, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.records import about
from instructgpt_jax.evaluation import text

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = dict(num_layers=1, width=32, num_heads=4, mlp_width=64, max_length=768)
COUNT = 16  # records of each set, the shortest


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
    return {kind: write(folder / f"{kind}.jsonl", records) for kind, records in made.items()}


def run(config, workdir, files, **changes):
    config.data.update(files | {"max_prompt_tokens": 0, "valid_fraction": 0.3})
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
    found = run(config, tmp_path / "sft", files, **data, sft__num_steps=2, sft__batch_size=8, sft__row_length=768,
                sft__num_epochs=9)  # fmt: skip
    assert np.isfinite(found["sft/loss"]) and np.isfinite(found["sft/valid_loss"])
    data["data__tokenizer"] = ""  # what the model brings
    start = {"models__model__init_from": f"{tmp_path}/sft"}
    found = run(reward_6b.get_config("tiny"), tmp_path / "reward", files, **data, **start, reward__num_steps=2,
                reward__batch_size=8, reward__row_length=768, reward__num_epochs=9)  # fmt: skip
    assert np.isfinite(found["reward/loss"]) and found["reward/pairs"] > 0
    config = ppo_1b3.get_config("tiny")
    found = run(config, tmp_path / "ppo", files, **data, models__policy__init_from=f"{tmp_path}/sft",
                models__reward__init_from=f"{tmp_path}/reward", ppo__iterations=1, ppo__batch_size=8,
                ppo__num_minibatches=2, ppo__max_prompt_length=740, ppo__response_length=8, ppo__row_length=768,
                ppo__missing_eos_score=-1.0, ppo__eval_batches=0, ppo__policy_optimizer__warmup_steps=1)  # fmt: skip
    assert np.isfinite(found["objective/score"]) and 0 < found["response/length"] <= 8
    ours = tokenizers.load(tmp_path / "ppo" / "tokenizer")
    assert ours.chat.name == template and ours == tokenizers.load(tmp_path / "sft" / "tokenizer")


# Stages that use a model ----------------------------------------------------------------------------------------------

SAID = [["Where is the fox?", "By the river."], ["Who is there?", "A fox.", "And who else?", "Two hens."]]
TALKS = [[{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]
         for texts in SAID]  # fmt: skip


@pytest.fixture(scope="module")
def policy(folder, tmp_path_factory):
    """The workdir of a policy that was shown some dialogues."""
    root = tmp_path_factory.mktemp("runs")
    talks = [{"messages": [{"role": "system", "content": str(n)}, *talk]} for n in range(4) for talk in TALKS]
    config = sft_1b3.get_config("tiny")
    config.models.model = common.network("tiny", **MODEL)
    run(config, root / "sft", {"demonstrations": write(root / "talks.jsonl", talks)}, data__tokenizer=str(folder),
        data__template="chat", data__valid_fraction=0.0, sft__num_steps=1, sft__batch_size=8,
        sft__row_length=768)  # fmt: skip
    return root / "sft"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_talks_in_turns(policy, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Where?\nWhen?\n\nWhere?\n"))
    config = sample.get_config("tiny")
    config.models.model.init_from, config.data.template = str(policy), "chat"
    config.sample.update({"response_length": 6, "temperature": 0.0})
    main.run(config, str(tmp_path / "sample"))
    first, second, third = lines_of(tmp_path / "sample" / "samples.jsonl")
    asked, more = ({"role": "user", "content": text} for text in ("Where?", "When?"))
    assert first["messages"] == third["messages"] == [asked] and first["response"] == third["response"]
    assert second["messages"] == [asked, {"role": "assistant", "content": first["response"]}, more]
    assert capsys.readouterr().out == "".join(one["response"] + "\n" for one in (first, second, third))


def test_collect_writes_messages_that_the_reward_model_reads(policy, tmp_path):
    """Prompts as whole dialogues, as prompts that are messages, and as texts."""
    given = [{"messages": TALKS[0]}, {"messages": TALKS[1][:3], "user": "a"}, {"prompt": "Where is the fox?"}]
    config = common.collection()
    config.models.one = common.network(init_from=str(policy))
    config.data.update({"prompts": write(tmp_path / "p.jsonl", given), "template": "chat", "max_prompt_tokens": 0})
    config.collect.update({"completions": (2, 2), "labelers": (), "batch_size": 8, "max_prompt_length": 740,
                           "response_length": 6})  # fmt: skip
    main.run(config, str(tmp_path / "collect"))
    found = lines_of(tmp_path / "collect" / "unranked.jsonl")
    assert [one.get("messages") for one in found] == [TALKS[0][:1], TALKS[1][:3], None] and found[1]["user"] == "a"
    ours = tokenizers.load(tmp_path / "collect" / "tokenizer")
    ranked = write(tmp_path / "ranked.jsonl", [one | {"ranking": [1, 2]} for one in found])
    options = dict(row_length=768, process_rows=8, max_completions=2, shared_prompt=True)
    read = encoding.comparisons(sources.load(ranked, "comparisons", 0), ours, encoding.Allowed(0, 0), **options)
    np.testing.assert_array_equal(read.examples[0].prompt, read.examples[2].prompt)
    for example, one in zip(read.examples, found, strict=True):
        ends = [[ours.end_id] * ended for ended in one["ended"]]
        for ids, tokens, end in zip(example.completions, one["tokens"], ends, strict=True):
            assert ids.tolist() == tokens + end


def test_evaluate_on_dialogues(policy, tmp_path, monkeypatch):
    config = measured.evaluation("talks", {"ref_policy": "x"}, [measured.Policy("x", "sft", "SFT", "sft", "tiny")])
    for name in config.models:
        config.models[name] = common.network(init_from=str(policy))
    config.models.reward = common.network("tiny", **MODEL)  # fresh: it scores as well as any
    config.data.update({"tokenizer": str(policy / "tokenizer"), "template": "chat", "max_prompt_tokens": 0})
    talks = write(tmp_path / "talks.jsonl", [{"messages": talk} for talk in TALKS])
    ranked = {"messages": TALKS[1][:3], "completions": ["Two hens.", "No."], "ranking": [1, 2]}
    task = {"messages": TALKS[0][:1], "choices": ["Yes", "No"], "answer": 0}
    for name in ("bleu", "rouge_l"):  # need the extra eval
        monkeypatch.setattr(text, name, lambda *_: 0.5)
    config.evaluate.update({
        "distributions": {"talks": talks}, "references": talks, "num_samples": 2, "response_length": 6,
        "accuracy": write(tmp_path / "ranked.jsonl", [ranked]), "seconds": "", "report": "", "batch_size": 8,
        "tasks": {"yes": write(tmp_path / "tasks.jsonl", [task])}, "max_prompt_length": 740, "row_length": 768,
    })  # fmt: skip
    config.evaluate.pretraining.num_sequences = 0
    main.run(config, str(tmp_path / "evaluate"))
    report = json.loads((tmp_path / "evaluate" / "report" / "report.json").read_text())
    assert [one["messages"] for one in report["samples"]] == [TALKS[0][:1], TALKS[1][:3]]
    assert [one["reference"] for one in report["samples"]] == ["By the river.", "Two hens."]
    assert report["samples"][1]["prompt"] == "user: Who is there?\n\nassistant: A fox.\n\nuser: And who else?"
    assert report["results"]["talks"]["sft"]["rouge_l"]["mean"] == 0.5 and "accuracy" in report["reward_model"]
    assert report["language"]["sft"]["tasks"]["yes"]["mean"] in (0.0, 1.0)


# Data -----------------------------------------------------------------------------------------------------------------


def test_tfds_sets_hold_dialogues(tmp_path):
    made = [{"messages": TALKS[0]}, {"messages": TALKS[1][:3], "completion": "Two."}]
    made.append({"prompt": "a", "completion": "b"})
    (name,) = write(tmp_path / "d.jsonl", made)
    build.build("demonstrations", {"train": name.removeprefix("jsonl:")}, str(tmp_path / "tfds"), 1, 0)
    found = sources.load(("tfds:demonstrations:train",), "demonstrations", 0, str(tmp_path / "tfds"))
    assert all(one in made for one in found) and len(found) == 3 and found[0] != found[1] != found[2] != found[0]


def test_prompts_are_prepared_by_what_the_user_wrote():
    def talk(asked, said):
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said},
                             {"role": "user", "content": "Go on."}]}  # fmt: skip

    mail = "Mail ann.lee@example.com"
    told = [talk(mail, "Yes."), talk("Where?", mail), talk("Where?", "No.")]
    kept, kinds = prompts.drop_pii(told)
    assert kept == told[1:] and len(kinds) == 1
    assert prompts.deduplicate([*told, told[1]], 200) == told
    split = prompts.Split("key", 0.4, 0.2)
    ready = prompts.prepare(
        told[1:], prefix_chars=200, max_per_user=9, split=split, max_tokens=60, language_sample=1,
        count_tokens=lambda texts: [len(text) for text in texts],
    )  # fmt: skip
    sides = [side for side in (ready.train, ready.valid, ready.test) if side]
    assert sides == [told[2:]]  # the other has 71 letters
    ready = [prompts.split_of({"user": None, "prompt": about(talk)}, *split) for talk in told[1:]]
    assert len(set(ready)) == 1  # one opening, one side
