"""config.json of public checkpoints (hf_configs/, with sources): each is read as transformers reads it, or refused."""

import json
import pathlib

import pytest
import transformers
from hf_checkpoints import count_params

from instructgpt_jax.models import hf

FILES = {file.stem: file for file in sorted((pathlib.Path(__file__).parent / "hf_configs").glob("*.json"))}
REFUSED = {
    "biomedlm": "scale_attn_by_inverse_layer_idx must be False, the only value that is computed here, got True",
    "distilgpt2-of-2019": "model_type must be one of .*got None",
    "gpt-j-as-gpt-neo-flat": r"attention_types must be \[\[\[kind, …\], times\], …\], got",
    "qwen3-30b-a3b": "model_type must be one of .*got 'qwen3_moe'",
}
TOLD = {  # keys that no class of transformers knows, in the one line of the log
    "gpt2-xl": ["output_past"],
    "gpt-j-as-gpt-neo": ["jax", "rotary", "rotary_dim"],
    "gpt-j-6b": [],
    "smollm2-135m": ["is_llama_config"],
    "smollm2-135m-instruct": ["unk_token_id"],
}


def place(name, directory):
    (directory / "config.json").write_text(FILES[name].read_text())
    return directory


def test_there_are_twenty():
    read = set(FILES) - set(REFUSED)
    assert len(read) >= 20 and set(REFUSED) | set(TOLD) <= set(FILES)
    sources = (FILES["gpt2"].parent / "SOURCES.md").read_text()
    assert all(name in sources.replace(",", " ").split() for name in FILES)
    versions = {json.loads(file.read_text()).get("transformers_version", "2")[0] for file in FILES.values()}
    assert versions >= {"4", "5"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_for_a_named_reason(name, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        hf.read_config(place(name, tmp_path))
    assert str(tmp_path / "config.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(FILES) - set(REFUSED)))
def test_read_as_transformers_reads_it(name, caplog, tmp_path):
    with caplog.at_level("WARNING", "absl"):
        ours = hf.read_config(place(name, tmp_path))
    told = [line.split("ignored ")[1].split(", which")[0].split(", ") for line in caplog.messages]
    assert told == ([TOLD[name]] if TOLD.get(name) else [])

    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.vocab_size == theirs.vocab_size
    assert (ours.num_layers, ours.width) == (theirs.num_hidden_layers, theirs.hidden_size)
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == getattr(theirs, "num_key_value_heads", ours.num_heads)
    assert ours.head_width == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    width = next(getattr(theirs, key) for key in ("ffn_dim", "n_inner", "intermediate_size") if hasattr(theirs, key))
    assert ours.mlp_width == (width or 4 * theirs.hidden_size)
    keys = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    assert ours.norm_eps == next((getattr(theirs, key) for key in keys if hasattr(theirs, key)), 1e-5)
    # The class takes a tied head for Qwen2.5 and others where config.json says nothing.
    assert ours.tied_embeddings == theirs.tie_word_embeddings

    rope = getattr(theirs, "rope_parameters", None) or {"rope_theta": 10_000.0}
    assert ours.local_rotary_theta == rope.get("sliding_attention", {}).get("rope_theta")
    rope = rope.get("full_attention", rope)
    assert ours.rotary_theta == rope["rope_theta"]
    scaling = dict(ours.rotary_scaling)
    assert scaling.get("kind", "default") == rope.get("rope_type", "default")
    assert scaling.get("factor") == rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    assert scaling.get("original_max_position") == original
    factor = rope["factor"] if scaling.get("kind") == "yarn" else 0
    assert ours.max_length == max(theirs.max_position_embeddings, int(factor * (original or 0)))

    kinds = getattr(theirs, "layer_types", None) or getattr(theirs, "attention_layers", None)
    window = getattr(theirs, "sliding_window", None) or getattr(theirs, "window_size", 0)
    dense = ("full_attention", "global")
    expected = [0 if kind in dense else window for kind in kinds] if kinds else [window] * ours.num_layers
    assert ours.layer_windows == tuple(expected)
    assert hf.family_of(ours).model_type in (theirs.model_type, "llama")  # which Mistral without windows is as well


@pytest.mark.parametrize(
    "name", ["gpt2-xl", "gpt-neo-tinystories-8m", "gpt-j-6b", "pythia-6.9b-deduped", "opt-350m", "llama-3.2-3b"]
    + ["smollm2-135m-instruct", "mistral-nemo-base", "qwen2.5-coder-32b-instruct-yarn", "qwen3-4b-2507"]
    + ["gemma-3-1b-it"]
)  # fmt: skip
def test_as_many_parameters_as_transformers_makes(name, tmp_path):
    torch = pytest.importorskip("torch")
    ours = hf.read_config(place(name, tmp_path))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert count_params(ours) == sum(parameter.numel() for parameter in model.parameters())
