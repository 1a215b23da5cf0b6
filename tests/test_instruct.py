"""The recipe for a base of one's own, `:tiny`, on real public records; skips where there are none."""

import gzip
import itertools
import json

import jax
import pytest

from configs import instruct
from instructgpt_jax import main, models
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.models import hf


@pytest.fixture(scope="module")
def sources(shared_data, tmp_path_factory):
    """A few hundred records of each kind, as source strings."""
    folder = tmp_path_factory.mktemp("records")

    def cut(file, count):
        with gzip.open(shared_data / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            chosen = list(itertools.islice(lines, count))
        path = folder / f"{file.rpartition('/')[2]}.jsonl"
        path.write_text("".join(chosen), encoding="utf-8")
        return f"jsonl:{path}"

    return {
        "demonstrations": (cut("demonstrations/dolly", 150), cut("demonstrations/oasst", 50)),
        "comparisons": (cut("comparisons/hh_rlhf_helpful-base", 150), cut("comparisons/oasst_kwise", 200)),
        "prompts": (cut("prompts/prompts", 300),),
        "text": (cut("pretrain/c4_en_sample", 100),),
    }


def test_recipe_runs_from_a_base_to_two_exports_on_pairs_and_rankings(sources, tmp_path, one_device):
    config = instruct.get_config("tiny")
    config.update(sources)
    main.run(config, str(tmp_path))

    results = json.loads((tmp_path / "rewards" / "rewards.json").read_text())
    assert set(results) == {*sources["comparisons"], "all"}
    for source in sources["comparisons"]:
        assert set(results[source]) == {"reward", "judge", "longer", "bag_of_words"}
    kwise = results[sources["comparisons"][1]]["reward"]
    assert {"2", "3"} <= set(kwise["by_k"]) and results["all"]["judge"]["pairs"] > kwise["pairs"]

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["models"]) == {"base", "sft", "rlhf_init", "ppo", "ppo_ptx"}
    for part in ("results", "language", "overoptimisation", "curves"):
        assert report[part], part

    # What was left out is counted, and every stage held the same prompts out.
    read = json.loads((tmp_path / "reward" / "data.json").read_text())["comparisons"]
    assert read["left_out"]["too long for row_length and microbatch_rows"] > 0 and read["validation"] > 0
    for name, head in (("export", "lm"), ("export_reward", "scalar")):
        network, params = hf.load(tmp_path / name)
        assert network.head == head and models.SIZES["tiny"].width == network.width
        assert params


def test_recipe_names_what_it_lacks(sources, tmp_path, one_device):
    config = instruct.get_config("cpu")
    config.base = str(tmp_path / "base")
    with pytest.raises(ValueError, match=r"config.\w+ must be set, for example --config.\w+=jsonl:\w+.jsonl, got \(\)"):
        main.run(config, str(tmp_path / "run"))
    config.update(sources)
    with pytest.raises(ValueError, match="stage sft of the pipeline: config.models.model.init_from must exist"):
        main.run(config, str(tmp_path / "run"))
    config.base = ""
    with pytest.raises(ValueError, match="config.base must be set, for example --config.base=BASE, got ''"):
        main.run(config, str(tmp_path / "run"))

    tokenizer = tokenizers.train((f"words of {n}" for n in range(200)), 300, tmp_path / "bpe")
    network = models.SIZES["tiny"].replace(vocab_size=300, max_length=512)
    hf.save(tmp_path / "base", network, models.init(network, jax.random.key(0)), tokenizer.pretrained(pad=False))
    config.base = str(tmp_path / "base")
    with pytest.raises(ValueError, match="config.data.template='chat' needs a tokenizer with a template of its own"):
        main.run(config, str(tmp_path / "run"))
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="stage sft of the pipeline: config.data.tokenizer must be set, .* has none"):
        main.run(config, str(tmp_path / "other"))


def test_on_one_chip_every_network_that_trains_is_an_adapter():
    config = instruct.get_config("one_chip")
    for name, stage in config.stages.items():
        trained = {"sft": ("model",), "reward": ("model",), "ppo": ("policy", "value")}.get(stage.stage, ())
        adapted = tuple(key for key, entry in stage.models.items() if entry.adapter.targets)
        assert adapted == tuple(key for key in stage.models if key in trained), name
    assert config.stages.ppo.ppo.policy_optimizer.lr == pytest.approx(5e-5)
