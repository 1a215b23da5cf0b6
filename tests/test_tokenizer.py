"""Loading, refusing and training tokenizers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import transformers

from instructgpt_jax.data import tokenizer as tokenizers

TEXTS = [f"The {a} {b} sees {n} small {b}s near the old river." for a in ("red", "blue") for b in ("fox", "hen")
         for n in range(20)]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    return tokenizers.train(TEXTS, 320, directory), directory


def test_trained_tokenizer_reads_back_with_autotokenizer(trained):
    ours, directory = trained
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    text = "The red fox: naïve 雪 <tag>\n\n  two spaces"
    ids = tokenizers.encode(ours, [text])[0]
    np.testing.assert_array_equal(ids, theirs(text)["input_ids"])
    assert theirs.decode(ids) == text
    assert theirs.eos_token == tokenizers.EOS and theirs.eos_token_id == ours.eos_token_id
    assert ours.pad_token_id != ours.eos_token_id
    assert len(ours) <= 320 and tokenizers.vocab_size(ours) <= 320


def test_training_learns_merges(trained):
    ours, _ = trained
    assert len(tokenizers.encode(ours, [TEXTS[0]])[0]) < len(TEXTS[0]) / 2


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


def test_special_text_inside_a_record_is_ordinary_text(trained):
    ours, _ = trained
    ids = tokenizers.encode(ours, [f"a{tokenizers.EOS}b{tokenizers.PAD}"])[0]
    assert ours.eos_token_id not in ids and ours.pad_token_id not in ids
    assert ours.decode(ids) == f"a{tokenizers.EOS}b{tokenizers.PAD}"


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
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 0, tokenizers.EOS: 1} | {f"zz{i}": i + 2 for i in range(60)}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=tokenizers.EOS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tell the words of a sentence apart"):
        tokenizers.load(tmp_path)


def test_load_refuses_a_tokenizer_without_eos(trained, tmp_path):
    ours, _ = trained
    transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have an EOS token"):
        tokenizers.load(tmp_path)


def test_load_gives_pad_its_own_token(trained, tmp_path):
    """Many published GPT-2 fine-tunes set PAD to EOS."""
    ours, _ = trained
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.backend_tokenizer, eos_token=tokenizers.EOS, pad_token=tokenizers.EOS
    ).save_pretrained(tmp_path)
    loaded = tokenizers.load(tmp_path)
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert loaded.eos_token_id == ours.eos_token_id


def test_start_is_bos_only_where_the_family_writes_one(trained, tmp_path):
    ours, directory = trained
    assert tokenizers.start(ours) == []
    from tokenizers import processors

    with_bos = transformers.AutoTokenizer.from_pretrained(directory)
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizers.EOS} $A", special_tokens=[(tokenizers.EOS, ours.eos_token_id)]
    )
    with_bos.save_pretrained(tmp_path)
    assert tokenizers.start(tokenizers.load(tmp_path)) == [ours.eos_token_id]


def test_gpt2_vocabulary(shared_data):
    gpt2 = tokenizers.load(shared_data / "gpt2_bpe")
    # The ids published with GPT-2 for this sentence.
    np.testing.assert_array_equal(tokenizers.encode(gpt2, ["Hello world, how are you?"])[0],
                                  [15496, 995, 11, 703, 389, 345, 30])  # fmt: skip
    assert gpt2.eos_token_id == 50256 and tokenizers.vocab_size(gpt2) == 50257
    assert gpt2.pad_token_id == 50257
    assert tokenizers.start(gpt2) == []
