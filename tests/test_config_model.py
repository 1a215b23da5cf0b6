"""Named sizes against published parameter counts, and what a configuration refuses."""

import dataclasses
import re

import jax.numpy as jnp
import pytest
from hf_checkpoints import count_params

from instructgpt_jax import workdir
from instructgpt_jax.models import SIZES, Adapter, ModelConfig
from instructgpt_jax.models import config as config_module
from instructgpt_jax.training import supervised

SMALL = ModelConfig(vocab_size=50, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32)


@pytest.mark.parametrize("name", SIZES)
def test_table_of_sizes(name):
    """The table in the source and init agree."""
    text = open(config_module.__file__).read()
    row = re.search(rf"^#   {re.escape(name)} +([\d,]+) +([\d,]+) +([\d,]+) +([\d,]+)", text, re.M)
    numbers = [int(number.replace(",", "")) for number in row.groups()]
    config = SIZES[name]
    assert numbers == [config.num_layers, config.width, config.num_heads, count_params(config)]


def test_a_run_from_before_a_field_of_the_architecture_goes_on():
    prefix = "models.*.architecture."
    later = {key.removeprefix(prefix): value for key, value in workdir.LATER.items() if key.startswith(prefix)}
    assert later == {name: getattr(SMALL, name) for name in later} and "norm_offset" in later

    def run(architecture):
        return {"stage": "sft", "models": {"policy": {"architecture": architecture}}}

    now = dataclasses.asdict(SMALL)
    before = {name: value for name, value in now.items() if name not in later}
    assert workdir.compare(run(before), run(now)) == []
    (line,) = workdir.compare(run(before), run(now | {"norm_offset": 1.0}))
    assert "models.policy.architecture.norm_offset: 0.0 in the workdir, 1.0 asked for" in line
    adapted = dataclasses.asdict(SMALL.replace(adapter=Adapter(2, 4.0, ("up",))))
    old = {name: value for name, value in adapted["adapter"].items() if name != "base"}
    assert workdir.compare(run(before | {"adapter": old}), run(adapted)) == []
    changed = run(adapted | {"adapter": adapted["adapter"] | {"base": "nf4"}})
    assert "architecture.adapter.base: '' in the workdir, 'nf4' asked for" in workdir.compare(run(adapted), changed)[0]


def test_published_counts():
    """Hugging Face's GPT-2 has 124,439,808 parameters; Brown et al. 2020, table 2.1, prints the others rounded."""
    gpt2 = SIZES["gpt3-125m"].replace(max_length=1_024)
    assert count_params(gpt2) == 124_439_808
    published = {"125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9, "13b": 13e9}
    for name, number in (published | {"175b": 175e9}).items():
        assert count_params(SIZES[f"gpt3-{name}"]) == pytest.approx(number, rel=0.02), name


def test_work_of_packed_rows():
    """Every real token sees itself and what stands before it in its sequence; padding is free."""
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    found = supervised.work(SMALL, segments, positions, passes=3)
    assert found["tokens"] == 6
    assert found["flops"] == 3 * sum(SMALL.flops_per_token(keys) for keys in (1, 2, 3, 1, 2, 1))


def test_flops_per_token():
    """By hand: 2 a weight of every product, 4 · N · H a key, and the unembedding."""
    block = 4 * 16 * 16 + 2 * 16 * 24
    assert SMALL.flops_per_token() == 2 * (2 * block + 16 * 50)
    assert SMALL.flops_per_token(10) - SMALL.flops_per_token() == 2 * 4 * 16 * 10
    assert SMALL.replace(head="scalar").flops_per_token() == 2 * (2 * block + 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "swish"}, "activation must be one of .*'swish'"),
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"num_heads": 3}, "width must be a multiple of num_heads, got 16 and 3"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"positions": "rotary", "rotary_width": 3}, "rotary_width must be even and at most head_width=4, got 3"),
        ({"positions": "rotary", "rotary_width": 6}, "rotary_width must be even"),
        ({"windows": ()}, "windows must be"),
        ({"windows": (4, -1)}, "windows must be"),
        ({"residual_dropout": 1.0}, "residual_dropout must be at least 0 and below 1, got 1.0"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"heads": 3}, r"fields of a model must be among .*, got \['heads'\]"),
    ],
    ids=str,
)
def test_bad_configurations(changes, words):
    with pytest.raises(ValueError, match=words):
        SMALL.replace(**changes)


def test_replace_keeps_what_follows_from_other_fields():
    wider = SMALL.replace(width=32, num_heads=2)
    assert (wider.head_width, wider.num_kv_heads, wider.rotary_width, wider.embedding_width) == (16, 2, 16, 32)
    grouped = SMALL.replace(num_kv_heads=1, head_width=6)
    assert (grouped.rotary_width, grouped.num_kv_heads, grouped.head_width) == (6, 1, 6)
    assert grouped.replace(width=32).num_kv_heads == 1 and grouped.replace(width=32).head_width == 6
    assert hash(SMALL.replace(windows=[0, 4])) == hash(SMALL.replace(windows=(0, 4)))


def test_windows_repeat_over_layers():
    assert SMALL.replace(num_layers=5, windows=(0, 8)).layer_windows == (0, 8, 0, 8, 0)
