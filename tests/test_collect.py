"""Stage `collect`: who writes and who ranks, the same every time, and a later stage of the pipeline reads it."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import common, pretrain_tiny, reward_6b
from instructgpt_jax import main, simulated
from instructgpt_jax.data import datasets, encoding, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import people
from instructgpt_jax.labeling import kinds, make
from instructgpt_jax.sharding import make_mesh
from instructgpt_jax.stages import collect
from instructgpt_jax.validate import validate

PROMPTS = 30
FILES = {"rankings": "comparisons", "ratings": "ratings"}  # what evaluate calls what label writes
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Workdir of a base model that has learned next to nothing."""
    config = pretrain_tiny.get_config("tiny")
    config.data.tokenizer, config.data.pretraining = "train:400", ("simulated:pretraining:200",)
    config.pretrain.num_steps, config.eval_every = 2, 0
    workdir = tmp_path_factory.mktemp("runs") / "base"
    main.run(config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def other(base):
    """Workdir of another base model with the same tokenizer."""
    config = pretrain_tiny.get_config("tiny")
    config.data.tokenizer, config.data.pretraining = str(base / "tokenizer"), ("simulated:pretraining:200",)
    config.pretrain.num_steps, config.eval_every, config.seed = 2, 0, 1
    main.run(config, str(base.parent / "other"))
    return base.parent / "other"


def configure(base, **changes):
    config = common.config("collect")
    for name in ("one", "two"):
        config.models[name] = common.network(init_from=str(base))
    config.data.prompts = (f"simulated:prompts:train:{PROMPTS}",)
    config.data.max_prompt_tokens = 0
    config.collect = {
        "num_prompts": 0, "completions": (2, 4), "labelers": ("training", "heldout"), "shuffled": True,
        "batch_size": 16, "max_prompt_length": 200, "response_length": 8, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    config.collect.update(changes)
    return config


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def collected(base):
    workdir = base.parent / "collect"
    main.run(configure(base), str(workdir))
    return workdir


def test_every_prompt_is_completed_and_ranked_by_each_group(collected):
    records = read(collected / "comparisons.jsonl")
    prompts = simulated.records(f"prompts:train:{PROMPTS}")
    assert [r["prompt"] for r in records] == [p["prompt"] for p in prompts for _ in range(2)]
    assert {len(r["completions"]) for r in records} == {2, 3, 4}
    for training, heldout in zip(records[::2], records[1::2], strict=True):
        assert (training["group"], heldout["group"]) == ("training", "heldout")
        assert training["completions"] == heldout["completions"] and training["user"] == heldout["user"]
    for record in records:
        labeler = next(x for x in simulated.labelers(record["group"]) if x.name == record["labeler"])
        assert record["ranking"] == simulated.rank(labeler, record["prompt"], record["completions"], 0)
    assert len({r["labeler"] for r in records}) > 5
    texts = [text for r in records[::2] for text in r["completions"]]
    assert len(set(texts)) > 0.9 * len(texts)  # every completion has random numbers of its own
    assert json.loads((collected / "data.json").read_text())["prompts"]["records"] == PROMPTS


def test_shuffled_ranks_are_the_same_ranks_elsewhere(collected):
    ranked, shuffled = read(collected / "comparisons.jsonl"), read(collected / "shuffled.jsonl")
    assert len(ranked) == len(shuffled)
    for a, b in zip(ranked, shuffled, strict=True):
        assert a | {"ranking": sorted(a["ranking"])} == b | {"ranking": sorted(b["ranking"])}
    assert sum(a["ranking"] != b["ranking"] for a, b in zip(ranked, shuffled, strict=True)) > PROMPTS


def test_the_policies_take_turns(base, other, collected, tmp_path):
    """`collected` has one model under both names: with another under the second, every other completion is another."""
    config = configure(base, labelers=(), shuffled=False)
    config.models.two.init_from = str(other)
    main.run(config, str(tmp_path / "two"))
    unranked = read(tmp_path / "two" / "unranked.jsonl")
    for n, record in enumerate(unranked):  # for the key of a questionnaire
        assert record["policies"] == [("one", "two")[(n + k) % 2] for k in range(len(record["completions"]))]
    pairs = zip(read(collected / "comparisons.jsonl")[::2], unranked, strict=True)
    same = [[a == b for a, b in zip(x["completions"], y["completions"], strict=True)] for x, y in pairs]
    kept = [row[k] for n, row in enumerate(same) for k in range(len(row)) if (n + k) % 2 == 0]
    changed = [not row[k] for n, row in enumerate(same) for k in range(len(row)) if (n + k) % 2 == 1]
    # Both know next to nothing, so that the same random number often means the same token.
    assert all(kept) and sum(changed) > len(changed) / 3


def test_completions_keep_what_was_sampled(base, collected):
    """The kept ids decode to the text, and an answer is cut where it has every token it may have and no end."""
    tokenizer = tokenizers.load(base / "tokenizer")
    records = read(collected / "comparisons.jsonl")
    assert {record["tokenizer"] for record in records} == {tokenizer.hash}
    kept = [row for r in records for row in zip(r["completions"], r["tokens"], r["ended"], strict=True)]
    for text, tokens, ended in kept:
        assert tokenizer.decode(tokens) == text and tokenizer.eos_id not in tokens
        assert len(tokens) < 8 if ended else len(tokens) == 8
    assert {ended for *_, ended in kept} == {True, False}  # a policy that knows nothing ends by chance
    again = [tokenizer.encode([text])[0].tolist() for text, *_ in kept]
    assert any(ids != tokens for ids, (_, tokens, _) in zip(again, kept, strict=True))  # another segmentation


def test_the_reward_model_reads_what_ppo_will_score(base, collected):
    """Sampled tokens, an end of text behind those that ended alone: in training and in the evaluation's scores."""
    tokenizer = tokenizers.load(base / "tokenizer")
    records = sources.load((f"jsonl:{collected}/comparisons.jsonl",), "comparisons", 0)
    options = dict(row_length=256, process_rows=8, max_completions=4, shared_prompt=True)
    encoded = encoding.comparisons(records, tokenizer, encoding.Allowed(0, 0), **options)
    for example, number in zip(encoded.examples, encoded.records, strict=True):
        record = records[int(number)]
        want = [t + [tokenizer.eos_id] * e for t, e in zip(record["tokens"], record["ended"], strict=True)]
        assert [ids.tolist() for ids in example.completions] == want
        assert [ids.tolist() for ids in encoding.completions([record], tokenizer)[0]] == want


def test_tokens_of_another_tokenizer_are_not_used(base, tmp_path):
    """The texts are encoded then; `ended` still holds. Texts from people end unless the record says otherwise."""
    tokenizer = tokenizers.load(base / "tokenizer")
    plain = {"prompt": "a", "completions": [" b", " c"], "ranking": [1, 2]}
    other = plain | {"tokens": [[5], [6]], "tokenizer": "another", "ended": [True, False]}
    eos, texts = tokenizer.eos_id, [ids.tolist() for ids in tokenizer.encode([" b", " c"])]
    from_people, from_another = (
        [ids.tolist() for ids in completions] for completions in encoding.completions([plain, other], tokenizer)
    )
    assert from_people == [texts[0] + [eos], texts[1] + [eos]]
    assert from_another == [texts[0] + [eos], texts[1]]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"ended": [True]}, r"ended must be a list of 2 booleans, one a completion, got \[True\]"),
        ({"ended": [1, 0]}, "ended must be a list of 2 booleans"),
        ({"tokens": [[1], [2]]}, "tokenizer must be the hash that tokens belong to, got None"),
        ({"tokens": [[1], ["x"]], "tokenizer": "h"}, "tokens must be 2 lists of token ids"),
        ({"tokens": [[1], [-1]], "tokenizer": "h"}, "tokens must be 2 lists of token ids"),
        ({"tokens": [[1], []], "tokenizer": "h", "ended": [True, False]}, r"completions\[1\] must have a token"),
        ({"completions": ["", " c"], "ended": [False, True]}, r"completions\[0\] must have a token"),
    ],
)
def test_what_was_sampled_is_checked(tmp_path, fields, message):
    record = {"prompt": "a", "completions": [" b", " c"], "ranking": [1, 2]} | fields
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"c\.jsonl:1: {message}"):
        sources.load((f"jsonl:{tmp_path}/c.jsonl",), "comparisons", 0)


def test_kept_tokens_beyond_the_vocabulary_are_a_bad_record(base, tmp_path):
    tokenizer = tokenizers.load(base / "tokenizer")
    record = {"prompt": "a", "completions": [" b", " c"], "ranking": [1, 2], "tokens": [[1], [100_000]]}
    record["tokenizer"] = tokenizer.hash
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    records = sources.load((f"jsonl:{tmp_path}/c.jsonl",), "comparisons", 0)
    options = dict(row_length=64, process_rows=8, max_completions=4, shared_prompt=True)
    with pytest.raises(ValueError, match=r"c\.jsonl:1: tokens must be ids of the tokenizer, below \d+, got 100000"):
        encoding.comparisons(records, tokenizer, encoding.Allowed(0, 0), **options)


def test_a_complete_workdir_is_left_alone(base, collected, capsys):
    before = (collected / "comparisons.jsonl").stat().st_mtime_ns
    main.run(configure(base), str(collected))
    assert "nothing to do" in capsys.readouterr().err
    assert (collected / "comparisons.jsonl").stat().st_mtime_ns == before


def test_texts_do_not_depend_on_the_batch_or_on_the_other_prompts(base, collected, tmp_path):
    main.run(configure(base, batch_size=8, num_prompts=10, labelers=(), shuffled=False), str(tmp_path))
    records = read(tmp_path / "unranked.jsonl")
    assert len(records) == 10 and not (tmp_path / "comparisons.jsonl").exists()
    assert all("ranking" not in record for record in records)
    ranked = {(r["prompt"], *r["completions"]) for r in read(collected / "comparisons.jsonl")}
    assert all((r["prompt"], *r["completions"]) in ranked for r in records)


def test_another_seed_writes_other_texts(base, collected, tmp_path):
    config = configure(base, num_prompts=6, labelers=(), shuffled=False)
    config.seed = 1
    main.run(config, str(tmp_path))
    ours = {tuple(r["completions"]) for r in read(tmp_path / "unranked.jsonl")}
    assert not ours & {tuple(r["completions"]) for r in read(collected / "comparisons.jsonl")}


def test_a_reward_model_learns_from_the_file(base, collected, tmp_path):
    config = reward_6b.get_config("tiny")
    config.models.model.init_from = str(base)
    config.data.comparisons = (f"jsonl:{collected}/comparisons.jsonl",)
    config.data.demonstrations, config.data.max_prompt_tokens = (), 0
    config.reward.num_steps, config.eval_every, config.data.valid_fraction = 1, 0, 0.0
    main.run(config, str(tmp_path))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["reward/pairs"] > 0


def questionnaire(source, **changes):
    config = common.labeling("comparisons")
    source = source if ":" in str(source) else f"jsonl:{source}"
    config.label.update({"step": "simulate", "source": (source,), "projects": "shared", "overlap": 1} | changes)
    return config


def test_rankings_by_questionnaire_are_the_same_data(base, collected, tmp_path):
    """Unranked answers, their questionnaire, an export of Label Studio and its reader: the batches of the reward model
    are those of the rankings that `collect` writes by itself, bit for bit."""
    main.run(configure(base, labelers=(), shuffled=False), str(tmp_path / "collect"))
    main.run(questionnaire(tmp_path / "collect" / "unranked.jsonl"), str(tmp_path / "label"))
    asked = [record for record in read(collected / "comparisons.jsonl") if record["group"] == "training"]
    answered = read(tmp_path / "label" / "comparisons.jsonl")
    for line, record in zip(answered, asked, strict=True):
        assert line.items() >= record.items()  # and with it tokens, ends and labeler
    (tmp_path / "direct.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    found, mesh = [], make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    for path in (tmp_path / "direct.jsonl", tmp_path / "label" / "comparisons.jsonl"):
        config = reward_6b.get_config("tiny")
        config.data.update({"tokenizer": str(base / "tokenizer"), "comparisons": (f"jsonl:{path}",)})
        config.data.max_prompt_tokens = 0
        data = datasets.load(config, config.reward, "comparisons", mesh)
        found.append((data.read, [data.train_batches[n] for n in range(len(data.train_batches))]))
    assert found[0][0] == found[1][0] and len(found[0][1]) > 2
    jax.tree.map(np.testing.assert_array_equal, found[0][1], found[1][1])

    # The ratings are what the panel says; both files judge the policies.
    labelers = {one.name: one for one in simulated.labelers("training")}
    ratings = read(tmp_path / "label" / "ratings.jsonl")
    for line in ratings:
        said = simulated.rate(labelers[line["labeler"]], line["prompt"], line["answer"], 0)
        assert {"rating": line["rating"], **line["fields"], "toxic": said["toxic"]} == said
    evaluated = {"order": ("one", "two"), "baseline": "one", "preferences": ()}
    evaluated |= {name: (f"jsonl:{tmp_path}/label/{file}.jsonl",) for name, file in FILES.items()}
    config = ConfigDict({"seed": 0, "evaluate": evaluated, "data": {"skip_bad": 0, "data_dir": ""}})
    judged = people.load(config, {"instruct": [record["prompt"] for record in asked]})
    rows = people.judge(config, judged, {"instruct": []}, {})[0]["instruct"]
    assert 0.2 < rows["two"]["win_rate"]["training"]["mean"] < 0.8  # one model under two names
    assert set(rows["one"]["metadata"]) == set(kinds.FIELDS) and rows["one"]["likert"]["training"]["n"] > 20


def test_simulated_labelers_answer_what_they_are_asked(collected, tmp_path):
    """A project each, some tasks for several; both groups where projects are shared."""
    answers = [r for r in read(collected / "comparisons.jsonl") if r["group"] == "training"][:8]
    lines = [{key: r[key] for key in ("prompt", "completions", "tokens", "tokenizer", "ended")} for r in answers]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    several = questionnaire(tmp_path / "a.jsonl", projects="labeler", overlap=3, overlap_share=0.5)
    main.run(several, str(tmp_path / "own"))
    key = make.read_key(epath.Path(tmp_path / "own"))
    assert [len(task.labelers) for task in key.values()].count(3) == 4
    pages = [(line["task"], line["labeler"]) for line in read(tmp_path / "own" / "comparisons.jsonl")]
    assert sorted(pages) == sorted((task.id, name) for task in key.values() for name in task.labelers)
    both = questionnaire(tmp_path / "a.jsonl", groups=("training", "heldout"))
    main.run(both, str(tmp_path / "both"))
    for group in ("training", "heldout"):
        got = [line["labeler"] for line in read(tmp_path / "both" / "comparisons.jsonl") if line["group"] == group]
        assert got == [simulated.draw_labelers(group, record["prompt"], 1, 0)[0].name for record in answers]
    main.run(questionnaire("simulated:comparisons:train:20"), str(tmp_path / "nine"))
    ranked = read(tmp_path / "nine" / "comparisons.jsonl")
    for line in ranked:
        labeler = simulated.draw_labelers("training", line["prompt"], 1, 0)[0]
        assert line["ranking"] == simulated.rank(labeler, line["prompt"], line["completions"], 0)
    assert max(len(line["ranking"]) for line in ranked) == 9
    for changes in ({"groups": ("researcher",)}, {"kind": "toxicity"}):
        with pytest.raises(ValueError, match="^config.label.kind must be 'comparisons' and groups of .* for step 's"):
            main.run(questionnaire(tmp_path / "a.jsonl", **changes), str(tmp_path / "none"))


def test_the_prompts_of_a_run_are_drawn_by_its_seed():
    few = collect.choose(100, 10, 0)
    assert few == sorted(set(few)) and len(few) == 10 and few != collect.choose(100, 10, 1)
    assert collect.choose(5, 10, 0) == collect.choose(5, 0, 3) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labelers": ("experts",)}, "labelers must be a tuple of .*'experts'"),
        ({"completions": (4, 3)}, r"completions must be a pair .* got \(4, 3\)"),
        ({"labelers": (), "shuffled": True}, "labelers must name a group"),
        ({"max_prompt_length": 0}, "max_prompt_length must be an integer of at least 1"),
    ],
)
def test_bad_settings_are_named(base, changes, message):
    with pytest.raises(ValueError, match=message):
        validate(configure(base, **changes), make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
