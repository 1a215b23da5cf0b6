"""Loading, refusing and training tokenizers."""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from instructgpt_jax.data import encoding, sources
from instructgpt_jax.data import tokenizer as tokenizers

TEXTS = [f"The {a} {b} sees {n} small {b}s near the old river." for a in ("red", "blue") for b in ("fox", "hen")
         for n in range(20)]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    return tokenizers.train(TEXTS, 320, directory), directory


def backend_of(ours):
    return ours.pretrained(pad=False).backend_tokenizer


def test_trained_tokenizer_reads_back_with_autotokenizer(trained):
    ours, directory = trained
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "The red fox: naïve 雪 <tag>\n\n  two spaces"
    ids = ours.encode([text])[0]
    np.testing.assert_array_equal(ids, theirs(text)["input_ids"])
    assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token == tokenizers.EOS and theirs.eos_token_id == ours.eos_id
    assert ours.pad == tokenizers.PAD
    assert ours.vocab_size == len(theirs) <= 320


def test_training_learns_merges(trained):
    ours, _ = trained
    assert len(ours.encode([TEXTS[0]])[0]) < len(TEXTS[0]) / 2


def test_training_is_deterministic_for_any_number_of_threads(trained, tmp_path):
    _, directory = trained
    program = (
        "import sys; sys.path.insert(0, 'tests'); from test_tokenizer import TEXTS;"
        f"from instructgpt_jax.data import tokenizer; tokenizer.train(TEXTS, 320, {str(tmp_path)!r})"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7"}
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment | {"PYTHONPATH": root})
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_train_refuses_a_vocabulary_smaller_than_the_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        tokenizers.train(TEXTS, 257, tmp_path)


def test_load_refuses_an_empty_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({tokenizers.EOS: 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="must have at least 32 tokens"):
        tokenizers.load(tmp_path)


def test_load_refuses_a_tokenizer_without_words(tmp_path):
    """A vocabulary of the right size whose tokens never occur: every word is the unknown token."""
    words = {"[UNK]": 0, tokenizers.EOS: 1} | {f"zz{i}": i + 2 for i in range(60)}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=tokenizers.EOS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tell the words of a sentence apart"):
        tokenizers.load(tmp_path)


def test_load_refuses_a_tokenizer_without_eos(trained, tmp_path):
    ours, _ = trained
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend_of(ours)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have an EOS token"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("pad", [tokenizers.EOS, None])
def test_a_pad_token_is_added_for_exports_alone(trained, tmp_path, pad):
    """Many published GPT-2 fine-tunes set PAD to EOS."""
    ours, _ = trained
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend_of(ours), eos_token=tokenizers.EOS, pad_token=pad
    ).save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.pad == "" and loaded.eos_id == ours.eos_id and loaded.vocab_size == ours.vocab_size
    loaded.save(tmp_path / "kept")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "kept")) == ours.vocab_size
    assert max(loaded.encode([f"{tokenizers.PAD} {tokenizers.EOS}"])[0]) < ours.vocab_size
    exported = loaded.pretrained(pad=True)
    assert exported.pad_token == tokenizers.PAD and exported.pad_token_id not in (None, exported.eos_token_id)
    same = loaded.pretrained(pad=False)  # a language model would have one more id to sample
    assert same.pad_token == tokenizers.EOS and len(same) == ours.vocab_size


def test_start_is_bos_only_where_the_family_writes_one(trained, tmp_path):
    ours, directory = trained
    assert ours.start == () and ours.bos == ""
    with_bos = transformers.AutoTokenizer.from_pretrained(directory)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizers.EOS} $A", special_tokens=[(tokenizers.EOS, ours.eos_id)]
    )
    with_bos.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.start == (ours.eos_id,) and loaded.bos == tokenizers.EOS


def test_gpt2_vocabulary(shared_data):
    gpt2 = tokenizers.load(shared_data / "gpt2_bpe")
    # The ids published with GPT-2 for this sentence.
    np.testing.assert_array_equal(gpt2.encode(["Hello world, how are you?"])[0],
                                  [15496, 995, 11, 703, 389, 345, 30])  # fmt: skip
    assert gpt2.eos_id == 50256 and gpt2.vocab_size == 50257
    assert gpt2.pad == "" and gpt2.start == ()


# Text of special tokens -----------------------------------------------------------------------------------------------

LETTERS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def byte_level(folder):
    """GPT-2's kind, whose special tokens are `<|endoftext|>` and `<|pad|>`."""
    return tokenizers.train(TEXTS, 320, folder)


def sentence_piece(folder, pre_tokenizer=False):
    """Llama's kind: BOS before every sequence, bytes for what has no letter, and merges that lead to `</s>`."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if pre_tokenizer:
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    texts = TEXTS + ["<s> and </s> begin and end what was rendered: <s></s>, <s></s>"] * 40
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=420, special_tokens=LETTERS, show_progress=False))
    model.add_special_tokens(LETTERS[:3])
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return tokenizers.load(folder)


FAMILIES = {
    "byte-level": (byte_level, (tokenizers.EOS, tokenizers.PAD)),
    "metaspace": (lambda folder: sentence_piece(folder, pre_tokenizer=True), ("<s>", "</s>", "<unk>")),
    "prepended": (sentence_piece, ("<s>", "</s>", "<unk>")),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A tokenizer and the texts of its special tokens, which are the first ids."""
    build, special = FAMILIES[request.param]
    return build(tmp_path_factory.mktemp("family")), special


def ids_of(ours, texts):
    return {ours.vocabulary()[text] for text in texts}


def test_special_text_is_ordinary_text_whatever_was_called_before(family):
    ours, special = family
    texts = [f"The {text} is{text} here{text}{text}" for text in special] + list(special)
    first = ours.encode(texts)
    pretrained = ours.pretrained(pad=True)
    pretrained(texts, padding=True, truncation=True, max_length=4)
    ours._pretrained(texts, truncation=True, max_length=4)  # resets what it holds, and must not matter
    ours.encode_prompts(texts)
    for text, ids, again in zip(texts, first, ours.encode(texts), strict=True):
        np.testing.assert_array_equal(ids, again)
        assert ids.dtype == np.int32 and not ids_of(ours, special) & set(ids.tolist())
        assert ours.decode(ids) == text


def test_threads_encode_alike(family):
    ours, special = family
    texts = [f"{n} red {text}{n} foxes" for n in range(200) for text in special]
    alone = [ids.tolist() for ids in ours.encode(texts)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(ours.encode, texts) for _ in range(8)]:
            assert [ids.tolist() for ids in found.result()] == alone


def records_of(kind, record, folder):
    (folder / f"{kind}.jsonl").write_text(json.dumps(record) + "\n")
    return sources.load((f"jsonl:{folder}/{kind}.jsonl",), kind, 0)


def test_special_text_in_every_kind_of_record(family, tmp_path):
    ours, special = family
    for number, text in enumerate(special):
        folder = tmp_path / str(number)
        folder.mkdir()
        held = f"The {text} is{text} here{text}{text}"
        (bare,) = ours.encode([held])
        begun, ended = [*ours.start, *bare], [*bare, ours.eos_id]
        assert not ids_of(ours, special) & set(bare.tolist())
        every = encoding.Allowed(max_prompt_tokens=0, skip_bad=0)
        made = encoding.demonstrations(
            records_of("demonstrations", {"prompt": held, "completion": held}, folder),
            ours, every, row_length=500, loss_on_prompt=False,
        )  # fmt: skip
        np.testing.assert_array_equal(made.examples[0].tokens, begun + ended)
        made = encoding.comparisons(
            records_of("comparisons", {"prompt": held, "completions": [held, "No."], "ranking": [1, 2]}, folder),
            ours, every, row_length=500, process_rows=9, max_completions=2, shared_prompt=True,
        )  # fmt: skip
        np.testing.assert_array_equal(made.examples[0].prompt, begun)
        np.testing.assert_array_equal(made.examples[0].completions[0], ended)
        made = encoding.prompts(records_of("prompts", {"prompt": held}, folder), ours, every, max_prompt_length=500)
        np.testing.assert_array_equal(made.examples[0], begun)
        records = records_of("pretraining", {"text": held}, folder)
        for cache in ("", str(folder / "cache")):
            length = len(ours.start) + len(ended)
            made = encoding.pretraining(records, ours, row_length=length, cache_dir=cache)
            np.testing.assert_array_equal(made.examples[0].tokens, [*ours.start, *ended])


def test_a_rendered_prompt_has_bos_once(family):
    ours, special = family
    rendered, bare = ours.encode_prompts([f"{special[0]}[INST] Hi. [/INST]", "[INST] Hi. [/INST]"])
    if ours.start:
        np.testing.assert_array_equal(rendered, bare)
        assert rendered[0] == ours.start[0] and not ids_of(ours, special) & set(rendered[1:].tolist())
        twice = ours.encode_prompts(["<s><s>Hi."])[0]
        assert not ids_of(ours, special) & set(twice[1:].tolist()) and ours.decode(twice[1:]) == "<s>Hi."
    else:  # a family without BOS: the text of any special token is text
        assert ours.decode(rendered) == f"{special[0]}[INST] Hi. [/INST]"


def test_a_tokenizer_that_can_only_write_the_special_token_says_so(tmp_path):
    """Whole words, and no id for letters: text that holds EOS cannot be written."""
    words = {tokenizers.EOS: 0} | {word: n for n, word in enumerate(tokenizers._SENTENCE.split(), start=1)}
    model = Tokenizer(models.WordLevel(words | {f"w{n}": n for n in range(10, 50)}, unk_token=tokenizers.EOS))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=tokenizers.EOS).save_pretrained(tmp_path)
    ours = tokenizers.load(tmp_path)
    assert ours.encode(["The lazy"])[0].tolist() == [1, 8]
    for text in (f"The {tokenizers.EOS} fox", "The letters"):
        with pytest.raises(ValueError, match=r"a text must not hold '<\|endoftext\|>'"):
            ours.encode([text])


def test_added_tokens_that_are_not_special_stay_tokens(trained, tmp_path):
    ours, _ = trained
    more = ours.pretrained(pad=False)
    more.add_tokens([AddedToken("<extra>", special=False)])
    more.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.encode(["<extra>"])[0].tolist() == [ours.vocab_size]
    assert loaded.vocab_size == ours.vocab_size + 1 and loaded.decode([ours.vocab_size]) == "<extra>"


# What cannot change it ------------------------------------------------------------------------------------------------


def test_nothing_can_be_set(trained):
    ours, _ = trained
    with pytest.raises(dataclasses.FrozenInstanceError):
        ours.eos_id = 3


def test_a_file_that_cuts_and_pads_does_neither_here(trained, tmp_path):
    """Some published tokenizer.json files come with the truncation and padding of their training."""
    ours, directory = trained
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    content["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                          "pad_type_id": 0, "pad_token": tokenizers.PAD}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizers.load(tmp_path)
    for left, right in zip(loaded.encode([*TEXTS[:3], "a"]), ours.encode([*TEXTS[:3], "a"]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_hash_is_of_the_contents(trained, family, tmp_path):
    ours, directory = trained
    assert len(ours.hash) == 64 and int(ours.hash, 16)
    each, _ = family
    each.save(tmp_path / "copy")
    again = tokenizers.load(tmp_path / "copy")
    assert again.hash == each.hash and again == each and hash(again) == hash(each)

    others = {
        "merges": tokenizers.train(TEXTS[:5], 320, tmp_path / "merges").hash,
        "one more token": None,
        "another end": None,
    }
    more = ours.pretrained(pad=False)
    more.add_tokens(["<extra>"])
    more.save_pretrained(tmp_path / "more")
    others["one more token"] = tokenizers.load(tmp_path / "more").hash
    backend = backend_of(ours)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="e").save_pretrained(tmp_path / "end")
    others["another end"] = tokenizers.load(tmp_path / "end").hash
    assert len({ours.hash, *others.values()}) == 4


# Ids back to text, and which may be sampled ---------------------------------------------------------------------------


def test_decode_loses_no_id(trained):
    ours, _ = trained
    assert ours.decode([ours.eos_id, *ours.encode(["red"])[0], 1]) == f"{tokenizers.EOS}red{tokenizers.PAD}"
    for wrong in (ours.vocab_size, -1, 10**6):
        with pytest.raises(ValueError, match=rf"got \[{wrong}\], which no token has"):
            ours.decode([5, wrong])


def test_only_ids_of_tokens_may_be_sampled(trained, tmp_path):
    ours, directory = trained
    assert ours.allowed(ours.vocab_size) is None
    allowed = ours.allowed(400)
    np.testing.assert_array_equal(allowed, np.arange(400) < ours.vocab_size)

    for path in directory.iterdir():  # a hole: the last token moves up by three, another token comes behind
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    *_, last = content["model"]["vocab"]
    content["model"]["vocab"][last] += 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    holes = tokenizers.load(tmp_path)
    assert holes.vocab_size == ours.vocab_size + 3
    np.testing.assert_array_equal(np.flatnonzero(~holes.allowed(holes.vocab_size)), ours.vocab_size - 1 + np.arange(3))
    with pytest.raises(ValueError, match="which no token has"):
        holes.decode([ours.vocab_size])


def test_a_pad_above_the_others_is_not_sampled(trained, tmp_path):
    """A model need not hold it, so no network may have to read it."""
    ours, _ = trained
    more = transformers.PreTrainedTokenizerFast(tokenizer_object=backend_of(ours), eos_token=tokenizers.EOS)
    more.add_special_tokens({"pad_token": "<above>"})
    more.save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.vocab_size == ours.vocab_size and loaded.pad == "<above>"
    np.testing.assert_array_equal(loaded.allowed(400), ours.allowed(400))
    assert loaded.decode([ours.vocab_size]) == "<above>"
    assert max(loaded.encode(["a <above> b"])[0]) < ours.vocab_size
