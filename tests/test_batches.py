"""Batches: what they hold, that their number alone defines them, and how they reach the devices."""

import collections
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import compiling
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from instructgpt_jax import sharding
from instructgpt_jax.data import batches as batching
from instructgpt_jax.data import datasets, documents, encoding, feeding, packing, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Mix, Order, Rows, own_of
from instructgpt_jax.data.encoding import Allowed
from instructgpt_jax.models import flash

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = "red blue small old river stone bird fox sees finds gives takes near far under over again never".split()


def text(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


def make_world(folder):
    """A tokenizer and small files of every kind; the same wherever it is called."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    prompts = [f"{i}: {text(rng, 1, 6)}" for i in range(53)]
    completions = [[text(rng, 1, 5) for _ in range(rng.integers(2, 5))] for _ in prompts]
    world = {
        "demonstrations": write(
            folder / "demonstrations.jsonl",
            [{"prompt": p, "completion": c[0]} for p, c in zip(prompts, completions, strict=True)],
        ),
        "comparisons": write(
            folder / "comparisons.jsonl",
            [
                {"prompt": p, "completions": c, "ranking": [1, *range(1, len(c))], "group": i % 3}
                for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
            ],
        ),
        "prompts": write(folder / "prompts.jsonl", [{"prompt": p, "user": f"u{i % 9}"} for i, p in enumerate(prompts)]),
        "pretraining": write(folder / "pretraining.jsonl", [{"text": text(rng, 20, 80)} for _ in range(30)]),
    }
    tokenizer = tokenizers.train([text(rng, 5, 9) for _ in range(200)], 400, folder / "bpe")
    return world, tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def build(world, kind, process=(0, 1), **changes):
    """The batches of one kind with small settings."""
    files, tokenizer = world
    order = Order(seed=1, num_epochs=3, batch_size=8, process_index=process[0], process_count=process[1])
    rows, allowed = Rows(row_length=64, microbatch_rows=4), Allowed(max_prompt_tokens=0, skip_bad=0)
    order, rows, allowed = (
        given._replace(**{field: changes.pop(field) for field in given._fields if field in changes})
        for given in (order, rows, allowed)
    )
    options = {
        "demonstrations": dict(rows=rows, allowed=allowed, loss_on_prompt=False),
        "comparisons": dict(rows=rows, allowed=allowed, max_completions=4, shared_prompt=True),
        "prompts": dict(allowed=allowed, max_prompt_length=40),
        "pretraining": dict(rows=rows, cache_dir=""),
    }[kind]
    records = sources.load((files[kind],), kind, allowed.skip_bad)
    return getattr(batching, kind)(records, tokenizer, order, **(options | changes))


def encoded_of(batches):
    """What epochs are counted by."""
    return next(iter(batches.read.values()))


KINDS = ("demonstrations", "comparisons", "prompts", "pretraining")


def contents(batch):
    """The examples of a batch, whatever rows they stand in, as a sorted list of tuples."""
    if "prompts" in batch:
        return sorted(
            (int(i), tuple(p[:n]))
            for i, p, n in zip(batch["index"], batch["prompts"], batch["prompt_lengths"], strict=True)
        )
    if "ranks" in batch:
        found = []
        first_row = 0  # every segment of these tests' comparisons fits one row, so its segment is the whole comparison
        for m, slot in zip(*np.nonzero(batch["ranks"].any(-1)), strict=True):
            row, column = batch["ends"][m, slot, 0]
            row = (row - first_row) % batch["segments"].shape[1]
            here = batch["segments"][m, row] == batch["segments"][m, row, column]
            found.append((tuple(batch["tokens"][m, row][here]), tuple(batch["ranks"][m, slot])))
        return sorted(found)
    found = []
    for tokens, segments, mask in zip(
        *(batch[n].reshape(-1, 64) for n in ("tokens", "segments", "loss_mask")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            found.append((tuple(tokens[segments == segment]), tuple(mask[segments == segment])))
    return sorted(found)


def test_demonstrations_are_prompt_completion_and_eos(world):
    files, tokenizer = world
    for loss_on_prompt in (False, True):
        batch = build(world, "demonstrations", loss_on_prompt=loss_on_prompt)[0]
        records = {r["prompt"] + r["completion"]: r for r in map(json.loads, open(files["demonstrations"][6:]))}
        found = contents(batch)
        assert len(found) == 8
        for tokens, mask in found:
            assert tokens[-1] == tokenizer.eos_id and tokenizer.eos_id not in tokens[:-1]
            record = records[tokenizer.decode(tokens[:-1])]
            prompt = len(tokenizer.encode([record["prompt"]])[0])
            assert list(mask) == [int(i >= (1 if loss_on_prompt else prompt)) for i in range(len(tokens))]


def test_comparisons_keep_ranks_ties_groups_and_skip_all_tied(world):
    files, tokenizer = world
    batches = build(world, "comparisons", seed=None)
    records = [r for r in map(json.loads, open(files["comparisons"][6:]))]
    usable = [r for r in records if len(set(r["ranking"])) > 1]
    read = batches.read["comparisons"]
    assert read.left_out == {"all completions tied": len(records) - len(usable)} and len(usable) < len(records)
    assert len(read.examples) == len(usable)
    found = sorted(
        (tuple(ranks[ranks > 0]), int(group))
        for batch in (batches[i] for i in range(len(batches)))
        for ranks, group in zip(batch["ranks"].reshape(-1, 4), batch["groups"].reshape(-1), strict=True)
        if ranks.any()
    )
    assert found == sorted((tuple(r["ranking"]), r["group"]) for r in usable)
    eos = {
        int(batch["tokens"][m, row, column])
        for batch in (batches[i] for i in range(len(batches)))
        for m, slot, k in zip(*np.nonzero(batch["ranks"]), strict=True)
        for row, column in [batch["ends"][m, slot, k]]
    }
    assert eos == {tokenizer.eos_id}  # the score is read at EOS


def test_texts_are_encoded_where_no_tokens_of_them_are_kept(world, tmp_path, monkeypatch):
    _, tokenizer = world
    kept = {"prompt": "red", "completions": ["fox", "bird"], "ranking": [1, 2], "tokens": [[3, 4], [5]]}
    other = kept | {"completions": ["stone", "river"], "tokenizer": "of another"}
    texts, encode = [], tokenizer.encode
    monkeypatch.setattr(type(tokenizer), "encode", lambda _, given: texts.extend(given) or encode(given))
    records = [kept | {"tokenizer": tokenizer.hash}, other, other | {"tokens": None}]
    world = {"comparisons": write(tmp_path / "kept.jsonl", records)}, tokenizer
    [first, *others] = build(world, "comparisons", batch_size=2).read["comparisons"].examples
    eos, written = tokenizer.eos_id, [ids.tolist() for ids in encode(["stone", "river"])]
    assert [ids.tolist() for ids in first.completions] == [[3, 4, eos], [5, eos]]
    assert [[ids.tolist() for ids in one.completions] for one in others] == [[[*ids, eos] for ids in written]] * 2
    assert texts.count("stone") == texts.count("river") == 2 and not {"fox", "bird"} & set(texts)
    again = encoding.completions(records, tokenizer)
    assert [[ids.tolist() for ids in one] for one in again] == [
        [ids.tolist() for ids in one.completions] for one in (first, *others)
    ]


def test_prompts_are_padded_on_the_right(world):
    files, tokenizer = world
    records = [json.loads(line) for line in open(files["prompts"][6:])]
    batch = build(world, "prompts")[2]
    assert batch["prompts"].shape == (8, 40)
    for index, prompt, length in zip(batch["index"], batch["prompts"], batch["prompt_lengths"], strict=True):
        assert tokenizer.decode(prompt[:length]) == records[index]["prompt"] and not prompt[length:].any()


def test_pretraining_text_is_joined_by_eos_and_cut(world, tmp_path):
    files, tokenizer = world
    documents = [json.loads(line)["text"] for line in open(files["pretraining"][6:])]
    stream = [i for ids in tokenizer.encode(documents) for i in [*ids, tokenizer.eos_id]]
    wanted = sorted(tuple(stream[i : i + 64]) for i in range(0, len(stream) - 63, 64))
    for cache in ("", str(tmp_path / "cache"), str(tmp_path / "cache")):  # in memory, written, found again
        batches = build(world, "pretraining", seed=None, cache_dir=cache)
        found = [example for i in range(len(batches)) for example in contents(batches[i])]
        assert sorted(tokens for tokens, _ in found) == wanted
        assert all(mask == (0,) + (1,) * 63 for _, mask in found)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_encoded_text_that_is_kept_can_be_shared_and_is_whole(world, tmp_path, monkeypatch):
    before = os.umask(0o022)
    try:
        build(world, "pretraining", cache_dir=str(tmp_path))
    finally:
        os.umask(before)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o644
    kept.unlink()

    def interrupted(*_):
        yield np.arange(9, dtype=np.uint32)
        raise KeyboardInterrupt

    monkeypatch.setattr(documents, "_encode_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(world, "pretraining", cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_once_an_epoch_each_in_another_order(world, kind):
    once = sorted(
        e for b in (build(world, kind, seed=None),) for i in range(len(b)) for e in contents(b[i]) if e[0] != -1
    )
    batches = build(world, kind, batch_size=1, num_epochs=2)
    count = len(encoded_of(batches).examples)
    assert len(once) == count and len(batches) == 2 * count and batches.steps_per_epoch == count
    epochs = [[contents(batches[i])[0] for i in range(e * count, (e + 1) * count)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == once
    assert epochs[0] != epochs[1] and epochs[0] != once
    assert [contents(build(world, kind, batch_size=1, seed=2)[i])[0] for i in range(5)] != epochs[0][:5]


@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_hold_what_one_does(world, kind):
    one = build(world, kind)
    four = [build(world, kind, (p, 4)) for p in range(4)]
    assert {len(b) for b in four} == {len(one)}
    for i in range(len(one)):
        assert sorted(e for b in four for e in contents(b[i])) == contents(one[i])
    shapes = [{name: array.shape for name, array in b[0].items()} for b in four]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_see_each_record_of_an_epoch_once(world, kind):
    two = [build(world, kind, (p, 2), batch_size=2, num_epochs=1) for p in range(2)]
    seen = collections.Counter(e for b in two for i in range(len(b)) for e in contents(b[i]))
    whole = build(world, kind, batch_size=1, num_epochs=1)
    every = collections.Counter(e for i in range(len(whole)) for e in contents(whole[i]))
    odd = len(encoded_of(whole).examples) % 2  # the one left over has no partner: an epoch of pairs
    assert sum((every - seen).values()) == odd and not seen - every


def test_more_processes_than_examples_of_a_batch(world):
    parts = [build(world, "demonstrations", (p, 4), batch_size=3) for p in range(4)]
    assert sorted(e for b in parts for e in contents(b[1])) == contents(build(world, "demonstrations", batch_size=3)[1])


def digest(batches, start, count):
    state = hashlib.sha256()
    for i in range(start, start + count):
        for name, array in sorted(batches[i].items()):
            state.update(name.encode() + str(array.shape).encode() + array.tobytes())
    return state.hexdigest()


def resumed(world, start, count):
    """Runs in a new process: hashes of the next batches, and of the examples that two processes hold of them."""
    result = {}
    for kind in KINDS:
        whole = build(world, kind, num_epochs=None)
        halves = [build(world, kind, (p, 2), num_epochs=None) for p in range(2)]
        lists = [sorted(e for half in halves for e in contents(half[i])) for i in range(start, start + count)]
        result[kind] = [digest(whole, start, count), hashlib.sha256(repr(lists).encode()).hexdigest()]
    return result


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder where two new JAX processes of two devices, one program, leave what they hold of a batch."""
    folder = tmp_path_factory.mktemp("processes")
    program = """
import json, pathlib, sys
import jax
import numpy as np
sys.path.insert(0, "tests")
number, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{port}", 2, number)
import test_batches
from instructgpt_jax import sharding
from instructgpt_jax.data import feeding
world = test_batches.make_world(folder / str(number))
assert feeding.process_slice(sharding.make_mesh(dict(data=1, fsdp=1, tensor=4))) == (0, 1)
for axes in ((2, 2, 1), (1, 2, 2)):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, axes)))
    where = feeding.process_slice(mesh)
    assert where == (number, 2)
    batches = test_batches.build(world, "comparisons", where)
    batch = next(feeding.iterate(batches, mesh, 2))
    held = {(name, s.index[1].start or 0): s.data for name, array in batch.items() for s in array.addressable_shards}
    np.savez(folder / f"{axes[0]}_{number}.npz", **{f"{name}/{start}": piece for (name, start), piece in held.items()})
found = test_batches.resumed(world, 17, 100)  # each process encodes half of the records
if number == 0:
    (folder / "resumed.json").write_text(json.dumps(found))
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": compiling.SOON,
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # as main.keep_programs says of such a job
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "3",
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(number), port, str(folder)], cwd=ROOT, env=environment)
        for number in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    return folder


def test_the_next_100_batches_after_a_restore_in_a_new_process(world, two_processes):
    here = {}
    for kind in KINDS:
        whole = build(world, kind, num_epochs=None)
        lists = [contents(whole[i]) for i in range(17, 117)]
        here[kind] = [digest(whole, 17, 100), hashlib.sha256(repr(lists).encode()).hexdigest()]
    assert json.loads((two_processes / "resumed.json").read_text()) == here


def mixed(world, fraction_of, fraction=0.25, **changes):
    mix = Mix(sources.load((world[0]["pretraining"],), "pretraining", 0), fraction, fraction_of, cache_dir="")
    return build(world, "demonstrations", **(dict(mix=mix, num_epochs=4) | changes))


@pytest.mark.parametrize("fraction_of", ["loss", "examples"])
def test_texts_among_demonstrations(world, fraction_of):
    batches = mixed(world, fraction_of)
    kinds = [[max(mask) for _, mask in contents(batches[i])] for i in range(len(batches))]
    assert {kind.count(2) for kind in kinds} == {2} and {len(kind) for kind in kinds} == {8}  # a quarter of 8, always
    assert len(batches) == 53 * 4 // 6 and batches.steps_per_epoch == 8  # 53 / 0.75 examples an epoch
    texts = [tokens for i in range(len(batches)) for tokens, mask in contents(batches[i]) if max(mask) == 2]
    assert {len(tokens) for tokens in texts} == {64} and len(set(texts)) > 20


def test_every_batch_of_a_loss_share_has_texts_and_demonstrations(world):
    """Also where the share of a batch is less than one text, as for batches of 8 and a tenth."""
    batches = mixed(world, "loss", fraction=0.1, batch_size=4, microbatch_rows=4)
    kinds = [sorted(max(mask) for _, mask in contents(batches[i])) for i in range(len(batches))]
    assert own_of(4, 0.1) == 3  # what a plan reckons with
    assert all(kind == [1, 1, 1, 2] for kind in kinds) and len(kinds) == 53 * 4 // 3
    batches = mixed(world, "loss")
    whole = [collections.Counter(tokens for tokens, _ in contents(batches[i])) for i in range(3)]
    halves = [mixed(world, "loss", process_index=p, process_count=2, microbatch_rows=8) for p in range(2)]
    for i, both in enumerate(whole):
        parts = [contents(half[i]) for half in halves]
        assert collections.Counter(tokens for part in parts for tokens, _ in part) == both
        assert [sum(max(mask) == 2 for _, mask in part) for part in parts] == [1, 1]  # the work is shared
    with pytest.raises(ValueError, match=r"batch_size must hold demonstrations and texts .*=0.9\), got 4"):
        mixed(world, "loss", fraction=0.9, batch_size=4, microbatch_rows=4)


def test_a_share_of_the_tokens(world):
    """Over the run a quarter of the loss tokens are of texts: 63 each, where a demonstration has about 5."""
    batches = mixed(world, "tokens", num_epochs=200)
    masks = [mask for i in range(len(batches)) for _, mask in contents(batches[i])]
    tokens = [sum(mask.count(kind) for mask in masks) for kind in (1, 2)]
    assert abs(tokens[1] / sum(tokens) - 0.25) < 0.01
    assert sum(max(mask) == 2 for mask in masks) / len(masks) < 0.05  # of the examples they are few


def test_a_share_is_a_part_of_what_is_shuffled(world):
    for wrong in (dict(fraction=1.0), dict(seed=None)):
        with pytest.raises(ValueError, match="pretraining_fraction must be above 0 and below 1, with a seed, got "):
            mixed(world, "loss", **wrong)


def test_weights_of_sources(world, tmp_path):
    _, tokenizer = world
    files = [write(tmp_path / f"{n}.jsonl", [{"prompt": f"{n} {i}"} for i in range(40)]) for n in "ab"]
    records = sources.load((f"{files[0]}@3", f"{files[1]}@1"), "prompts", 0)
    batches = batching.prompts(records, tokenizer, Order(0, 1, 8), Allowed(0, 0), max_prompt_length=20)
    assert len(batches) == 10
    for i in range(10):
        assert (batches[i]["index"] < 40).sum() == 6
    drawn = [n for i in range(10) for n in batches[i]["index"] if n < 40]
    assert set(collections.Counter(drawn).values()) == {1, 2} and len(drawn) == 60  # once through, then again


def test_iterate_lays_out_the_parts_of_a_batch_each_in_its_own_way(world):
    class Both:
        spec = {"prompts": batching.EXAMPLES, "pretraining": batching.ROWS}
        parts = {name: build(world, name, num_epochs=None) for name in spec}

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {name: part[index] for name, part in self.parts.items()}

    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    [batch] = feeding.iterate(Both(), mesh, 3)
    assert batch["prompts"]["prompts"].sharding.spec == batching.EXAMPLES
    assert batch["pretraining"]["tokens"].sharding.spec == batching.ROWS
    abstract = datasets.abstract(Both(), mesh)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), abstract) == jax.tree.map(
        lambda x: (x.shape, x.sharding), batch
    )


@pytest.mark.parametrize("shape", [(4, 2, 1), (1, 2, 4), (2, 2, 2)])
def test_iterate_gives_global_arrays_from_a_step_on(world, shape):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
    assert feeding.process_slice(mesh) == (0, 1)
    batches = build(world, "comparisons", microbatch_rows=8)
    iterator = feeding.iterate(batches, mesh, len(batches) - 3)
    given = list(iterator)
    assert len(given) == 3
    abstract = datasets.abstract(batches, mesh)
    for i, batch in enumerate(given, len(batches) - 3):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, batches[i][name])
            assert array.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
            assert (array.shape, array.dtype, array.sharding) == (
                abstract[name].shape,
                abstract[name].dtype,
                abstract[name].sharding,
            )


class Failing:
    spec = PartitionSpec()

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("record 2 is damaged")
        return {"x": np.full(8, index)}


def test_errors_of_the_thread_reach_the_consumer():
    mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
    iterator = feeding.iterate(Failing(), mesh, 0)
    assert [int(next(iterator)["x"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="record 2 is damaged"):
        next(iterator)


def test_close_stops_the_thread(world):
    mesh = sharding.make_mesh(dict(data=1, fsdp=1, tensor=8))
    iterator = feeding.iterate(build(world, "prompts", num_epochs=None), mesh, 5)
    next(iterator)
    assert any(thread.name == "batches" for thread in threading.enumerate())
    began = time.monotonic()
    iterator.close()
    assert time.monotonic() - began < 5
    assert not any(thread.name == "batches" for thread in threading.enumerate())
    with pytest.raises(StopIteration):
        next(iterator)


def test_bad_records_are_named_and_counted(world, tmp_path):
    files, tokenizer = world
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "red " * 50, "completion": "fox " * 50}]
    source = write(tmp_path / "long.jsonl", rows)
    long = (files | {"demonstrations": source}, tokenizer)
    with pytest.raises(
        ValueError, match=r"long.jsonl:2: prompt and completion must fit row_length=64 tokens, got \d+ \+ "
    ):
        build(long, "demonstrations", batch_size=1)
    batches = build(long, "demonstrations", batch_size=1, skip_bad=1)
    assert len(encoded_of(batches).examples) == 1 and encoded_of(batches).left_out == {"bad": 1}
    batches = build(long, "demonstrations", batch_size=1, skip_long=True)
    assert encoded_of(batches).left_out == {"too long for row_length and microbatch_rows": 1}
    damaged = write(tmp_path / "damaged.jsonl", [rows[0], rows[1], "no object"])
    with pytest.raises(ValueError, match="^1 bad record, .* allows 0:\n .*damaged.jsonl:3: a record must be"):
        build((files | {"demonstrations": damaged}, tokenizer), "demonstrations", batch_size=1, skip_long=True)
    both = r"2 bad records, config.data.skip_bad allows 1:\n .*damaged.jsonl:3: a record must be .*\n .*:2: prompt and"
    with pytest.raises(ValueError, match=both):  # what counts is what is listed
        build((files | {"demonstrations": damaged}, tokenizer), "demonstrations", batch_size=1, skip_bad=1)
    batches = build(long, "demonstrations", batch_size=1, max_prompt_tokens=20)
    assert len(encoded_of(batches).examples) == 1
    assert encoded_of(batches).left_out == {"prompt longer than 20 tokens": 1}
    with pytest.raises(ValueError, match="prompts.jsonl:1: a prompt must have at most max_prompt_length=2 tokens, got"):
        build(world, "prompts", max_prompt_length=2)
    with pytest.raises(
        ValueError, match=r"comparisons.jsonl:\d+: max_completions=3 must be at least its 4 completions"
    ):
        build(world, "comparisons", max_completions=3)
    wide = write(tmp_path / "wide.jsonl", [{"prompt": "red", "completions": ["fox " * 8] * 3, "ranking": [1, 2, 2]}])
    with pytest.raises(ValueError, match="wide.jsonl:1: microbatch_rows must .* the 3 rows of 16 tokens .* got 2"):
        build((files | {"comparisons": wide}, tokenizer), "comparisons", (0, 2), row_length=16)
    with pytest.raises(ValueError, match="pretraining text must fill .* row_length=99999 tokens, got"):
        build(world, "pretraining", row_length=99999)


def test_sizes_that_cannot_work_are_refused(world):
    with pytest.raises(ValueError, match="microbatch_rows must be a positive multiple of the 3 processes, got 4"):
        build(world, "demonstrations", (0, 3))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        build(world, "prompts", (0, 3))
    with pytest.raises(ValueError, match="at least batch_size=200 examples in all epochs, got 159"):
        build(world, "prompts", batch_size=200)
    with pytest.raises(ValueError, match="max_completions must be at most 65535 with a shared prompt, got 65536"):
        build(world, "comparisons", max_completions=1 << flash.BRANCH_BITS)
    assert packing.MAX_BRANCHES + 1 == 1 << flash.BRANCH_BITS
    with pytest.raises(IndexError, match=r"batch index must be in 0\.\.18, got 19"):
        build(world, "prompts")[19]


@pytest.mark.parametrize("data", [2, 1])
def test_two_real_processes_build_one_global_batch(world, two_processes, data):
    """The shards that both hold are the rows one process counts, in its order."""
    parts = [build(world, "comparisons", (p, 2))[2] for p in range(2)]
    for name in parts[0]:
        pieces = {}
        for number in range(2):
            with np.load(two_processes / f"{data}_{number}.npz") as file:
                pieces |= {int(key.split("/")[1]): file[key] for key in file if key.split("/")[0] == name}
        whole = np.concatenate([pieces[start] for start in sorted(pieces)], axis=1)
        np.testing.assert_array_equal(whole, np.concatenate([part[name] for part in parts], axis=1))
    rows = [part["ends"][part["ranks"] > 0][:, 0] for part in parts]
    assert rows[0].max() < 2 <= rows[1].min()  # rows are numbered within the global microbatch


def test_real_data(shared_data):
    tokenizer = tokenizers.load(shared_data / "gpt2_bpe")
    order, rows, allowed = Order(0, 1, 32), Rows(2048, 8), Allowed(1024, 3)
    for name, kind, extra in (
        ("comparisons/oasst_kwise", "comparisons", dict(max_completions=9, shared_prompt=True)),
        ("comparisons/gsm8k*", "comparisons", dict(max_completions=4, shared_prompt=False)),
        ("comparisons/pandalm*", "comparisons", dict(max_completions=2, shared_prompt=True)),
        ("comparisons/hh_rlhf_helpful-base", "comparisons", dict(max_completions=2, shared_prompt=True)),
        ("demonstrations/e2e_nlg", "demonstrations", dict(loss_on_prompt=False)),
        ("demonstrations/oasst", "demonstrations", dict(loss_on_prompt=False)),
    ):
        source = f"jsonl:{shared_data}/{name.rstrip('*')}*.jsonl.gz"
        records = sources.load((source,), kind, 0)
        batches = getattr(batching, kind)(records, tokenizer, order, rows, allowed, **extra)
        assert len(batches.read[kind].examples) + sum(batches.read[kind].left_out.values()) == len(records)
        texts = {records[i]["prompt"] for i in range(len(records))}
        batch = batches[len(batches) - 1]
        m, row = np.argwhere(batch["segments"] == 1)[0][:2]
        first = batch["tokens"][m, row][batch["segments"][m, row] == 1]
        assert any(tokenizer.decode(first).startswith(prompt) for prompt in texts)
    solutions = sources.load((f"jsonl:{shared_data}/comparisons/gsm8k*.jsonl.gz",), "comparisons", 0)
    tied = batching.comparisons(solutions, tokenizer, order, rows, allowed, max_completions=4, shared_prompt=True)
    assert tied.read["comparisons"].left_out["all completions tied"] > 0
