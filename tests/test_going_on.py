"""Real stages that go on: with data that changed, with networks whose sources are gone or damaged."""

import json
import re
import shutil

import jax
import pytest
import small_runs
import tiny_supervised
from ml_collections import ConfigDict

from instructgpt_jax import main, networks, sharding
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets, sources, tokenizer
from instructgpt_jax.stages import ppo as ppo_stage
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.training import checkpoint, metrics, resume

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_supervised.make_world(tmp_path_factory.mktemp("world"))


def settings(world, stage="sft", **changes):
    steps = {f"{stage}.num_steps": 2, "checkpoint.every": 1, "checkpoint.keep_last": 3, "eval_every": 0}
    return tiny_supervised.config(stage, world, **steps | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def first(world, tmp_path_factory):
    """The workdir of an SFT run of two steps from fresh parameters."""
    workdir = tmp_path_factory.mktemp("first")
    main.run(settings(world), str(workdir))
    return workdir


def copy_of(world, folder):
    return shutil.copytree(world, folder / "world")


def mesh():
    return sharding.make_mesh(dict(data=1, fsdp=1, tensor=1))


# Data -----------------------------------------------------------------------------------------------------------------


def test_changed_data_are_refused_and_can_be_allowed(world, tmp_path, capfd):
    world, workdir = copy_of(world, tmp_path), tmp_path / "run"
    main.run(settings(world), str(workdir))
    kept = json.loads((workdir / "data.json").read_text())["demonstrations"]
    assert kept["records"] == 60 == kept["examples"] + kept["validation"] and kept["left_out"] == {}
    assert checkpoint.read_metadata(workdir)["data"] == {"demonstrations": kept}
    main.run(settings(world), str(workdir))  # complete
    main.run(settings(world, sft__num_steps=3), str(workdir))  # the same data, and so one line less to say
    assert "other data" not in capfd.readouterr().err

    file = world / "demonstrations.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:-1], lines[-1].replace('"completion": "', '"completion": "red ')]))
    counts = rf"60 records, {kept['examples']} examples \([0-9a-f]{{12}}\)"
    told = rf"demonstrations: {counts} before, {counts} now"
    logs = [(workdir / name).read_bytes() for name in ("metrics.jsonl", "data.json")]
    with pytest.raises(ValueError, match=rf"^the data of a run must stay the same, got other {told}; .*_changed=True$"):
        main.run(settings(world, sft__num_steps=4), str(workdir))
    assert logs == [(workdir / name).read_bytes() for name in ("metrics.jsonl", "data.json")]

    file.write_text("".join([*lines, lines[0]]))
    main.run(settings(world, sft__num_steps=4, data__allow_changed=True), str(workdir))
    told = r"^sft: goes on with other data, demonstrations: 60 records, .* 61 records, .*\(config.data.allow_changed\)$"
    assert re.search(told, capfd.readouterr().err, re.MULTILINE)
    main.run(settings(world, sft__num_steps=5), str(workdir))  # the checkpoint knows the new ones
    assert "other data" not in capfd.readouterr().err


def test_the_bias_of_a_reward_model_is_of_the_same_demonstrations(world, tmp_path):
    world = copy_of(world, tmp_path)
    stage = reward_stage.build(settings(world, "reward"), mesh())
    assert set(stage.read) == {"comparisons", "demonstrations"}
    file = world / "demonstrations.jsonl"
    file.write_text(file.read_text().replace("red", "blue"))
    again = reward_stage.build(settings(world, "reward"), mesh())
    assert again.read["comparisons"] == stage.read["comparisons"]
    with pytest.raises(ValueError, match="got other demonstrations: "):
        resume.check_data("reward", stage.read, again.read, False)


@pytest.mark.parametrize("kind", ["demonstrations", "comparisons", "prompts", "pretraining"])
def test_fingerprints_are_of_the_examples_whatever_reads_them(kind, tmp_path, monkeypatch):
    small = dict(row_length=256, microbatch_rows=8)
    options = {
        "demonstrations": small | dict(loss_on_prompt=False, pretraining_fraction=0.2, pretraining_fraction_of="loss"),
        "comparisons": small | dict(max_completions=9, shared_prompt=True, held_out_groups=()),
        "prompts": dict(max_prompt_length=200),
        "pretraining": small,
    }[kind]
    options = ConfigDict(options | dict(batch_size=8, num_epochs=0))
    words = [record["text"] for record in sources.load(("simulated:pretraining:50",), "pretraining", 0)]
    tokenizer.train(words, 400, tmp_path / "bpe")

    def read(number=60, **changes):
        data = dict(tokenizer=str(tmp_path / "bpe"), data_dir="", cache_dir="", skip_bad=0, skip_long=False)
        data |= dict(valid_fraction=0.2)
        data |= {name: (f"simulated:{name}:{number}",) for name in ("pretraining", kind)} | changes
        config = ConfigDict({"seed": 0, "data": data | {"max_prompt_tokens": 40}})
        return datasets.load(config, options, kind, mesh()).read

    whole = read()
    assert set(whole) == {kind, "pretraining"} if kind == "demonstrations" else {kind}
    assert whole == read(cache_dir=str(tmp_path / "cache")) == read(cache_dir=str(tmp_path / "cache"))
    other = read(90)
    assert all(whole[name]["fingerprint"] != other[name]["fingerprint"] for name in whole)
    monkeypatch.setattr(datasets.feeding, "process_slice", lambda _: (1, 2))
    assert whole == read()


def test_what_is_left_out_is_said_and_kept(world, tmp_path, capfd):
    world, workdir = copy_of(world, tmp_path), tmp_path / "run"
    long = {"prompt": "word " * 200, "completion": " It is red."}
    with open(world / "demonstrations.jsonl", "a") as file:
        file.write((json.dumps(long) + "\n") * 30)
        file.write('{"prompt": "a"}\n' + json.dumps({"prompt": "a", "completion": "b" * 200}) + "\n")
    changes = dict(data__max_prompt_tokens=90, data__skip_bad=2, data__valid_fraction=0.0, sft__num_steps=1)
    main.run(settings(world, **changes), str(workdir))
    told = "demonstrations: 92 records, 32 left out: prompt longer than 90 tokens (30), bad (2)"
    assert told in capfd.readouterr().err.splitlines()
    kept = json.loads((workdir / "data.json").read_text())["demonstrations"]
    assert kept.pop("fingerprint") and kept == {
        "records": 92,
        "examples": 60,
        "validation": 0,
        "left_out": {"prompt longer than 90 tokens": 30, "bad": 2},
    }


def test_tied_comparisons_are_said_once_for_both_sides_of_the_split(world, tmp_path, capfd):
    world = copy_of(world, tmp_path)
    tied = ({"prompt": f"{i}: red", "completions": [" a", " b"], "ranking": [1, 1]} for i in range(20))
    with open(world / "comparisons.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in tied)
    stage = reward_stage.build(settings(world, "reward", data__valid_fraction=0.3), mesh())
    resume.tell_data(stage.read, tmp_path)
    entry = json.loads((tmp_path / "data.json").read_text())["comparisons"]
    count = entry["left_out"]["all completions tied"]
    assert count >= 20 and entry["records"] == 80 == count + entry["examples"] + entry["validation"]
    told = f"comparisons: 80 records, {count} left out: all completions tied ({count})"
    assert capfd.readouterr().err.splitlines() == [told]


# Networks -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_what_it_was_begun_from(world, first, tmp_path, capfd):
    shutil.copytree(first, tmp_path / "first")
    started = dict(models__model=dict(size="", init_from=f"{tmp_path}/first", weights="", remat="full"))
    workdir = tmp_path / "run"
    main.run(settings(world, sft__num_steps=1, **started), str(workdir))
    shutil.copytree(workdir, tmp_path / "undisturbed")
    main.run(settings(world, sft__num_steps=2, **started), str(tmp_path / "undisturbed"))
    shutil.rmtree(tmp_path / "first")
    main.run(settings(world, sft__num_steps=2, **started), str(workdir))

    def losses(folder):
        return [line["sft/loss"] for line in metrics.read_lines(folder / "metrics.jsonl") if "sft/loss" in line]

    assert len(losses(workdir)) == 2 and losses(workdir) == losses(tmp_path / "undisturbed")
    stored = [json.loads((path / "config.json").read_text()) for path in (workdir, tmp_path / "undisturbed")]
    assert stored[0]["models"] == stored[1]["models"] and stored[0]["models"]["model"]["architecture"]
    with pytest.raises(ValueError, match="models.model.residual_dropout: 'nothing' in the workdir, 0.5 asked for"):
        changed = {"models__model": started["models__model"] | {"residual_dropout": 0.5}}
        main.run(settings(world, sft__num_steps=3, **changed), str(workdir))
    with pytest.raises(ValueError, match=r"config\.models\.model\.init_from must exist"):  # nothing to go on from
        main.run(settings(world, **started), str(tmp_path / "new"))


def test_a_damaged_init_from_is_refused_and_not_an_older_one_taken(world, first, tmp_path):
    source = shutil.copytree(first, tmp_path / "first")
    started = dict(models__model=dict(size="", init_from=str(source), weights=""))
    (source / "checkpoints" / "2" / "state" / "manifest.ocdbt").unlink()
    told = (
        rf"^config.models.model.init_from must be whole, got '{source}': {source}/checkpoints/2 is damaged "
        rf"\(state/manifest.ocdbt is missing\); the newest whole one is {source}/checkpoints/1: name it, or run [^\n]*$"
    )
    with pytest.raises(ValueError, match=told):
        main.run(settings(world, **started), str(tmp_path / "run"))
    named = dict(models__model=dict(size="", init_from=f"{source}/checkpoints/1", weights=""))
    main.run(settings(world, sft__num_steps=1, **named), str(tmp_path / "named"))
    for content in (b"", b"\xff"):
        (source / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"init_from must be whole, .*first/config.json must be JSON"):
            main.run(settings(world, **started), str(tmp_path / "other"))


def test_ppo_goes_on_without_the_sources_of_what_it_trains(world, first, tmp_path):
    """Shapes alone: policy and value are the checkpoint's; reference and reward model are frozen, and are needed."""
    policy, scorer = (shutil.copytree(first, tmp_path / name) for name in ("policy", "reward"))
    run = tmp_path / "run"

    def build(**models):
        config = small_runs.get_config(str(tmp_path))
        config.data.tokenizer = str(world / "bpe")
        config.models.policy = dict(size="", init_from=str(policy), weights="")
        config.models.reward = dict(size="tiny", init_from="", **tiny_supervised.MODEL)
        config.models.value = dict(size="", init_from=str(scorer), weights="")
        config.models = config.models.to_dict() | models
        config = resume.recalled(config, run)
        nets = ppo_stage.build_networks(config, mesh(), tokenizer.load(config.data.tokenizer))
        workdirs.claim(workdirs.resolved(config, {name: net.entry for name, net in nets.items()}), run)
        return nets

    own = dict(ref_policy=dict(size="", init_from=str(first), weights=""))
    nets = build(**own)
    with checkpoint.Checkpoints(run, 1, "", "min") as checkpoints:
        checkpoints.save(1, {"step": jax.numpy.zeros(())}, {}, {})
    shutil.rmtree(policy)
    shutil.rmtree(scorer)
    again = build(**own)
    assert {name: net.config for name, net in again.items()} == {name: net.config for name, net in nets.items()}
    with pytest.raises(ValueError, match=r"config\.models\.policy must go on from a checkpoint of the workdir"):
        again["policy"].load()
    told = r"config\.models\.ref_policy\.init_from must exist, got '.*/policy' \(it is empty: that of .*\.policy\)"
    with pytest.raises(ValueError, match=told):
        build(ref_policy=dict(size="", init_from="", weights=""))  # a frozen copy of the policy that it starts from
    with pytest.raises(ValueError, match=r"config\.models\.reward\.init_from must exist, got '.*/scores'"):
        build(**own, reward=dict(size="", init_from=str(tmp_path / "scores"), weights=""))


def test_what_does_not_train_is_read_as_it_was_when_ppo_began(world, first, tmp_path):
    """Shapes alone: the run that the policy and its reference start from is made longer meanwhile."""
    start, run = shutil.copytree(first, tmp_path / "start"), tmp_path / "run"
    config = small_runs.get_config(str(tmp_path))
    config.data.tokenizer = str(world / "bpe")
    config.models.policy = dict(size="", init_from=str(start), weights="")
    config.models.reward = dict(size="tiny", init_from="", **tiny_supervised.MODEL)

    def build():
        asked = resume.recalled(config, run)
        nets = ppo_stage.build_networks(asked, mesh(), tokenizer.load(config.data.tokenizer))
        workdirs.claim(workdirs.resolved(asked, {name: net.entry for name, net in nets.items()}), run)
        return {name: net.entry.get("version") for name, net in nets.items()}, nets["ref_policy"].source.path

    shutil.rmtree(start / "checkpoints" / "2")
    began = build()
    assert began == (dict(policy="step 1", ref_policy="step 1", reward=None, value=None), f"{start}/checkpoints/1")
    with checkpoint.Checkpoints(run, 1, "", "min") as checkpoints:
        checkpoints.save(1, {"step": jax.numpy.zeros(())}, {}, {})
    shutil.copytree(first / "checkpoints" / "2", start / "checkpoints" / "2")
    assert build() == began
    shutil.rmtree(start / "checkpoints" / "1")
    told = r"ref_policy.init_from must still hold what was read at first, step 1, got steps \[2\] in .*/start'"
    with pytest.raises(ValueError, match=told):
        build()
    with pytest.raises(ValueError, match=r"config\.models\.model\.init_from: 'not_here/model' must be a directory, or"):
        networks.shape("config.models.model", {"init_from": "not_here/model"})
