"""Token shards: the same sequences, batches and runs as from the same text, whoever built them and whoever reads."""

import collections
import json
import pathlib
import re

import numpy as np
import pytest
import small_runs
from bucket import install
from saved_runs import lines
from test_batches import contents, make_world, text, write

from instructgpt_jax import main, process
from instructgpt_jax.data import batches as batching
from instructgpt_jax.data import build, build_tokens, datasets, documents, encoding, shards, sources
from instructgpt_jax.data import tokenizer as tokenizers
from instructgpt_jax.data.batches import Mix, Order, Rows
from instructgpt_jax.data.build_tokens import Part

pytestmark = pytest.mark.usefixtures("one_device")
ROW = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Files of text, some of it of users and some of it twice; the same as shards of two parts; a tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(1)
    _, tokenizer = make_world(folder)
    texts = [text(rng, 2, 40) for _ in range(150)]
    texts += texts[:20]
    records = [{"text": t} | ({"user": f"u{i % 7}"} if i % 3 == 0 else {}) for i, t in enumerate(texts)]
    (folder / "text").mkdir()
    for number, first in enumerate((0, 60, 61, 120)):
        write(folder / "text" / f"{'cbda'[number]}.jsonl", records[first : (60, 61, 120, 170)[number]])
    source = f"jsonl:{folder}/text/*.jsonl"
    for number in (2, 1):  # in any order
        build_tokens.build(source, f"{folder}/bpe", f"{folder}/shards", Part(number, 2), workers=1, skip_bad=0)
    return folder, source, f"tokens:{folder}/shards/*.tokens", tokenizer


def both(world, *endings):
    """The corpus of text, and of shards; with endings as a tuple of such sources."""
    _, *names, _ = world
    return [sources.load(tuple(name + ending for ending in endings or ("",)), "pretraining", 0) for name in names]


def sequences(records, tokenizer, row_length=ROW):
    found = encoding.pretraining(records, tokenizer, row_length=row_length, cache_dir="")
    return np.array([example.tokens for example in found.examples]), found.parts


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("endings", [(), ("", ""), ("@1", "@3")])
def test_the_sequences_of_the_text(world, fraction, endings):
    """Whole, split, joined and weighted; where a user's validation text is in training too, it is in neither."""
    mine, theirs = (datasets.split(corpus, fraction) for corpus in both(world, *endings))
    for side, (as_text, as_ids) in enumerate(zip(mine, theirs, strict=True)):
        assert len(as_text) == len(as_ids) and as_text.left_out == as_ids.left_out
        assert (len(as_text) > 0) == (fraction > 0 or side == 0)
        if len(as_text):
            (want, parts), (got, same) = (sequences(records, world[-1]) for records in (as_text, as_ids))
            np.testing.assert_array_equal(got, want)
            assert got.dtype == np.int32 and parts == same
    if fraction == 0.7 and not endings:
        assert theirs[1].left_out == {"prompt that is in training too, by another user": 2}


def test_without_users_nothing_is_lost(world, tmp_path):
    folder, source, *_, tokenizer = world
    plain = write(
        tmp_path / "p.jsonl", [{"text": record["text"]} for record in sources.load((source,), "pretraining", 0)]
    )
    build_tokens.build(plain, f"{folder}/bpe", f"{tmp_path}/s", Part(1, 1), workers=1, skip_bad=0)
    found = [
        datasets.split(sources.load((name,), "pretraining", 0), 0.3)
        for name in (plain, f"tokens:{tmp_path}/s/*.tokens")
    ]
    for as_text, as_ids in zip(*found, strict=True):
        np.testing.assert_array_equal(sequences(as_ids, tokenizer)[0], sequences(as_text, tokenizer)[0])
    assert sum(map(len, found[1])) == 170 and not found[1][1].left_out


def batches(corpus, tokenizer, seed=3, process=(0, 1), num_epochs=None):
    order = Order(seed, num_epochs, 8, *process)
    return batching.pretraining(corpus, tokenizer, order, Rows(ROW, 8), cache_dir="")


def test_batches_hang_on_their_number_and_not_on_the_processes(world):
    """100 batches from number 17 on, by one process of the text, and by 1, 2 and 4 of the shards."""
    tokenizer = world[-1]
    as_text, as_ids = (datasets.split(corpus, 0.2)[0] for corpus in both(world))
    whole = batches(as_text, tokenizer)
    for count in (1, 2, 4):
        parts = [batches(as_ids, tokenizer, process=(number, count)) for number in range(count)]
        for i in range(17, 117):
            rows = np.concatenate([part[i]["tokens"][0] for part in parts])
            assert sorted(map(tuple, rows)) == sorted(map(tuple, whole[i]["tokens"][0])), (count, i)
    for name in ("tokens", "positions", "segments", "loss_mask"):
        np.testing.assert_array_equal(batches(as_ids, tokenizer)[5][name], whole[5][name])


def test_an_epoch_has_each_sequence_once(world):
    corpus, tokenizer = both(world)[1], world[-1]
    every, _ = sequences(corpus, tokenizer)
    stream = batches(corpus, tokenizer, num_epochs=8)
    rows = np.concatenate([stream[i]["tokens"][0] for i in range(len(stream))])
    for epoch in range(7):
        seen = collections.Counter(map(tuple, rows[epoch * len(every) : (epoch + 1) * len(every)]))
        assert seen == collections.Counter(map(tuple, every))


def test_a_process_reads_its_slice_alone(world, monkeypatch):
    read, plain = [], shards.Files.read
    monkeypatch.setattr(shards.Files, "read", lambda *a: read.append(a[3] - a[2]) or plain(*a))
    stream = batches(both(world)[1], world[-1], process=(1, 4))
    assert not read  # nothing of the corpus before the first batch
    stream[3]
    assert sum(read) == 8 // 4 * ROW * 2


def test_text_among_demonstrations(world):
    folder, *_, tokenizer = world
    asked = sources.load((f"jsonl:{folder}/demonstrations.jsonl",), "demonstrations", 0)
    found = []
    for corpus in both(world):
        mix = Mix(corpus, 0.25, "loss", cache_dir="")
        allowed = encoding.Allowed(0, 0)
        made = batching.demonstrations(asked, tokenizer, Order(0, None, 8), Rows(64, 8), allowed, False, mix)
        found.append([contents(made[i]) for i in range(4)])
    assert found[0] == found[1]


def test_workers_write_the_same_shards(world, tmp_path, capsys, monkeypatch):
    folder, source, tokens, tokenizer = world
    monkeypatch.setattr(process.Progress, "QUIET", 0.0)
    arguments = ["--kind=pretraining", "--format=tokens", f"--input={source[6:]}", f"--tokenizer={folder}/bpe"]
    build.main([*arguments, f"--data_dir={tmp_path}", "--workers=2"])
    told = capsys.readouterr()
    assert re.match(rf"tokens:{tmp_path}/\*.tokens has 170 documents, [\d,]+ tokens in 4 shards\n", told.out)
    assert re.search(r"\d of 4 shards, [\d,]+ documents, [\d,]+ tokens, [\d,]+ tokens/s, ", told.err)
    for path in (folder / "shards").glob("0*"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    build.main(["--kind=pretraining", "--format=tokens", f"--input=tokens:{tmp_path}/*.tokens", "--verify"])
    assert "has 4 shards, each as it was written" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        build.main([*arguments, f"--data_dir={tmp_path}"])
    assert f"data_dir {tmp_path} must not hold this part or parts of another build, got" in capsys.readouterr().err


def test_what_has_no_files_is_cut_into_ranges(world, tmp_path):
    folder, *_ = world
    source = "simulated:pretraining:30"
    for number in (1, 2, 3):
        build_tokens.build(source, f"{folder}/bpe", f"{tmp_path}/s", Part(number, 3), workers=0, skip_bad=0)
    corpora = [sources.load((name,), "pretraining", 0) for name in (source, f"tokens:{tmp_path}/s/*.tokens")]
    want, got = (sequences(corpus, world[-1])[0] for corpus in corpora)
    np.testing.assert_array_equal(got, want)
    assert len(corpora[1]) == 30


def test_many_files_become_few_shards(world, tmp_path, monkeypatch):
    monkeypatch.setattr(build_tokens, "_MOST", 3)
    folder, source, _, tokenizer = world
    made = build_tokens.build(source, f"{folder}/bpe", f"{tmp_path}/s", Part(1, 1), workers=1, skip_bad=0)
    assert [shard["name"] for shard in made["shards"]] == ["00000", "00001"]
    corpus = sources.load((f"tokens:{tmp_path}/s/*.tokens",), "pretraining", 0)
    np.testing.assert_array_equal(sequences(corpus, tokenizer)[0], sequences(both(world)[0], tokenizer)[0])


def test_a_large_vocabulary_takes_four_bytes():
    assert [shards.dtype_of(size).itemsize for size in (1 << 16, (1 << 16) + 1)] == [2, 4]


def test_a_bucket(world, monkeypatch):
    """Built there, found there, and read there by ranges."""
    bucket = install(monkeypatch)
    folder, source, _, tokenizer = world
    build_tokens.build(source, f"{folder}/bpe", "gs://bucket/shards", Part(1, 1), workers=1, skip_bad=0)
    found = [
        datasets.split(sources.load((name,), "pretraining", 0), 0.2)[0]
        for name in (source, "tokens:gs://bucket/shards/*.tokens")
    ]
    want, got = (batches(side, tokenizer) for side in found)
    bucket.asked.clear()
    np.testing.assert_array_equal(got[2]["tokens"], want[2]["tokens"])
    assert sum(bucket.asked) == 8 * ROW * 2
    with pytest.raises(ValueError, match=r"tokens:gs://bucket/none/manifest-\*.json must name at least one file"):
        shards.find("gs://bucket/none/*.tokens")


def run(folder, name, source, iterations, **changes):
    config = small_runs.get_config(folder)
    config.data.pretraining = (source,)
    config.update_from_flattened_dict({"ppo.iterations": iterations, "eval_every": 0, "ppo.eval_batches": 0, **changes})
    main.run(config, str(folder / name))
    return lines(folder / name)


def test_ppo_ptx_reads_the_same_from_text_and_from_shards(tmp_path):
    """Every metric of every step bit for bit, also where a run goes on; other shards in their place are refused."""
    small_runs.write(tmp_path)
    source = f"jsonl:{tmp_path}/text.jsonl"
    as_text = run(tmp_path, "text", source, 3)
    tokenizer = f"{tmp_path}/text/tokenizer"

    def shard(records):
        write(tmp_path / "new.jsonl", records)
        for path in (tmp_path / "s").glob("*"):
            path.unlink()
        made = build_tokens.build(f"jsonl:{tmp_path}/new.jsonl", tokenizer, f"{tmp_path}/s", Part(1, 1), 1, 0)
        return made

    records = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    shard(records)
    of_ids = {"data.tokenizer": tokenizer}
    ids = f"tokens:{tmp_path}/s/*.tokens"
    assert run(tmp_path, "ids", ids, 2, **of_ids) == as_text[:2]
    assert run(tmp_path, "ids", ids, 3, **of_ids) == as_text
    assert as_text[2]["ptx/loss"] < as_text[0]["ptx/loss"]
    shard(records[:-1])
    with pytest.raises(ValueError, match=r"the data of a run must stay the same, got other pretraining: 300 records"):
        run(tmp_path, "ids", ids, 4, **of_ids)
    (tmp_path / "s" / "00000.tokens").unlink()
    with pytest.raises(ValueError, match="config.data.pretraining: .*s/00000.tokens must have the .* got no file"):
        run(tmp_path, "ids", ids, 4, **of_ids)


def test_shards_of_another_tokenizer_are_refused(world, tmp_path):
    """Named are both; a template alone makes no other one."""
    folder, _, tokens, tokenizer = world
    other = tokenizers.train(["other words than those"] * 9, 300, tmp_path / "bpe")
    corpus = both(world)[1]
    named = (
        rf"must be of the run's tokenizer {other.text_hash[:12]}, got shards of {tokenizer.text_hash[:12]} of \d+ ids"
    )
    with pytest.raises(ValueError, match=named):
        batches(corpus, other)
    with_template = tokenizers.load(folder / "bpe", tokenizers.chats.Chat("human_assistant"))
    assert with_template.hash != tokenizer.hash and with_template.text_hash == tokenizer.text_hash == tokenizer.hash
    batches(corpus, with_template)
    build_tokens.build(world[1], f"{tmp_path}/bpe", f"{tmp_path}/s", Part(1, 1), workers=1, skip_bad=0)
    with pytest.raises(ValueError, match="read as one must be of one tokenizer"):
        sources.load((tokens, f"tokens:{tmp_path}/s/*.tokens"), "pretraining", 0)


@pytest.fixture
def copied(world, tmp_path):
    folder = tmp_path / "copied"
    folder.mkdir()
    for path in (world[0] / "shards").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def cut(path: pathlib.Path, size: int = -2):
    path.write_bytes(path.read_bytes()[:size])


def change(path: pathlib.Path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda f: cut(f / "00001.tokens"), r"copied/00001.tokens must have the [\d,]+ bytes that its manifest"),
        (lambda f: cut(f / "00002.documents"), "00002.documents must have the 1,200 bytes .* got 1,198: copy it again"),
        (lambda f: (f / "00003.tokens").unlink(), "00003.tokens must have the .* got no file: copy it again"),
        (lambda f: (f / "manifest-00001-of-00002.json").unlink(), "all 2 parts, got none of part 1: .*--part=1/2 e"),
        (lambda f: cut(f / "manifest-00001-of-00002.json"), "00001-of-00002.json must be a manifest .* invalid JSON"),
        (lambda f: change(f / "manifest-00002-of-00002.json", format="x"), "the format 'instructgpt_jax .* got 'x'"),
        (lambda f: change(f / "manifest-00002-of-00002.json", vocab_size=7), "of the build of .*vocab_size.*got .*7"),
        (lambda f: change(f / "manifest-00002-of-00002.json", shards=[]), "must list 4 shards, got 2"),
    ],
)  # fmt: skip
def test_shards_that_are_not_whole_are_refused(copied, damage, told):
    damage(copied)
    with pytest.raises(ValueError, match=told):
        sources.load((f"tokens:{copied}/*.tokens",), "pretraining", 0)


def test_shards_that_change_while_a_run_reads_them(copied, world, capsys):
    corpus = sources.load((f"tokens:{copied}/*.tokens",), "pretraining", 0)
    _, files = sequences(corpus, world[-1]), copied / "00000.tokens"
    with open(files, "r+b") as file:  # as a copy that is begun again
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match="00000.tokens must have ids below .* got 65535 behind id 0: it is damaged"):
        sequences(corpus, world[-1])
    with pytest.raises(SystemExit):
        build.main(["--kind=pretraining", "--format=tokens", f"--input=tokens:{copied}/*.tokens", "--verify"])
    assert "copied/00000 must have the checksum" in capsys.readouterr().err
    with open(files, "r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match="00000.tokens must have at least .* bytes, got 10: it has been cut"):
        sequences(corpus, world[-1])


def test_another_list_of_shards_is_other_data(world, copied):
    """As data.json and the checkpoints tell it."""
    tokenizer = world[-1]

    def identity(pattern):
        found = encoding.pretraining(
            datasets.split(sources.load((pattern,), "pretraining", 0), 0.2)[0], tokenizer, row_length=ROW, cache_dir=""
        )
        return found.fingerprint, len(found.examples)

    whole, same, fewer = map(identity, (world[2], f"tokens:{copied}/*.tokens", f"tokens:{copied}/0000[0-2].tokens"))
    assert whole == same and whole[0] != fewer[0] and whole[1] > fewer[1]


@pytest.mark.parametrize(
    "names, kind, told",
    [
        (("TOKENS", "simulated:pretraining:9"), "pretraining", "tokens: sources must be of pretraining text and stand"),
        (("TOKENS",), "prompts", "tokens: sources must be of pretraining text and stand alone, got prompts"),
        (("TOKENS#1/2",), "pretraining", "tokens:GLOB has no options, the --input that it was built of has"),
        (("tokens:FOLDER/shards",), "pretraining", "must name files that end in .tokens, as FOLDER/"),
        (("tokens:FOLDER/shards/9*.tokens",), "pretraining", "at least one shard of its manifests, got none"),
        (("tokens:FOLDER/text/*.tokens",), "pretraining", r"manifest-\*.json must name at least one file, got none"),
    ],
)
def test_sources_that_cannot_be(world, names, kind, told):
    named = tuple(name.replace("TOKENS", world[2]).replace("FOLDER", str(world[0])) for name in names)
    with pytest.raises(ValueError, match=told):
        sources.load(named, kind, 0)


def test_shards_have_no_texts(world):
    with pytest.raises(ValueError, match="has ids to train on, and no texts: name the text itself here, jsonl:GLOB"):
        [record["text"] for record in both(world)[1]]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--kind=prompts", "--tokenizer=T"], "--format=tokens must have --kind=pretraining and a --tokenizer"),
        (["--kind=pretraining"], "--format=tokens must have --kind=pretraining and a --tokenizer"),
        (["--kind=pretraining", "--tokenizer=T", "--valid=x"], "--valid must not be given with --format=tokens"),
        (["--kind=pretraining", "--tokenizer=T", "--part=3/2"], "--part must be I/N with I from 1 to N, got '3/2'"),
        (["--kind=pretraining", "--verify"], "--input must be tokens:GLOB for --verify, got"),
        (["--kind=pretraining", "--tokenizer=T", "--input=jsonl:x@2"], "--input must be text without a weight"),
        (["--kind=pretraining", "--tokenizer=T", "--input=jsonl:x#unique"], "--input must have no #unique, each file"),
    ],
)
def test_command_lines_that_cannot_be(world, tmp_path, capsys, arguments, told):
    folder = world[0]
    given = [argument.replace("=T", f"={folder}/bpe") for argument in arguments]
    with pytest.raises(SystemExit):
        build.main(["--format=tokens", f"--input={folder}/text/*.jsonl", f"--data_dir={tmp_path}/s", *given])
    assert told in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_bad_records_are_named_and_counted(world, tmp_path, capsys):
    folder = world[0]
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [{"text": "red fox " * 40}, {"txt": "typo"}])
    arguments = ["--kind=pretraining", "--format=tokens", f"--tokenizer={folder}/bpe", f"--input={tmp_path}/*.jsonl"]
    with pytest.raises(SystemExit):
        build.main([*arguments, "--skip_bad=1", f"--data_dir={tmp_path}/s", "--workers=1"])
    assert re.search(
        r"2 bad records, --skip_bad allows 1:\n.*a.jsonl:2: missing field 'text', .*\n.*b.jsonl:2",
        capsys.readouterr().err,
    )
    with pytest.raises(ValueError, match="manifest"):
        shards.find(f"{tmp_path}/s/*.tokens")  # what is not whole is not found
    build.main([*arguments, "--skip_bad=2", f"--data_dir={tmp_path}/s", "--workers=1"])
    found = encoding.pretraining(
        sources.load((f"tokens:{tmp_path}/s/*.tokens",), "pretraining", 0), world[-1], row_length=ROW, cache_dir=""
    )
    assert datasets.described([{"pretraining": found}])["pretraining"]["left_out"] == {"bad": 2}


def test_text_that_takes_long_is_told_of(world, monkeypatch, capsys):
    """Reading and encoding, the advice once; nothing where it takes a moment."""
    _, source, _, tokenizer = world
    sequences(sources.load((source,), "pretraining", 0, "", process.say), tokenizer)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(process.Progress, "QUIET", 0.0)
    monkeypatch.setattr(process.Progress, "EVERY", 0.0)
    monkeypatch.setattr(documents, "CHUNK", 100)
    sequences(sources.load((source,), "pretraining", 0, "", process.say), tokenizer)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"pretraining: 1 records of {source} read" and len(said) == 170 + 2
    assert re.fullmatch(
        r"pretraining: 100 of 170 documents encoded, [\d,]+ tokens, about 0 s left; data.build.*", said[-2]
    )
    assert re.fullmatch(r"pretraining: 170 of 170 documents encoded, [\d,]+ tokens, about 0 s left", said[-1])
