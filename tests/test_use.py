"""Stages that use trained models: select, sample, export, and sweeps; on models trained for a few steps."""

import functools
import io
import json
import pathlib
import re
import shutil

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import install
from etils import epath

from configs import common, export, pretrain_tiny, reward_6b, sample, select, sft_1b3
from instructgpt_jax import errors, main, models, networks, responses, run_tokenizer, sharding, sweep
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import curves
from instructgpt_jax.models import hf
from instructgpt_jax.stages import sample as sample_stage
from instructgpt_jax.stages import select as select_stage
from instructgpt_jax.training import checkpoint, metrics

MESH = {"data": 1, "fsdp": -1, "tensor": 1}
pytestmark = pytest.mark.usefixtures("one_device")


def run(config, workdir, **changes):
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    main.run(config, str(workdir))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a base model, an SFT model with two snapshots and a reward model."""
    root = tmp_path_factory.mktemp("runs")
    small = {"data__pretraining": ("simulated:pretraining:200",)}
    run(pretrain_tiny.get_config("tiny"), root / "base", data__tokenizer="train:400", pretrain__num_steps=2,
        eval_every=0, **small)  # fmt: skip
    config = sft_1b3.get_config("tiny")
    run(config, root / "sft", models__model__init_from=f"{root}/base", sft__optimizer__lr=1e-2, sft__num_steps=2,
        data__demonstrations=("simulated:demonstrations:60",), sft__batch_size=8, eval_every=1,
        snapshot_every=1)  # fmt: skip
    run(reward_6b.get_config("tiny"), root / "reward", models__model__init_from=f"{root}/sft",
        data__comparisons=("simulated:comparisons:40",), data__demonstrations=("simulated:demonstrations:20",),
        data__max_prompt_tokens=0, reward__num_steps=1, eval_every=0)  # fmt: skip
    return root


def selecting(runs, **changes):
    config = select.get_config("tiny")
    changes = {"models__model__init_from": f"{runs}/sft", "models__reward__init_from": f"{runs}/reward"} | changes
    changes |= {"data__prompts": ("simulated:prompts:120",), "select__batch_size": 8, "select__response_length": 8}
    return config, changes


def abstract(config, name, mesh, head="lm"):
    tokenizer = tokenizers.load(run_tokenizer.beside(config.models[name].init_from))
    return networks.build(f"config.models.{name}", config.models[name], head, mesh, tokenizer, 0)


@pytest.fixture(scope="module")
def selected(runs):
    config, changes = selecting(runs, select__num_batches=2)
    run(config, runs / "selected", **changes)
    return runs / "selected"


def test_select_keeps_the_snapshot_of_the_best_score(runs, selected):
    result = json.loads((selected / "selection.json").read_text())
    table = {row["step"]: row["score"] for row in result["snapshots"]}
    assert sorted(table) == [1, 2] and table[1] != table[2]
    best = max(table, key=table.get)
    assert result["step"] == best

    config, changes = selecting(runs)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config.models.model.init_from = str(selected)
    network = abstract(config, "model", sharding.make_mesh(MESH))
    snapshot = checkpoint.load_params(runs / "sft" / "snapshots" / str(best), network.abstract)
    jax.tree.map(np.testing.assert_array_equal, network.load(), snapshot)  # what init_from=<select workdir> loads


def test_validation_prompts_that_a_policy_was_trained_on_are_told(runs, selected, capsys):
    """By the stage that trained on them, also when the epoch was chosen since; a base model has seen no prompt."""
    asked = sources.load(("simulated:demonstrations:60",), "prompts", 0)
    trained_on, _ = datasets.split(asked, 0.05)
    said = f"ppo: {len(trained_on)} of 60 validation prompts are training prompts of {runs}/sft, whose records"
    for init_from, told in ((runs / "sft", True), (selected, True), (runs / "base", False), (runs / "none", False)):
        networks.tell_trained_on("ppo", str(init_from), asked)
        assert (said in capsys.readouterr().err) == told


def test_select_scores_as_the_reward_model_does_without_packing(runs):
    config, changes = selecting(runs)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config.data.tokenizer = str(runs / "sft" / "tokenizer")
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        policy = abstract(config, "model", mesh)
        scorer = select_stage.Scorer(config, policy.config, mesh)
        row, samples = scorer.score(policy.load())
        reward = abstract(config, "reward", mesh, "scalar")
        params = reward.load()
        tokenizer = tokenizers.load(config.data.tokenizer)
        assert 1 <= row["n"] <= 8 and len(samples) == min(4, row["n"])
        batch = next(iter(scorer._data.valid["valid"]()))
        sampler = responses.sampler_of(policy.config, tokenizer, config.select, config.seed)  # whatever the wave
        asked = batch["prompts"], batch["prompt_lengths"], batch["index"]
        answers = jax.device_get(responses.answer_batch(sampler, policy.load(), *asked, 0)).episodes

    @jax.jit
    def score(params, tokens, segments):
        hidden = models.hidden(reward.config, params, tokens, jnp.arange(128)[None] * segments, segments)
        return models.scalar(reward.config, params, hidden)

    for number in range(3):
        episode = jax.tree.map(lambda x: x[number], answers)  # noqa: B023
        prompt, response = episode.prompts[: episode.prompt_lengths], episode.responses[episode.response_mask]
        sequence = np.concatenate([prompt, response])
        tokens = np.pad(sequence, (0, 128 - len(sequence)))[None]
        segments = (np.arange(128) < len(sequence))[None].astype(np.int32)
        want = float(score(params, tokens, segments)[0, len(sequence) - 1])
        assert samples[number]["score"] == pytest.approx(want, abs=1e-5)
        assert samples[number]["prompt"] == tokenizer.decode(prompt)
        assert samples[number]["response"] == tokenizer.decode(response[response != tokenizer.eos_id])


def test_select_makes_a_damaged_choice_again(runs, selected, tmp_path, capsys):
    shutil.copytree(selected, tmp_path, dirs_exist_ok=True)
    step = json.loads((selected / "selection.json").read_text())["step"]
    (tmp_path / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
    config, changes = selecting(runs, select__num_batches=2)
    run(config, tmp_path, **changes)
    assert f"checkpoint {step} in {tmp_path} is damaged (state/_METADATA is missing)" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path) == (step, {})
    assert (tmp_path / "selection.json").read_bytes() == (selected / "selection.json").read_bytes()


def test_select_by_loss_takes_what_the_run_measured(runs):
    config, changes = selecting(runs, select__by="loss")
    run(config, runs / "selected_by_loss", **changes)
    result = json.loads((runs / "selected_by_loss" / "selection.json").read_text())
    lines = map(json.loads, (runs / "sft" / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["sft/valid_loss"] for line in lines if "sft/valid_loss" in line}
    assert result["step"] == min(losses, key=losses.get)
    assert result["snapshots"] == [{"step": step, "loss": losses[step]} for step in (1, 2)]


def test_select_again_does_nothing(runs, selected, capsys):
    before = {path: path.stat().st_mtime_ns for path in selected.glob("*.json*") if path.name != "config.json"}
    config, changes = selecting(runs, select__num_batches=2)
    run(config, selected, **changes)
    assert "complete" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_select_needs_snapshots(runs, tmp_path):
    config, changes = selecting(runs, models__model__init_from=f"{runs}/base")
    with pytest.raises(ValueError, match=r"init_from must be a workdir with snapshots \(config.snapshot_every=-1\)"):
        run(config, tmp_path, **changes)


def sampling(runs, tmp_path, **changes):
    changes = {"models__model__init_from": f"{runs}/sft", "sample__response_length": 6} | changes
    run(sample.get_config("tiny"), tmp_path, **changes)
    return [json.loads(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]


def test_sample_is_greedy_decoding(runs, tmp_path, capsys):
    (answer,) = sampling(runs, tmp_path, sample__prompts=("Tell me about Mira.\n",), sample__temperature=0.0)
    config = sample.get_config("tiny")
    config.models.model.init_from = f"{runs}/sft"
    network = abstract(config, "model", sharding.make_mesh(MESH))
    params = network.load()
    tokenizer = tokenizers.load(runs / "sft" / "tokenizer")
    tokens, eos = tokenizer.encode(["Tell me about Mira.\n"])[0].tolist(), tokenizer.eos_id
    start = len(tokens)
    logits = jax.jit(functools.partial(models.logits, network.config))
    while len(tokens) < start + 6 and tokens[-1] != eos:
        padded = np.zeros((1, 64), np.int32)  # a causal model does not see what is behind
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(params, padded)[0, len(tokens) - 1])))
    assert answer["response"] == tokenizer.decode([token for token in tokens[start:] if token != eos])
    assert answer["ended"] == (tokens[-1] == eos)
    assert answer["model"] == f"{runs}/sft" and answer["prompt"] == "Tell me about Mira.\n"
    assert answer["prompt"] + answer["response"] in capsys.readouterr().out


def test_sample_answers_the_same_from_a_workdir_a_snapshot_and_hugging_face(runs, tmp_path):
    run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/sft")
    last = max(checkpoint.steps(runs / "sft", checkpoint.SNAPSHOTS))
    sources = (f"{runs}/sft", f"{runs}/sft/snapshots/{last}", str(tmp_path / "hf"))
    prompts = {"sample__prompts": ("Where is Mira?\n", "List two animals.\n")}
    answers = [
        sampling(runs, tmp_path / str(number), models__model__init_from=source, **prompts)
        for number, source in enumerate(sources)
    ]
    responses = [[(answer["response"], answer["ended"]) for answer in some] for some in answers]
    assert responses[0] == responses[1] == responses[2]
    assert [some[0]["model"] for some in answers] == list(sources)


def test_sample_reads_files_and_answers_do_not_depend_on_the_batch(runs, tmp_path):
    prompts = [f"Count to {number}." for number in range(10)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    texts = sampling(runs, tmp_path / "a", sample__file=f"{tmp_path}/prompts.txt")
    records = sampling(runs, tmp_path / "b", sample__file=f"{tmp_path}/prompts.jsonl", sample__batch_size=16)
    assert [answer["prompt"] for answer in texts] == prompts
    assert texts == records
    assert len({answer["response"] for answer in texts}) > 5


def test_sample_talks_in_a_terminal(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\\n\n" + "long " * 600 + "\nBye.\n"))
    answers = sampling(runs, tmp_path)
    assert [answer["prompt"] for answer in answers] == ["Hello.\n", "Bye."]
    assert "error: the prompt must have 1 to 506 tokens (a context of 512 less" in capsys.readouterr().err


def test_sample_goes_on_after_a_piped_line_that_is_no_utf_8(runs, tmp_path, monkeypatch, capsys):
    piped = io.TextIOWrapper(io.BytesIO("\ufeffOne.\r\nTwo\u2028too.\n".encode() + b"caf\xe9\nEnd."), encoding="ascii")
    monkeypatch.setattr("sys.stdin", piped)
    assert [answer["prompt"] for answer in sampling(runs, tmp_path)] == ["One.", "Two\u2028too.", "End."]
    assert "error: the prompt holds bytes that are no UTF-8, or half of a surrogate pair" in capsys.readouterr().err


def test_sample_adds_to_a_file_in_a_bucket(runs, monkeypatch):
    install(monkeypatch)
    folder = epath.Path("gs://bucket/run")
    (first,) = sampling(runs, folder, sample__prompts=("Hé.",))
    with pytest.raises(KeyboardInterrupt), sample_stage.adding(folder / "samples.jsonl") as add:
        add(json.dumps(first) + "\n")
        raise KeyboardInterrupt
    assert sampling(runs, folder, sample__prompts=("Hé.",)) == [first] * 3


def test_sample_says_which_file_a_full_disk_stopped(runs, tmp_path):
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as stopped:
        sampling(runs, tmp_path, sample__prompts=("Hi.",))
    assert errors.describe(stopped.value) == f"{tmp_path}/samples.jsonl: No space left on device"


def test_lines_of_a_run_are_whole_whatever_their_text(tmp_path):
    path = tmp_path / "samples.jsonl"
    whole = [{"step": 1, "prompt": "a\u2028b\x85c"}, {"step": 2, "prompt": "é"}]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole).encode()
    path.write_bytes(text + '{"step": 3, "prompt": "é'.encode()[:-1])  # cut inside a character
    assert metrics.read_lines(path) == whole
    metrics.JsonLines(path, 2).close()
    assert path.read_bytes() == text
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "x\xe2\x80\xa8": 1.0}\n{"step": 2, "x')
    assert curves.read(tmp_path) == {"x\u2028": [[1, 1.0]]}
    assert sweep.last_value(tmp_path, "x\u2028") == (1, 1.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample__file": "LATIN-1"}, "latin-1.txt:2: invalid UTF-8 at byte 3 of the line"),
        ({"sample__prompts": ("Hi.", "caf\udce9")}, r"config.sample.prompts\[1\] holds bytes that are no UTF-8"),
        ({"sample__prompts": ("Hi.", "long " * 600)}, r"config.sample.prompts\[1\] must have 1 to 506 tokens"),
        # The text of a special token is text: 60 would be few tokens if each were the end of text.
        (
            {"sample__prompts": ("<|endoftext|>" * 60,)},
            r"config.sample.prompts\[0\] must .* 506 tokens .* got [67]\d\d",
        ),
        ({"sample__file": "nowhere.txt"}, "config.sample.file must exist, got 'nowhere.txt'"),
        ({"models__model__init_from": "REWARD"}, "config.models.model must be a language model, got a reward"),
    ],
)
def test_sample_refuses(runs, tmp_path, changes, message):
    (tmp_path / "latin-1.txt").write_bytes(b"one\ncaf\xe9\n")
    own = {"REWARD": f"{runs}/reward", "LATIN-1": f"{tmp_path}/latin-1.txt"}
    changes = {key: own.get(value, value) for key, value in changes.items()}
    config = sample.get_config("tiny")
    changes = {"models__model__init_from": f"{runs}/sft", "sample__prompts": ("Hi.",)} | changes
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path, sample__response_length=6, **changes)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.fixture(scope="module")
def ppo_workdir(runs):
    """What a PPO run leaves: raw and averaged weights of the policy, here told apart by a factor."""
    config = sample.get_config("tiny")
    config.models.policy = common.network(init_from=f"{runs}/sft")
    policy = abstract(config, "policy", sharding.make_mesh(MESH))
    params = policy.load()
    state = {"policy": {"params": params, "ema": jax.tree.map(lambda x: 2 * x, params)}, "value": {"params": params}}
    workdir = runs / "ppo"
    resolved = workdirs.as_json(workdirs.resolved(config, {"policy": policy.entry}))
    with checkpoint.Checkpoints(workdir, 1, "", "min") as checkpoints:
        checkpoints.save(1, state, {"step": 1, "data_index": 1, "config": resolved}, {})
    (workdir / "tokenizer").symlink_to(runs / "sft" / "tokenizer")
    return workdir, jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("weights, factor", [("", 2), ("ema", 2), ("params", 1)])
def test_export_of_a_policy(ppo_workdir, tmp_path, weights, factor):
    workdir, params = ppo_workdir
    run(export.get_config(), tmp_path / "hf", models__model__init_from=str(workdir), models__model__weights=weights)
    config, loaded = hf.load(tmp_path / "hf")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(factor * x, y), params, loaded)
    assert config.head == "lm"
    ours, theirs = tokenizers.load(workdir / "tokenizer"), tokenizers.load(tmp_path / "hf")
    np.testing.assert_array_equal(*(each.encode(["Hello, Mira."])[0] for each in (ours, theirs)))
    assert ours.eos_id == theirs.eos_id


def test_export_of_a_reward_model_goes_on_as_one(runs, tmp_path):
    run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/reward")
    text = (tmp_path / "hf" / "model_card.md").read_text()
    assert 'pipeline_tag: "text-classification"' in text and "| sft | comparisons |" not in text
    (row,) = re.findall(r"^\| reward \| (\d+) \| ([\d,]+) \| (\S+) \| .* \d+ x cpu \|$", text, re.MULTILINE)
    assert int(row[1].replace(",", "")) > 0 and float(row[2]) > 0  # its stage has counted them
    config = export.get_config()
    for init_from in (f"{runs}/reward", str(tmp_path / "hf")):
        config.models[pathlib.Path(init_from).name] = common.network(init_from=init_from)
    mesh = sharding.make_mesh(MESH)
    original, exported = (abstract(config, name, mesh, "scalar") for name in ("reward", "hf"))
    jax.tree.map(np.testing.assert_array_equal, original.load(), exported.load())


def test_export_refuses_a_folder_of_something_else(runs):
    with pytest.raises(ValueError, match="workdir must be empty or hold an earlier export, got .*sft"):
        run(export.get_config(), runs / "sft", models__model__init_from=f"{runs}/sft")


def test_export_refuses_the_folder_that_it_reads_from(runs, tmp_path):
    run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/sft")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "hf").iterdir()}
    (tmp_path / "link").symlink_to("hf")
    with pytest.raises(ValueError, match="workdir must be another folder than .*init_from, .*hf twice"):
        run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{tmp_path}/link/")
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "hf").iterdir()}


def test_export_over_another_models_export(runs, tmp_path):
    """The reward model's files, then the language model's: nothing of the first is left, a foreign file is refused."""
    run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/reward")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/sft")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "model_card.md"}
    assert {file.name for file in (tmp_path / "hf").iterdir()} == names
    assert hf.load(tmp_path / "hf")[0].head == "lm"
    (tmp_path / "hf" / "README.md").write_text("Mine.")
    with pytest.raises(ValueError, match="workdir must be empty .* 'README.md', which no export writes"):
        run(export.get_config(), tmp_path / "hf", models__model__init_from=f"{runs}/sft")
    assert {file.name for file in (tmp_path / "hf").iterdir()} == names | {"README.md"}


def test_export_keeps_template_and_generation_config_of_where_training_began(runs, tmp_path):
    """A chat checkpoint's files go from its folder into that of a run, and from there into the export."""
    chat, workdir = tmp_path / "chat", tmp_path / "sft"
    run(export.get_config(), chat, models__model__init_from=f"{runs}/base")
    (chat / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    end = json.loads((chat / "config.json").read_text())["eos_token_id"]
    given = {"do_sample": True, "temperature": 0.6, "eos_token_id": [end, 7]}
    (chat / "generation_config.json").write_text(json.dumps(given))

    config = sft_1b3.get_config("tiny")
    config.models.model.init_from = str(chat)
    shutil.copytree(runs / "sft", workdir, ignore=shutil.ignore_patterns("tokenizer"))
    run_tokenizer.settled(config, workdir)
    run(export.get_config(), tmp_path / "hf", models__model__init_from=str(workdir), export__dtype="bfloat16")
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == (chat / "chat_template.jinja").read_text()
    assert hf.read_generation(tmp_path / "hf").items() >= given.items()
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and hf.read_generation(tmp_path / "hf")["pad_token_id"] == raw["pad_token_id"]


def test_a_model_with_another_tokenizer_is_refused(runs, tmp_path):
    tokenizers.train(["a quite different text about xylophones"] * 9, 300, tmp_path / "tokenizer")
    config, changes = selecting(runs, data__tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"config.models.model must share the run's .* ids, got one of \d+ with"):
        run(config, tmp_path / "run", **changes)


def test_a_reward_model_may_know_more_tokens_than_the_policy(tmp_path):
    tokenizer = tokenizers.train(["Some text about Mira."] * 9, 300, tmp_path / "policy" / "tokenizer")
    more = tokenizer.pretrained(pad=False)
    more.add_tokens(["<|extra|>"])  # as GPT-J has more of than GPT-Neo
    more.save_pretrained(tmp_path / "reward" / "tokenizer")
    policy, reward = str(tmp_path / "policy"), str(tmp_path / "reward")
    run_tokenizer.check_shared("config.models.reward", reward, tokenizers.load(f"{policy}/tokenizer"))
    with pytest.raises(ValueError, match=r"config.models.reward .* where '<\|extra\|>' is unknown and not \d+"):
        run_tokenizer.check_shared("config.models.reward", policy, tokenizers.load(f"{reward}/tokenizer"))


def test_grid_of_the_paper():
    # Appendix E.9 names 2.55e-6, 3.74e-6 and 2.55e-5, and 8.05e-6 as the last rate that did not diverge.
    assert [float(value) for value in sweep.grid("2.55e-6:2.55e-5:7")] == pytest.approx(
        [2.55e-6, 3.74e-6, 5.49e-6, 8.06e-6, 1.18e-5, 1.74e-5, 2.55e-5], rel=1e-9
    )
    assert sweep.grid("1e-3, 2e-3") == ["1e-3", "2e-3"]
    assert sweep.grid("(0.9,0.95), (0.8,0.99)") == ["(0.9,0.95)", "(0.8,0.99)"] and sweep.grid("3") == ["3"]
    assert sweep.grid("jsonl:a,jsonl:b") == ["jsonl:a", "jsonl:b"] and sweep.grid("a:b:2") == ["a:b:2"]
    for wrong in ("", "1e-3,,2e-3", "1:2", "0:1:3", "1:2:1", "1:2:2.5", "1:2:3:4"):
        with pytest.raises(ValueError, match="--values must"):
            sweep.grid(wrong)


def test_sweep_over_a_key_that_no_run_has_ends_at_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    with pytest.raises(ValueError, match="^config.pretrain.lr must be a key of the configuration, it has no 'lr'"):
        sweep.run("configs/pretrain_tiny.py:tiny", "pretrain.lr", ["1", "2"], "pretrain/loss", tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_sweep_goes_on_after_a_failure_and_resumes(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    monkeypatch.setenv("XLA_FLAGS", compiling.SOON)
    overrides = ["--config.pretrain.num_steps=2", "--config.eval_every=0"]
    overrides += [f"--config.data.tokenizer={runs}/base/tokenizer"]
    overrides += ["--config.data.pretraining=simulated:pretraining:100"]
    arguments = ("configs/pretrain_tiny.py:tiny", "pretrain.optimizer.lr", ["1e-3", "nan"], "pretrain/loss", tmp_path)
    table = sweep.run(*arguments, overrides)
    assert [row["ended"] for row in table] == [True, False]
    assert table[0]["step"] == 2 and 5 < table[0]["pretrain/loss"] < 7 and table[1]["pretrain/loss"] is None
    assert "config.pretrain.optimizer.lr must be a positive number, got nan" in table[1]["error"]
    assert json.loads((tmp_path / "sweep.json").read_text()) == table
    assert (tmp_path / "lr_1e-3" / "metrics.jsonl").exists()


STOPPED = """
import signal, sys
from configs import pretrain_tiny
from instructgpt_jax import process


def train(config, mesh, workdir):
    with process.catching_signals():
        signal.raise_signal(signal.SIGTERM)
        process.end_if_stopped()


sys.modules["__main__"].STAGES["pretrain"] = train
get_config = pretrain_tiny.get_config
"""  # a configuration whose run gets SIGTERM


def test_sweep_ends_with_a_run_that_a_signal_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(pathlib.Path(__file__).parents[1])
    (tmp_path / "stopped.py").write_text(STOPPED)
    arguments = (f"{tmp_path}/stopped.py:tiny", "pretrain.optimizer.lr", ["1e-3", "2e-3"], "pretrain/loss")
    with pytest.raises(SystemExit) as ended:
        sweep.run(*arguments, tmp_path / "sweep", ["--config.data.pretraining=simulated:pretraining:100"])
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["lr_1e-3"]  # no table, and no other run
