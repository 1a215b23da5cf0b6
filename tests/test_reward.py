"""The reward model: packed forms against one sequence at a time, report and bias by hand, and what is refused."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_supervised
from jax.sharding import NamedSharding, PartitionSpec

from configs import common
from instructgpt_jax import main, models, networks, reward, sharding
from instructgpt_jax import workdir as workdirs
from instructgpt_jax.data import datasets, packing, sources, tokenizer
from instructgpt_jax.evaluation import earlier, rewards
from instructgpt_jax.stages import reward as reward_stage
from instructgpt_jax.stages import reward_folds, reward_start
from instructgpt_jax.stages import sft as sft_stage
from instructgpt_jax.training import checkpoint, loop, supervised
from instructgpt_jax.training.state import create

K = 5
CONFIG = models.SIZES["tiny"].replace(vocab_size=50, width=32, num_heads=2, mlp_width=64, max_length=128, head="scalar")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_supervised.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run of two updates: its config, its stage, its final state and its workdir."""
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_supervised.config("reward", world, **{"reward.num_steps": 2, "eval_every": 0})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = reward_stage.build(config, mesh)
        return config, stage, loop.run(stage, config, workdir), workdir


def build(config, head, mesh):
    vocabulary = tokenizer.load(config.data.tokenizer)
    return networks.build("config.models.model", config.models.model, head, mesh, vocabulary, 0)


# ------------------------------------------------------------------------------------- the forms of a batch, all equal


def make_comparisons():
    """Seven comparisons of 2 to 5 completions with ties, numbered by their group."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(7):
        completions = [rng.integers(1, 50, rng.integers(1, 14)) for _ in range(rng.integers(2, K + 1))]
        ranks = rng.integers(1, 4, len(completions))
        ranks[:2] = 1, 2  # at least one untied pair
        found.append(packing.Comparison(rng.integers(1, 50, rng.integers(3, 12)), completions, ranks, number))
    return found


def pack(comparisons, row_length, rows, shared_prompt):
    microbatches = packing.num_comparison_microbatches(len(comparisons), rows, K)
    slots = -(-len(comparisons) // rows) * rows
    return packing.pack_comparisons(comparisons, row_length, microbatches, rows, slots, K, shared_prompt, first_row=0)


def reference(config, params, comparisons):
    """The loss with one completion a row, alone, and pairs in a Python loop; and the scores of each comparison.

    Rows are padded behind, where a causal model does not look: no segments, branches or packing.
    """
    sequences = [np.concatenate([c.prompt, completion]) for c in comparisons for completion in c.completions]
    longest = max(map(len, sequences))
    tokens = np.stack([np.pad(s, (0, longest - len(s))) for s in sequences])
    hidden = models.hidden(config, params, tokens, np.broadcast_to(np.arange(longest), tokens.shape), None)
    last = hidden[np.arange(len(sequences)), [len(s) - 1 for s in sequences]]
    flat = last @ params["scalar_head"]["kernel"] + params["scalar_head"]["bias"]
    total, start, scores = 0.0, 0, []
    for comparison in comparisons:
        k = len(comparison.completions)
        row, start = flat[start : start + k], start + k
        pairs = [(i, j) for i in range(k) for j in range(k) if comparison.ranks[i] < comparison.ranks[j]]
        total += sum(-jnp.log(jax.nn.sigmoid(row[i] - row[j])) for i, j in pairs) / len(pairs)
        scores.append(row)
    return total / len(comparisons), scores


def make_params(positions):
    params = models.init(CONFIG.replace(positions=positions), jax.random.key(1))
    params["scalar_head"]["bias"] = jnp.float32(0.3)
    return params


@functools.cache
def expected(positions):
    """The reference's loss, scores and gradient."""
    config = CONFIG.replace(positions=positions)
    function = jax.value_and_grad(lambda params: reference(config, params, make_comparisons()), has_aux=True)
    return jax.jit(function, compiler_options=tiny_supervised.QUICK)(make_params(positions))


@pytest.mark.parametrize(
    "row_length, rows, shared_prompt, positions, backend",
    [
        (96, 16, True, "learned", "xla"),  # several comparisons a row, one microbatch
        (64, 5, True, "learned", "xla"),  # several microbatches, the last ones empty
        (26, 8, True, "learned", "xla"),  # comparisons longer than a row are split and repeat their prompt
        (64, 8, False, "learned", "xla"),  # a prompt for each completion
        (64, 8, True, "rotary", "xla"),
        (128, 8, True, "rotary", "splash"),
    ],
)
def test_packed_comparisons_equal_one_sequence_a_row(row_length, rows, shared_prompt, positions, backend):
    comparisons, params = make_comparisons(), make_params(positions)
    config = CONFIG.replace(positions=positions, attention=backend)
    batch = pack(comparisons, row_length, rows, shared_prompt)
    if row_length == 26:
        assert max(len(c.prompt) + sum(map(len, c.completions)) for c in comparisons) > row_length
    state = create(params, optax.sgd(1.0), with_ema=False)

    def loss(params, microbatch, key):
        return reward.comparison_loss(config, params, microbatch, None)

    @functools.partial(jax.jit, compiler_options=tiny_supervised.QUICK)
    def packed(state, batch):
        after, sums = supervised.update(state, {}, batch, loss=loss, count="prompts", tx=optax.sgd(1.0), seed=0)
        gradient = jax.tree.map(jnp.subtract, state.params, after.params)
        return sums, gradient, reward.batch_scores(config, state.params, batch)

    sums, gradient, (scores, ranks, groups) = packed(state, batch)
    (want_loss, want_scores), want_gradient = expected(positions)
    assert float(sums["prompts"]) == len(comparisons)
    np.testing.assert_allclose(sums["sum"] / sums["prompts"], want_loss, rtol=3e-6)
    used = np.argwhere(np.asarray(ranks).any(axis=-1))
    assert len(used) == len(comparisons)
    for m, slot in used:
        want = want_scores[int(groups[m, slot])]
        np.testing.assert_allclose(scores[m, slot, : len(want)], want, atol=3e-6)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_gradient), jax.tree.leaves(gradient), strict=True
    ):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=1e-6 + 2e-5 * scale, err_msg=jax.tree_util.keystr(path))


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=tiny_supervised.QUICK)
def loss_of_rows(config, params, batch, with_dropout, key):
    """Of the first microbatch, with its sums; and the scores of all."""
    rows = jax.tree.map(lambda x: x[0], batch)
    loss = reward.comparison_loss(config, params, rows, key if with_dropout else None)
    return loss, reward.batch_scores(config, params, batch)[0]


def test_dropout_is_of_the_loss_alone():
    """Each key draws its masks; comparisons are scored without any."""
    config, params = CONFIG.replace(residual_dropout=0.5), make_params("learned")
    batch = pack(make_comparisons(), 96, 16, True)
    (plain, _), scores = loss_of_rows(CONFIG, params, batch, False, jax.random.key(0))
    found = [loss_of_rows(config, params, batch, True, jax.random.key(n)) for n in (1, 1, 2)]
    first, again, other = (float(loss) for (loss, _), _ in found)
    assert first == again and len({first, other, float(plain)}) == 3
    np.testing.assert_allclose(found[0][1], scores, atol=3e-6)


def test_flops_of_comparisons():
    """Forward and backward, token by token: a prompt counts once, and a completion sees it and itself."""
    comparisons = make_comparisons()
    (_, sums), _ = loss_of_rows(
        CONFIG, make_params("learned"), pack(comparisons, 96, 16, True), False, jax.random.key(0)
    )
    seen = [keys for c in comparisons for keys in range(1, len(c.prompt) + 1)]
    for c in comparisons:
        seen += [len(c.prompt) + keys for completion in c.completions for keys in range(1, len(completion) + 1)]
    assert sums["tokens"] == len(seen)
    np.testing.assert_allclose(sums["flops"], 3 * sum(map(CONFIG.flops_per_token, seen)), rtol=1e-6)


def test_sum_of_scores_reads_every_sequence_at_its_end():
    """Up to the last column of a row, in two microbatches with an empty one behind them."""
    layout = [[[8], [3, 5]], [[2, 4], []], [[], []]]  # lengths by microbatch and row
    rng, params = np.random.default_rng(0), make_params("learned")
    batch = {name: np.zeros((3, 2, 8), np.int32) for name in ("tokens", "positions", "segments")}
    alone = []
    for m, b in np.ndindex(3, 2):
        column = 0
        for segment, length in enumerate(layout[m][b], 1):
            here = m, b, slice(column, column + length)
            batch["tokens"][here] = sequence = rng.integers(1, 50, length)
            batch["positions"][here], batch["segments"][here] = np.arange(length), segment
            alone.append(np.pad(sequence, (0, 8 - length)))
            column += length
    hidden = models.hidden(CONFIG, params, np.stack(alone), np.broadcast_to(np.arange(8), (len(alone), 8)), None)
    ends = [length - 1 for rows in layout for lengths in rows for length in lengths]
    want = models.scalar(CONFIG, params, hidden)[np.arange(len(alone)), np.array(ends)]
    total, count = jax.jit(functools.partial(reward.sum_of_scores, CONFIG))(params, batch)
    assert count == len(alone) == 5
    np.testing.assert_allclose(total, want.sum(), rtol=1e-5)


def test_score_refuses_shapes_that_do_not_fit():
    prompts, lengths, responses = np.ones((2, 3), np.int32), np.array([3, 2]), np.ones((2, 4), np.int32)
    for wrong in ((lengths, np.ones((2, 1), bool)), (lengths[:1], np.ones((2, 4), bool))):
        with pytest.raises(AssertionError):
            reward.score(CONFIG, make_params("learned"), prompts, wrong[0], responses, wrong[1], 8, 2)


def test_the_end_of_text_starts_with_the_embedding_of_another_token(world, trained):
    found = {}
    for text in ("", "."):
        config = tiny_supervised.config("reward", world, **{"reward.num_steps": 2})
        config.reward.eos_init = text
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        with jax.set_mesh(mesh):
            found[text] = np.asarray(reward_stage.build(config, mesh).init().params["embed"]["tokens"])
    vocabulary = tokenizer.load(config.data.tokenizer)
    eos, (stop,) = vocabulary.eos_id, vocabulary.encode(["."])[0]
    assert (found["."][eos] == found[""][stop]).all() and (found[""][eos] != found[""][stop]).any()
    assert (np.delete(found["."], eos, 0) == np.delete(found[""], eos, 0)).all()
    _, _, state, workdir = trained
    config.models.model = tiny_supervised.common.network(init_from=str(workdir))
    with jax.set_mesh(mesh):  # a reward model keeps what it has learned
        params = reward_stage.build(config, mesh).init().params
    np.testing.assert_array_equal(params["embed"]["tokens"], state.params["embed"]["tokens"])
    config.reward.eos_init = "The end."
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"eos_init must be one token of .*'The end.': \d tokens"):
        reward_stage.build(config, mesh)


def test_the_head_starts_as_a_logistic_regression():
    """Against Newton's method on pair differences in float64, with states read one sequence at a time."""
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    comparisons, config, params = make_comparisons(), CONFIG, make_params("learned")
    batch = pack(comparisons, 64, 5, True)
    with jax.set_mesh(mesh):
        states, ranks = jax.jit(functools.partial(reward_start.end_states, config))(params, batch)
    used = np.asarray(ranks).any(axis=-1)
    states, ranks = np.asarray(states)[used], np.asarray(ranks)[used]
    numbers = np.asarray(batch["groups"])[used]

    pairs, weights = [], []  # better less worse, and the share of the mean
    for comparison in comparisons:
        row = states[list(numbers).index(comparison.group)]
        for k, completion in enumerate(comparison.completions):
            tokens = np.concatenate([comparison.prompt, completion])[None]
            hidden = models.hidden(config, params, tokens, np.arange(tokens.size)[None], None)
            np.testing.assert_allclose(row[k], hidden[0, -1], atol=2e-5)
        better = [(i, j) for i, a in enumerate(comparison.ranks) for j, b in enumerate(comparison.ranks) if a < b]
        pairs += [np.float64(row[i]) - row[j] for i, j in better]
        weights += [1 / len(better) / len(comparisons)] * len(better)
    x, share, w = np.array(pairs), np.array(weights), np.zeros(config.width)
    for _ in range(30):
        wrong = 1 / (1 + np.exp(x @ w))
        gradient = 0.1 * w - x.T @ (share * wrong)
        hessian = 0.1 * np.eye(len(w)) + (x.T * (share * wrong * (1 - wrong))) @ x
        w -= np.linalg.solve(hessian, gradient)
    assert np.abs(w).max() > 0.1
    np.testing.assert_allclose(reward_start.fit_head(states, ranks, 0.1), w, atol=2e-3)


def test_noise_does_not_travel_with_a_model(world, tmp_path):
    """An SFT with dropout, then a reward model that sets none: it trains without, and its record says so."""
    settings = tiny_supervised.config("sft", world, **{"sft.num_steps": 1, "eval_every": 0})
    settings.mesh.fsdp = -1
    assert settings.models.model.residual_dropout == 0.1
    main.run(settings, str(tmp_path / "sft"))
    ranking = tiny_supervised.config("reward", world, **{"reward.num_steps": 1, "eval_every": 0})
    ranking.mesh.fsdp = -1
    ranking.models.model = common.network(init_from=str(tmp_path / "sft"))
    main.run(ranking, str(tmp_path / "reward"))
    architecture = json.loads((tmp_path / "reward" / "config.json").read_text())["models"]["model"]["architecture"]
    assert architecture["residual_dropout"] == 0.0
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    ranking.models.model = common.network(init_from=str(tmp_path / "sft"), residual_dropout=0.3)
    assert build(ranking, "scalar", mesh).config.residual_dropout == 0.3


def test_only_a_language_model_gets_another_head(world, trained, tmp_path):
    *_, workdir = trained
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    sft = tiny_supervised.config("sft", world, **{"sft.num_steps": 1, "eval_every": 0})
    starts = {"sft": str(tmp_path / "sft"), "reward": str(workdir), "": ""}
    found = {}
    with jax.set_mesh(mesh):
        loop.run(sft_stage.build(sft, mesh), sft, tmp_path / "sft")
        for examples in (0, 16):
            for name, init_from in starts.items():
                config = tiny_supervised.config("reward", world)
                config.reward.update({"head_examples": examples, "head_l2": 0.05})
                if init_from:
                    config.models.model = tiny_supervised.common.network(init_from=init_from)
                found[name, examples] = jax.device_get(reward_stage.build(config, mesh).init().params)
    same = {n: (found[n, 0]["scalar_head"]["kernel"] == found[n, 16]["scalar_head"]["kernel"]).all() for n in starts}
    assert same == {"sft": False, "reward": True, "": True}
    body = [{k: v for k, v in found["sft", n].items() if k != "scalar_head"} for n in (0, 16)]
    jax.tree.map(np.testing.assert_array_equal, *body)

    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2), jax.devices())
    config = tiny_supervised.config("reward", world)
    config.reward.update({"head_examples": 16, "head_l2": 0.05})
    config.models.model = tiny_supervised.common.network(init_from=starts["sft"])
    with jax.set_mesh(mesh):
        spread = reward_stage.build(config, mesh).init().params["scalar_head"]["kernel"]
    np.testing.assert_allclose(spread, found["sft", 16]["scalar_head"]["kernel"], atol=2e-3)


def test_eight_devices_equal_one(world):
    tiny_supervised.check_meshes(reward_stage.build, tiny_supervised.config("reward", world), "reward/loss")


# --------------------------------------------------------------------------------------------------------- the report


def test_report_by_hand():
    scores = np.array([[2.0, 1.0, 0.0, 9.0], [0.0, 1.0, 1.0, 9.0], [0.5, 0.5, 9.0, 9.0]], np.float32)
    ranks = np.array([[1, 2, 2, 0], [1, 3, 2, 0], [2, 1, 0, 0]])
    # 1: pairs (0,1), (0,2), both right, one tie. 2: (0,1), (0,2) wrong, (2,1) equal scores: wrong. 3: equal: wrong.
    found, curve = rewards.summarise(scores, ranks, np.array([1, 0, -1]), ("ann", "bob"))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    loss = ((softplus(-1) + softplus(-2)) / 2 + (2 * softplus(1) + softplus(0)) / 3 + softplus(0)) / 3
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["pairs"] == 6 and found["prompts"] == 3
    assert found["accuracy"] == pytest.approx(2 / 6)
    assert found["accuracy_k3"] == pytest.approx(2 / 5) and found["accuracy_k2"] == 0.0
    assert found["accuracy_group_bob"] == 1.0 and found["accuracy_group_ann"] == 0.0
    assert sum(line["pairs"] for line in curve) == 12


def test_calibration_by_hand():
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    # Four pairs at 0.75, three of them right; two at 0.95 (0.05 in the other order), both right.
    margins = np.array([logit(0.75)] * 3 + [-logit(0.75)] + [logit(0.95)] * 2)
    expected = [(0.05, 0.0, 2), (0.25, 0.25, 4), (0.75, 0.75, 4), (0.95, 1.0, 2)]
    curve = rewards.calibration(margins)
    for line, (predicted, observed, pairs) in zip(curve, expected, strict=True):
        assert line == pytest.approx({"predicted": predicted, "observed": observed, "pairs": pairs})
    ranks = np.tile([1, 2], (6, 1))
    found, _ = rewards.summarise(np.stack([margins, np.zeros(6)], 1), ranks, np.full(6, -1), ())
    assert found["calibration_error"] == pytest.approx(2 * 0.05 / 6)


def test_report_of_all_slots_empty_but_one():
    scores, ranks = np.full((2, 3, 2), 7.0, np.float32), np.zeros((2, 3, 2), np.int32)
    ranks[1, 2], scores[1, 2] = (2, 1), (0.0, 1.0)
    found, _ = rewards.summarise(*rewards.collect([(scores, ranks, np.full((2, 3), -1))]), ())
    assert found["accuracy"] == 1.0 and found["pairs"] == 1


def test_bias_centres_demonstrations_and_is_logged(trained):
    config, stage, state, workdir = trained
    bias = float(state.params["scalar_head"]["bias"])
    assert bias != 0.0
    # The same demonstrations, as any texts are scored.
    tok = tokenizer.load(config.data.tokenizer)
    records = sources.load(tuple(config.data.demonstrations), "demonstrations", 0)
    train, _ = datasets.split(records, config.data.valid_fraction)
    chosen = datasets.draw(train, config.reward.bias_examples, config.seed)
    assert len(chosen) == 20 < len(train)
    prompts, completions = np.zeros((20, 48), np.int32), np.zeros((20, 48), np.int32)
    lengths, mask = np.zeros(20, np.int32), np.zeros((20, 48), bool)
    for i, record in enumerate(chosen):
        prompt, completion = tok.encode([record["prompt"], record["completion"]])
        completion = [*completion, tok.eos_id]
        prompts[i, : len(prompt)], completions[i, : len(completion)] = prompt, completion
        lengths[i], mask[i, : len(completion)] = len(prompt), True
    model = models.ModelConfig(**stage.models["model"]["architecture"])
    with jax.set_mesh(jax.tree.leaves(state.params)[0].sharding.mesh):
        scores = reward.score(model, state.params, prompts, lengths, completions, mask, 96, 20)
    assert abs(float(scores.mean())) < 2e-6
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["reward/bias"] == pytest.approx(bias)
    for name in ("loss", "accuracy", "accuracy_k2", "accuracy_group_a", "accuracy_group_c"):
        assert math.isfinite(lines[-1][f"reward/valid_{name}"])
    sample = json.loads((workdir / "samples.jsonl").read_text().splitlines()[-1])
    assert sample["split"] == "valid" and sample["calibration"][0]["pairs"] > 0


def test_without_demonstrations_the_bias_stays(world, trained, capsys):
    config = tiny_supervised.config("reward", world, **{"data.demonstrations": ()})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        stage = reward_stage.build(config, mesh)
        _, _, state, _ = trained
        assert stage.finish(state, {}) is state
    output = capsys.readouterr()
    assert "the bias stays as it is" in output.out + output.err


# ----------------------------------------------------------------------------------------------------- groups and folds


def test_held_out_groups_share_nothing_with_training(world):
    config = tiny_supervised.config("reward", world, **{"reward.held_out_groups": ("b",)})
    records = sources.load(tuple(config.data.comparisons), "comparisons", 0)
    train, valid, held = datasets.hold_out(records, *datasets.split(records, 0.2), ("b",))
    groups = [{side[i]["group"] for i in range(len(side))} for side in (train, valid, held)]
    assert groups == [{"a", "c"}, {"a", "c"}, {"b"}] and len(held) == 20
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    data = datasets.load(config, config.reward, "comparisons", mesh)
    assert data.groups == {"valid": ("a", "c"), "held_out": ("b",)}
    assert sum(int((np.asarray(b["groups"]) == 0).sum()) for b in data.valid["held_out"]()) == 20
    with pytest.raises(ValueError, match="held_out_groups must leave these groups comparisons, got .'z'"):
        datasets.hold_out(records, *datasets.split(records, 0.2), ("z",))


def test_a_prompt_that_was_trained_on_is_not_held_out(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"prompt": p, "completions": ["x", "y"], "ranking": [1, 2], "group": g} for p, g in ("pa", "pb", "qb")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = sources.load((f"jsonl:{path}",), "comparisons", 0)
    *_, held = datasets.hold_out(records, *datasets.split(records, 0.0), ("b",))
    assert [held[i]["prompt"] for i in range(len(held))] == ["q"]


def test_folds_hold_out_every_group_once():
    assert reward_folds.deal(["a", "b", "c", "d", "e"], 5) == [(name,) for name in "abcde"]
    assert reward_folds.deal(["a", "b", "c", "d", "e"], 2) == [("a", "c", "e"), ("b", "d")]
    for folds in (1, 4):
        with pytest.raises(ValueError, match="config.reward.folds must be from 2 to the number of labeler groups"):
            reward_folds.deal(["a", "b", "c"], folds)


def test_labelers_are_dealt_into_folds_of_equal_size():
    comparisons = {"ann": 50, "bob": 30, "cat": 30, "dan": 20, "eve": 10, "fay": 10}
    assert reward_folds.deal_evenly(comparisons, 3) == [("ann",), ("bob", "dan"), ("cat", "eve", "fay")]  # 50 each
    assert reward_folds.deal_evenly(dict.fromkeys("abcdef", 7), 3) == [("a", "d"), ("b", "e"), ("c", "f")]
    with pytest.raises(ValueError, match="from 2 to the number of labelers .`labeler` of the comparisons., 2: "):
        reward_folds.deal_evenly({"a": 1, "b": 1}, 3)


def test_folds_of_labelers_train_with_several_seeds(tmp_path, monkeypatch):
    """The training replaced: who is held out of which run, and the mean over the seeds of each fold by hand."""
    people = "aaaabbbccd"  # a has 4 comparisons, b 3, c 2, d 1: two folds of 5
    rows = [
        {"prompt": f"p{n}", "completions": ["x", "y"], "ranking": [1, 2], "group": "training", "labeler": name}
        for n, name in enumerate(people)
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, both = {}, ((0.7, 0.6), (0.8, 0.7), (0.6, 0.6), (0.7, 0.5))
    accuracy = dict(zip(("fold0", "fold0_seed1", "fold1", "fold1_seed1"), both, strict=True))

    def train(config, changes, mesh, folder):
        folder.mkdir()
        asked[folder.name] = changes
        seen, unseen = accuracy[folder.name]
        line = {"step": 1, "reward/valid_accuracy": seen, "reward/held_out_accuracy": unseen}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(reward_folds, "_train", train)
    config = common.config("reward")
    config.reward = common.rankings(1e-3, 8)
    config.reward.update({"folds": 2, "fold_by": "labeler", "fold_seeds": 2})
    config.data.comparisons = (f"jsonl:{path}",)
    config.seed = 5
    report = reward_folds.run(config, None, tmp_path / "folds")
    held_out = {name: (one["reward.held_out_groups"], one["seed"]) for name, one in asked.items()}
    assert held_out == {
        "fold0": (("a", "d"), 5), "fold0_seed1": (("a", "d"), 6), "fold1": (("b", "c"), 5),
        "fold1_seed1": (("b", "c"), 6),
    }  # fmt: skip
    assert all(one["data.comparisons"] == (f"jsonl:{path}#group=labeler",) for one in asked.values())
    assert [row["comparisons"] for row in report["folds"]] == [5, 5, 5, 5]
    assert report["training_groups"]["values"] == pytest.approx([0.75, 0.65])
    assert report["held_out_groups"]["values"] == pytest.approx([0.65, 0.55])
    assert report["difference"]["mean"] == pytest.approx(-0.1) and report["difference"]["standard_error"] < 1e-9
    found = earlier.read("", str(tmp_path / "folds"), "")["folds"]
    assert (found["folds"], found["seeds"]) == (2, 2) and found["training_groups"]["n"] == 2
    half = 12.7062 * 0.05  # Student's for one degree of freedom, times the standard error of 0.75 and 0.65
    assert found["training_groups"]["high"] - found["training_groups"]["mean"] == pytest.approx(half, rel=1e-4)
    with pytest.raises(ValueError, match="config.evaluate.folds must be the workdir of a finished stage with gen"):
        earlier.read("", str(tmp_path), "")

    path.write_text(json.dumps({key: value for key, value in rows[0].items() if key != "labeler"}) + "\n")
    with pytest.raises(ValueError, match="c.jsonl:1: labeler must be there for config.reward.fold_by='labeler'"):
        reward_folds.run(config, None, tmp_path / "none")


def test_folds_train_without_their_groups_and_report_final_accuracies(world, tmp_path, monkeypatch):
    """The training itself replaced: what each fold is asked for, and what becomes of what it logs."""
    asked = {}

    def run(stage, config, workdir, phases):
        asked[workdir.name] = stage.reward.to_dict()
        place = int(workdir.name[-1])
        early, late = (
            {"reward/valid_accuracy": 0.6 + x, "reward/held_out_accuracy": 0.5 + x} for x in (0.3, place / 10)
        )
        lines = [{"step": 3, **early}, {"step": 6, **late}, {"step": 6, "reward/loss": 0.1}]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(reward_folds.reward_stage, "build", lambda config, mesh: config)
    monkeypatch.setattr(reward_folds.loop, "run", run)
    config = tiny_supervised.config("reward", world, **{"reward.folds": 3})
    reward_folds.run(config, None, tmp_path / "folds")
    assert {name: section["held_out_groups"] for name, section in asked.items()} == {
        "fold0": ("a",), "fold1": ("b",), "fold2": ("c",),
    }  # fmt: skip
    assert all(section["folds"] == 0 for section in asked.values())
    report = json.loads((tmp_path / "folds" / "generalisation.json").read_text())
    assert report["training_groups"]["mean"] == pytest.approx(0.7)
    assert report["held_out_groups"]["mean"] == pytest.approx(0.6)
    assert [fold["reward/held_out_accuracy"] for fold in report["folds"]] == pytest.approx([0.5, 0.6, 0.7])


def test_interval_by_hand():
    found = reward_folds.interval([0.70, 0.72, 0.74])
    error = 0.02 / 3**0.5
    assert found == pytest.approx({"mean": 0.72, "standard_error": error, "interval95": 4.30265 * error})


# ------------------------------------------------------------------------------------------------------------- refusals


def test_windows_need_separate_sequences(world):
    config = tiny_supervised.config("reward", world)
    config.models.model.windows = (0, 16)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with pytest.raises(ValueError, match="config.reward.shared_prompt must be False"):
        reward_stage.build(config, mesh)
    config.reward.shared_prompt = False
    reward_stage.build(config, mesh)


def test_a_reward_model_is_no_policy_but_grows_from_one(world, trained, tmp_path):
    _, _, state, workdir = trained
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    config = tiny_supervised.config("sft", world)
    config.models.model = tiny_supervised.common.network(init_from=str(workdir))
    with pytest.raises(ValueError, match="config.models.model must be a language model, got a reward or value model"):
        build(config, "lm", mesh)
    again = build(config, "scalar", mesh).load()
    assert float(again["scalar_head"]["bias"]) == float(state.params["scalar_head"]["bias"])

    everywhere = NamedSharding(mesh, PartitionSpec())
    config = tiny_supervised.config("sft", world)
    body = build(config, "lm", mesh)
    saved = create(jax.device_put(body.load(), everywhere), optax.sgd(1.0), with_ema=False)
    with checkpoint.Checkpoints(tmp_path, 1, "", "min") as checkpoints:
        resolved = workdirs.as_json(workdirs.resolved(config, {"model": body.entry}))
        checkpoints.save(1, saved, {"step": 1, "config": resolved}, {})
    config.models.model = tiny_supervised.common.network(init_from=str(tmp_path))
    grown = build(config, "scalar", mesh)
    params = grown.load()
    assert grown.config.head == "scalar" and params["scalar_head"]["kernel"].shape == (32,)
    np.testing.assert_array_equal(params["embed"]["tokens"], saved.params["embed"]["tokens"])
