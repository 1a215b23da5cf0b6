"""Adapters in PEFT's format, in both directions, and against torch's peft where there is one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_supervised
from reference_model import random_params

from configs import common
from instructgpt_jax import main, models
from instructgpt_jax.models import Adapter, adapters, hf
from instructgpt_jax.models.hf import peft as ours
from instructgpt_jax.models.hf import storage

pytestmark = pytest.mark.usefixtures("one_device")
TOKENS = np.array([[3, 17, 8, 25, 1, 30, 12, 5]], np.int32)
GPT2 = models.ModelConfig(vocab_size=40, num_layers=2, width=16, num_heads=4, mlp_width=32, max_length=16)
LLAMA = GPT2.replace(
    norm="rmsnorm", gated_mlp=True, activation="silu", positions="rotary", qkv_bias=False, out_bias=False,
    mlp_bias=False, num_kv_heads=2, tied_embeddings=False,
)  # fmt: skip
NEOX = GPT2.replace(positions="rotary", residual="parallel", activation="gelu", tied_embeddings=False, rotary_width=2)
CASES = {
    "gpt2": (GPT2, ("query", "value", "out", "up", "down")),  # queries and values in one matrix of the file
    "llama": (LLAMA, ("query", "key", "value", "out", "up", "gate", "down")),
    "gpt_neox": (NEOX, ("query", "key", "down")),  # heads of both, side by side
    "reward": (LLAMA.replace(head="scalar"), ("query", "gate")),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """The base and an adapter on it as files, with the network and its joined parameters."""
    net, targets = CASES[request.param]
    folder, net = tmp_path_factory.mktemp(request.param), net.replace(adapter=Adapter(3, 4.0, targets))
    language = net.replace(adapter=None, head="lm")
    base = random_params(language, models.init)
    hf.save(folder / "base", language, base)
    if net.head == "scalar":
        base = models.with_scalar_head(language, base, jax.random.key(1))[1]
    trained = adapters.trained_part(net, base, jax.random.key(2))
    rng = np.random.default_rng(4)
    trained = jax.tree.map(lambda x: np.float32(x + 0.2 * rng.standard_normal(x.shape)), trained)
    hf.save_adapter(folder / "adapter", str(folder / "base"), net, trained)
    return folder, net, adapters.join(net, base, trained)


def outputs(net, params):
    if net.head == "lm":
        return models.logits(net, params, TOKENS)
    positions = jnp.arange(TOKENS.shape[1])[None]
    return models.scalar(net, params, models.hidden(net, params, TOKENS, positions, None))


def test_a_directory_of_peft_is_read_as_the_merged_network(exported):
    folder, net, joined = exported
    plain = net.replace(adapter=None)
    assert hf.read_config(folder / "adapter") == plain
    config, params = hf.load(folder / "adapter")
    assert config == plain
    wanted, got = outputs(net, joined), outputs(plain, params)
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    if net.head == "lm":
        assert np.abs(wanted - outputs(*hf.load(folder / "base"))).max() > 0.1


def test_peft_loads_what_we_write_and_we_what_it_writes(exported, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    folder, net, joined = exported
    scalar = net.head == "scalar"
    kind = transformers.AutoModelForSequenceClassification if scalar else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(folder / "base", **{"num_labels": 1, "pad_token_id": 0} if scalar else {})
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    got = model(torch.tensor(TOKENS).long()).logits.detach().numpy()
    wanted = np.asarray(outputs(net, joined))
    if scalar:
        wanted, got = wanted[:, -1] - float(joined["scalar_head"]["bias"]), got[:, 0]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    with torch.no_grad():  # another adapter, by peft's own hand
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    again = model(torch.tensor(TOKENS).long()).logits.detach().numpy()
    assert np.abs(again[:, 0] - got).max() > 1e-3 if scalar else np.abs(again - got).max() > 1e-2
    config, params = hf.load(tmp_path)
    read = np.asarray(outputs(config, params))
    np.testing.assert_allclose(read[:, -1] if scalar else read, again[:, 0] if scalar else again, atol=1e-4)


def test_the_merged_export_is_the_network(exported, tmp_path):
    folder, net, joined = exported
    plain = net.replace(adapter=None)
    hf.save(tmp_path / "merged", plain, adapters.merged(joined))
    config, params = hf.load(tmp_path / "merged")
    np.testing.assert_allclose(outputs(config, params), outputs(net, joined), atol=1e-5)


def test_the_stage_exports_both_and_trains_on_from_either(tmp_path):
    """SFT with an adapter, exported in both formats: the reward stage starts from the same network."""
    world = tiny_supervised.make_world(tmp_path / "world")
    tiny_supervised.make_base(world)
    run = tiny_supervised.on_adapter(tiny_supervised.config("sft", world, **{"sft.num_steps": 2}), world)
    main.run(run, str(tmp_path / "sft"))
    for name in ("merged", "peft"):
        export = common.config("export")
        export.models.model = common.network(init_from=str(tmp_path / "sft"))
        export.export = common.export() | {"format": name}
        export.mesh = dict(data=1, fsdp=1, tensor=1)
        main.run(export, str(tmp_path / name))
        main.run(export, str(tmp_path / name))  # again, in its place
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(world / "base") and raw["r"] == 4 and raw["lora_dropout"] == 0.1
    assert (tmp_path / "peft" / "tokenizer.json").exists() and not (tmp_path / "peft" / "model.safetensors").exists()
    merged, added = (hf.load(tmp_path / name) for name in ("merged", "peft"))
    assert merged[0] == added[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged[1], added[1])
    on = tiny_supervised.config("reward", world, **{"reward.num_steps": 1, "data.tokenizer": ""})
    on.models.model = common.network(init_from=str(tmp_path / "peft"))
    main.run(on, str(tmp_path / "reward"))
    export.models.model.init_from = str(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"init_from must be of a run that trained an adapter, .*, got .*reward"):
        main.run(export, str(tmp_path / "none"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(peft_type="IA3"), r"adapter_config.json: peft_type must be 'LORA', got 'IA3'"),
        (dict(use_dora=True), r"use_dora must be False, got True"),
        (dict(bias="all"), r"bias must be 'none', got 'all'"),
        *(
            (
                dict(init_lora_weights=name),
                rf"init_lora_weights must be one of .*, got '{name}', which changes the base",
            )
            for name in ("pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga")
        ),
        (dict(layer_replication=[[0, 2], [1, 2]]), r"layer_replication must be None, got \[\[0, 2\], \[1, 2\]\]"),
        (dict(kasa_config={"r": 2}), r"kasa_config must be None, got"),
        (dict(revision="a1b2"), r"adapter_config.json: revision must be None, got 'a1b2'"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save must be \['score'\] or none"),
        (dict(base_model_name_or_path=""), r"base_model_name_or_path must name the base"),
        (dict(base_model_name_or_path="no/where/at/all"), r"base_model_name_or_path: 'no/where/at/all' must be a dir"),
        (dict(lora_alpha="4"), r"lora_alpha must be a number, got '4'"),
        (dict(task_type="SEQ_2_SEQ_LM"), r"task_type must be one of"),
    ],
)
def test_what_is_not_computed_is_named(changes, message, tmp_path):
    hf.save(tmp_path / "base", GPT2, models.init(GPT2, jax.random.key(0)))
    net = GPT2.replace(adapter=Adapter(2, 2.0, ("up",)))
    hf.save_adapter(tmp_path / "adapter", str(tmp_path / "base"), net, adapters.init(net, jax.random.key(0)))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        hf.load(tmp_path / "adapter")


@pytest.mark.parametrize("init", [*ours.INITS, "pissa", "olora"])
def test_only_some_beginnings_of_peft_leave_the_base_as_it_is(init, tmp_path):
    """By peft's own hand: those that we read do not change a weight, and others do."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = base[0].weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    after = peft.get_peft_model(base, config).base_model.model[0].base_layer.weight
    assert torch.equal(before, after) == (init in ours.INITS)


def test_files_that_do_not_fit_their_base_are_named(tmp_path):
    net = GPT2.replace(adapter=Adapter(2, 2.0, ("up",)))
    other = GPT2.replace(norm_eps=1e-3)
    for folder, config in (("base", GPT2), ("other", other)):
        hf.save(tmp_path / folder, config, models.init(config, jax.random.key(0)))
    hf.save_adapter(tmp_path / "adapter", str(tmp_path / "base"), net, adapters.init(net, jax.random.key(0)))
    file, weights = tmp_path / "adapter" / "adapter_config.json", tmp_path / "adapter" / "adapter_model.safetensors"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match=r"made for another base than .*other"):
        hf.load(tmp_path / "adapter")
    file.write_text(json.dumps(told))
    kept = safetensors.numpy.load_file(weights)
    key = next(iter(kept))

    def with_tensors(tensors):
        safetensors.numpy.save_file(tensors, weights)
        return pytest.raises(ValueError)

    with with_tensors({key: kept[key]}) as error:
        hf.load(tmp_path / "adapter")
    assert "with a lora_A and a lora_B, got ['A'] and that tensor" in str(error.value)
    with with_tensors({name: x[..., :-1] for name, x in kept.items()}) as error:
        hf.load(tmp_path / "adapter")
    assert "must fit (16, 32), got A (2, 15) and B (32, 1)" in str(error.value)
    with with_tensors(kept | {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}) as error:
        hf.load(tmp_path / "adapter")
    assert "is no part of a LoRA adapter of a gpt2" in str(error.value)
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors or adapter_model.bin"):
        hf.load(tmp_path / "adapter")
    assert ours.read(tmp_path / "base") is None and storage.find(tmp_path / "adapter", True) == tmp_path / "adapter"
