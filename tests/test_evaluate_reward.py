"""Reward models on comparisons: what the scores say, against plain loops; the stage from end to end."""

import itertools
import json

import jax
import numpy as np
import pytest

from configs import common, measured
from instructgpt_jax import main, models, reward
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.evaluation import baselines, scorers
from instructgpt_jax.models import hf
from tests import tiny_supervised


def _comparisons(count=40, seed=0):
    """Records of 2 to 5 completions with ties, and scores of which some are equal."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(count):
        K = int(rng.integers(2, 6))
        ranks = rng.integers(1, K + 1, K)
        ranking = (1 + np.searchsorted(np.unique(ranks), ranks)).tolist()
        texts = ["x" * int(rng.integers(1, 6)) for _ in range(K)]
        records.append({"prompt": str(i), "completions": texts, "ranking": ranking})
    return records, rng.integers(0, 4, sum(len(r["completions"]) for r in records)).astype(float)


def _cut(records, scores):
    ends = np.cumsum([len(record["completions"]) for record in records])
    return np.split(np.asarray(scores), ends[:-1])


def test_examine_counts_what_a_plain_loop_counts():
    records, scores = _comparisons()
    right, pairs, by_k, tied, untied = 0.0, 0, {}, [], []
    longer = {"preferred": [], "scored": [], "right_on_longer": [], "right_on_shorter": []}
    for record, given in zip(records, _cut(records, scores), strict=True):
        K, ranks = len(given), record["ranking"]
        for i, j in itertools.combinations(range(K), 2):
            if ranks[i] == ranks[j]:
                tied.append(abs(given[i] - given[j]))
                continue
            untied.append(abs(given[i] - given[j]))
            i, j = (i, j) if ranks[i] < ranks[j] else (j, i)
            hit = 0.5 if given[i] == given[j] else float(given[i] > given[j])
            right, pairs = right + hit, pairs + 1
            by_k.setdefault(str(K), []).append(hit)
            lengths = [len(record["completions"][k]) for k in (i, j)]
            if lengths[0] != lengths[1]:
                is_longer = lengths[0] > lengths[1]
                longer["preferred"].append(float(is_longer))
                longer["scored"].append(hit if is_longer else 1 - hit)
                longer["right_on_longer" if is_longer else "right_on_shorter"].append(hit)
    found = scorers.examine(records, scores, best_of=(2,))
    assert found["pairs"] == pairs and found["prompts"] == len(records)
    assert found["accuracy"]["mean"] == pytest.approx(right / pairs)
    assert {k: share["mean"] for k, share in found["by_k"].items()} == pytest.approx(
        {k: np.mean(hits) for k, hits in by_k.items()}
    )
    assert found["ties"]["pairs"] == len(tied)
    assert (found["ties"]["tied"], found["ties"]["untied"]) == pytest.approx((np.mean(tied), np.mean(untied)))
    assert {key: share["mean"] for key, share in found["length"].items()} == pytest.approx(
        {key: np.mean(hits) for key, hits in longer.items()}
    )


def test_best_of_n_is_the_mean_over_all_draws():
    records, scores = _comparisons(count=12, seed=1)
    for n in (1, 2, 3):
        chosen, ideal = [], []
        for record, given in zip(records, _cut(records, scores), strict=True):
            ranks, K = np.array(record["ranking"]), len(given)
            if K < max(n, 2) or len(set(record["ranking"])) == 1:
                continue
            quality = [
                np.mean([1.0 if ranks[k] < other else 0.5 * (ranks[k] == other) for other in np.delete(ranks, k)])
                for k in range(K)
            ]
            for key, means in ((given, chosen), (-ranks, ideal)):
                draws = []
                for draw in itertools.combinations(range(K), n):
                    best = max(key[k] for k in draw)
                    # The scorer has no preference among equals, those that were not drawn among them.
                    draws.append(np.mean([quality[k] for k in range(K) if key[k] == best]))
                means.append(np.mean(draws))
        found = scorers.examine(records, scores, best_of=(n,))["best_of"][str(n)]
        assert found["chosen"]["mean"] == pytest.approx(np.mean(chosen)), n
        assert found["ideal"]["mean"] == pytest.approx(np.mean(ideal)), n
        assert found["chosen"]["n"] == len(chosen)
        if n == 1:
            assert found["chosen"]["mean"] == pytest.approx(0.5)  # whatever is drawn is taken


def test_comparisons_without_a_preference_say_nothing_of_accuracy():
    records = [{"prompt": "a", "completions": ["x", "yy"], "ranking": [1, 1]}]
    found = scorers.examine(records, [0.0, 3.0], best_of=(2,))
    assert "accuracy" not in found and found["best_of"] == {} and found["length"] == {}
    assert found["ties"] == {"pairs": 1, "tied": 3.0}


def test_bag_of_words_learns_a_word_and_knows_no_others():
    train = [
        {"prompt": str(i), "completions": [f"good {word}", word], "ranking": [1, 2]}
        for i, word in enumerate(["red", "blue", "old", "new", "far", "near"] * 3)
    ]
    asked = [{"prompt": "?", "completions": ["good grey", "unheard of"], "ranking": [1, 2]}]
    scores, strength = baselines.words(train, asked, [hash(record["completions"][1]) for record in train])
    assert scores[0] > 0.1 and scores[1] == 0.0 and strength in baselines.STRENGTHS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Comparisons, and two reward models in Hugging Face format with heads of noise."""
    folder = tiny_supervised.make_world(tmp_path_factory.mktemp("world"))
    tokenizer = tokenizers.load(folder / "bpe")
    for seed in (1, 2):
        shape = {**tiny_supervised.MODEL, "vocab_size": tokenizer.vocab_size, "residual_dropout": 0.0}
        network = models.SIZES["tiny"].replace(**shape, head="scalar")
        params = models.init(network, jax.random.key(seed))
        head = params["scalar_head"]
        params["scalar_head"] = head | {"kernel": jax.random.normal(jax.random.key(seed), head["kernel"].shape)}
        hf.save(folder / f"model{seed}", network, params, tokenizer.pretrained(pad=True))
    return folder


def _config(world, **changes):
    config = measured.reward_evaluation()
    config.mesh = dict(data=1, fsdp=1, tensor=1)
    for name, seed in (("ours", 1), ("theirs", 2)):
        config.models[name] = common.network(init_from=str(world / f"model{seed}"))
    config.evaluate_reward.update(
        {
            "comparisons": (f"jsonl:{world}/comparisons.jsonl",),
            "bag_of_words": (f"jsonl:{world}/comparisons.jsonl",),
            "split": "valid", "batch_size": 16, "row_length": 96, "microbatch_rows": 4,
        }
    )  # fmt: skip
    config.data.valid_fraction = 0.3
    config.update_from_flattened_dict(changes)
    return config


def test_stage_scores_every_comparison_as_one_text_alone_has_it(world, tmp_path, one_device, capfd):
    main.run(_config(world), str(tmp_path / "run"))
    assert "comparisons.jsonl: theirs: accuracy" in capfd.readouterr().err
    results, source = json.loads((tmp_path / "run" / "rewards.json").read_text()), f"jsonl:{world}/comparisons.jsonl"
    assert set(results[source]) == {"ours", "theirs", "longer", "bag_of_words"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for line in (world / "comparisons.jsonl").read_text().splitlines()]
    assert 5 < len(lines) < len(everything) and {line["prompt"] for line in lines} <= {r["prompt"] for r in everything}
    tokenizer = tokenizers.load(world / "bpe")
    for name, seed in (("ours", 1), ("theirs", 2)):
        network, params = hf.load(world / f"model{seed}")
        line = lines[-1]
        for text, score in zip(line["completions"], line["scores"][name], strict=True):
            prompt = tokenizer.encode_prompts([line["prompt"]])[0][None]
            response = np.append(tokenizer.encode([text])[0], tokenizer.eos_id)[None].astype(np.int32)
            lengths, mask = np.array([prompt.shape[1]]), np.ones_like(response, bool)
            alone = reward.score(network, params, prompt, lengths, response, mask, 96, 1)
            assert score == pytest.approx(float(alone[0]), abs=1e-5)
    assert results[source]["ours"] == scorers.examine(
        lines, [score for line in lines for score in line["scores"]["ours"]], (2, 4)
    )

    # A run that was killed before the end goes on with the scores that it has, of these comparisons only.
    (tmp_path / "run" / "rewards.json").unlink()
    part = tmp_path / "run" / "parts" / "theirs.json"
    part.write_text(json.dumps({source: [0.0] * sum(len(line["completions"]) for line in lines)}))
    main.run(_config(world), str(tmp_path / "run"))
    again = json.loads((tmp_path / "run" / "rewards.json").read_text())[source]
    assert again["ours"] == results[source]["ours"] and again["theirs"]["accuracy"]["mean"] == 0.5
    (tmp_path / "run" / "rewards.json").unlink()
    edited = json.loads((tmp_path / "run" / "data.json").read_text())
    edited[source]["fingerprint"] = "0" * 32
    (tmp_path / "run" / "data.json").write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="comparisons.jsonl: .* before, .* now; take a new --workdir"):
        main.run(_config(world), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evaluate_reward.best_of": (1,)}, "best_of must be a tuple of integers of at least 2"),
        ({"evaluate_reward.row_length": 97}, "config.evaluate_reward.row_length must be at most the model's context"),
        ({"evaluate_reward.comparisons": ()}, "comparisons must name at least one source"),
        ({"models.ours.init_from": ""}, "config.models.ours.init_from must be a workdir or a Hugging Face classifier"),
        ({"data.valid_fraction": 0.0}, "config.data.valid_fraction must be above 0"),
    ],
)
def test_bad_input_is_one_clear_error(world, tmp_path, one_device, changes, message):
    with pytest.raises(ValueError, match=message):
        main.run(_config(world, **changes), str(tmp_path / "run"))


def test_a_language_model_is_no_reward_model(world, tmp_path, one_device):
    shape = {**tiny_supervised.MODEL, "residual_dropout": 0.0}
    network = models.SIZES["tiny"].replace(**shape)
    tokenizer = tokenizers.load(world / "bpe")
    hf.save(tmp_path / "lm", network, models.init(network, jax.random.key(0)), tokenizer.pretrained(pad=False))
    with pytest.raises(ValueError, match="config.models.ours must be a reward model, got a language model"):
        main.run(_config(world, **{"models.ours.init_from": str(tmp_path / "lm")}), str(tmp_path / "run"))
