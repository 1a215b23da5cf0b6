"""Tokenizers: loading one that can be trusted, training one, and encoding many texts at once.

Everything downstream sees ids only. Three conventions hold everywhere:

* EOS ends a pretraining document, and a demonstration and a completion too where no chat template ends them with
  another token (`end_id`). Both are tokens the models learn to write.
* Our models never read PAD: the empty part of a row is `segments == 0`, with token 0. A tokenizer without a PAD token
  gets one where an export needs it, and nowhere else.
* The text of a special token inside a record (a literal "<|endoftext|>" in a crawled page) is ordinary text: it is
  encoded piece by piece and cannot end a sequence. Only BOS at the very beginning of a prompt is BOS, and what a chat
  template writes itself (data/templates.py) are the tokens that it means.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
import transformers

from instructgpt_jax import paths
from instructgpt_jax.data import chats, end_tokens, rendered, templates

EOS = "<|endoftext|>"
PAD = "<|pad|>"
_SENTENCE = "The quick brown fox jumps over the lazy dog."
_SMALLEST = 32  # ids; no alphabet worth training on is smaller, an unfilled vocabulary is


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Nothing changes it once it is built, so calls in any order, from any thread, agree.

    Attributes:
      start: ids that stand before every sequence: BOS for families that were trained with one (Llama), else none.
      bos: the text of that BOS; "" where there is none.
      eos_id: the id that ends a pretraining document.
      end_id: the id that ends a demonstration and a completion: the template's for the assistant's turn, else EOS.
      end_ids: any of these ends a response, `end_id` among them; sorted.
      chat: the template that prompts and dialogues are written by; None = they are texts.
      pad: the text of a token that is PAD and nothing else; "" where there is none.
      vocab_size: one more than the largest id that text or EOS can have: what a model must hold. A PAD may lie above.
      hash: hexadecimal digest of everything that says which ids a text has, and which text ids have. Equal tokenizers
        have the same, wherever they come from.
      text_hash: the same of plain text alone, which no template changes: of the ids of pretraining documents.
    """

    start: tuple[int, ...]
    bos: str
    eos_id: int
    end_id: int
    end_ids: tuple[int, ...]
    chat: templates.Template | None
    pad: str
    vocab_size: int
    hash: str
    text_hash: str
    _backend: tokenizers.Tokenizer
    _pretrained: transformers.PreTrainedTokenizerFast  # to be saved or copied; whoever calls it changes its backend
    _known: np.ndarray  # (ids,) bool, whether a token has the id
    _special: np.ndarray  # (ids,) bool, whether it is one that no text has

    def __eq__(self, other) -> bool:
        return isinstance(other, Tokenizer) and (self.hash, self.end_ids) == (other.hash, other.end_ids)

    def __hash__(self) -> int:
        return hash(self.hash)

    def prompt(self, prompt: chats.Prompt) -> str | templates.Rendered:
        """What `encode_prompts` takes of a prompt: its text, or what the template writes of it.

        Raises:
          ValueError: messages without a template, or that the template refuses.
        """
        if not isinstance(prompt, str):
            self.check_messages()
        return self.chat.prompt(prompt) if self.chat else prompt

    def answer(self, prompt: chats.Prompt, text: str, ended: bool = True) -> str | templates.Rendered:
        """What `encode` takes of an answer to a prompt; the token that ends it, where it `ended`, is not in it."""
        return self.chat.answer(prompt, text, ended) if self.chat else text

    def dialogue(self, messages: list[dict]) -> templates.Rendered:
        """What `encode_dialogues` takes of a whole dialogue, see `prompt`."""
        self.check_messages()
        return self.chat.dialogue(messages)

    def check_messages(self) -> None:
        """Refuses messages where no template says how they are written."""
        if not self.chat:
            raise ValueError(
                "messages need a chat template: --config.data.template=chat for the tokenizer's own, human_assistant, "
                "or a Jinja file"
            )

    def encode_dialogues(self, texts: Sequence[templates.Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of whole dialogues, (length,) int32, and which are loss tokens, (length,) bool.

        Behind the last of the assistant's turns stands `end_id` and nothing else.
        """
        found = []
        for ids, loss in self._encoder.encode_dialogues(texts):
            last = 1 + int(np.flatnonzero(loss).max(initial=0))
            ids, loss = ids[:last], loss[:last]
            if ids[-1] != self.end_id:
                ids, loss = np.append(ids, np.int32(self.end_id)), np.append(loss, True)
            start = self._start_of_chat
            found.append((np.concatenate([start, ids]), np.concatenate([np.zeros(len(start), bool), loss])))
        return found

    def encode(self, texts: Sequence[str | templates.Rendered]) -> list[np.ndarray]:
        """The ids of each text, (length,) int32, without special tokens; the whole list on all cores at once.

        Special tokens that a template wrote are there.

        Args:
          texts: all of them texts, or all of them rendered.

        Raises:
          ValueError: the text of a special token that the tokenizer has no other ids for.
        """
        if texts and isinstance(texts[0], templates.Rendered):
            return self._encoder.encode(texts)
        # Not by the wrapper of transformers: its offsets and masks cost a third of the time and nobody reads them.
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._ordinary(np.array(encoding.ids, np.int32)) for encoding in encodings]

    def encode_prompts(self, texts: Sequence[str | templates.Rendered]) -> list[np.ndarray]:
        """The ids of each text as the beginning of a sequence, (length,) int32: `start`, then the text's own.

        A text that begins with the text of BOS has it once. A chat template writes BOS itself or does not want it.
        """
        if texts and isinstance(texts[0], templates.Rendered):
            return [np.concatenate([self._start_of_chat, ids]) for ids in self.encode(texts)]
        start = np.array(self.start, np.int32)
        return [np.concatenate([start, ids]) for ids in self.encode([text.removeprefix(self.bos) for text in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, that of special tokens among it.

        Raises:
          ValueError: an id that no token has.
        """
        ids = np.asarray(ids, np.int64)
        wrong = [int(i) for i in ids if not 0 <= i < len(self._known) or not self._known[i]]
        if wrong:
            raise ValueError(f"ids must be of the tokenizer's {self.vocab_size}, got {wrong[:10]}, which no token has")
        return self._backend.decode(ids.tolist(), skip_special_tokens=False)

    def text_of(self, ids: np.ndarray) -> tuple[str, bool]:
        """The text of a response, without the token that ends it, and whether there is one.

        With a template it is the content of a message.
        """
        ended = len(ids) > 0 and int(ids[-1]) in self.end_ids
        text = self.decode(ids[:-1] if ended else ids)
        return self.chat.content_of(text) if self.chat else text, ended

    def allowed(self, size: int) -> np.ndarray | None:
        """Which of the `size` ids of a model may be sampled: (size,) bool, those below `vocab_size` that a token has.

        None where that is all of them, as it is where model and tokenizer were made for each other.
        """
        allowed = np.zeros(size, bool)
        allowed[: self.vocab_size] = self._known[: self.vocab_size]
        return None if allowed.all() else allowed

    def vocabulary(self) -> dict[str, int]:
        """The id of every token."""
        return self._backend.get_vocab()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes it where `load` and AutoTokenizer find it, with its end tokens and its template."""
        self._pretrained.save_pretrained(os.fspath(directory))
        if self.end_ids != (self.eos_id,):
            content = json.dumps({"eos_token_id": self.ends}, indent=2) + "\n"
            (pathlib.Path(directory) / end_tokens.GENERATION).write_text(content)

    def pretrained(self, pad: bool) -> transformers.PreTrainedTokenizerFast:
        """A copy for an export. Where PAD is no token of its own, EOS stands for it, or with `pad` a token is added.

        A model need not hold the id of the added token.
        """
        made = copy.deepcopy(self._pretrained)
        if pad and made.pad_token_id in (None, made.eos_token_id):
            made.add_special_tokens({"pad_token": PAD})
        elif made.pad_token_id is None:
            made.pad_token = made.eos_token
        return made

    @property
    def ends(self) -> list[int]:
        """`end_ids` as generation_config.json has them: the first is what texts end with."""
        return sorted(self.end_ids, key=lambda i: i != self.end_id)

    @property
    def _start_of_chat(self) -> np.ndarray:
        """BOS, where no program that came with a checkpoint says whether it is there."""
        return np.array(self.start if self.chat and self.chat.name == chats.HUMAN_ASSISTANT else (), np.int32)

    @functools.cached_property
    def _encoder(self) -> rendered.Encoder:
        return rendered.Encoder(self._backend, self._special, self._spelled)

    def _ordinary(self, ids: np.ndarray) -> np.ndarray:
        """The ids of a text, with special tokens that its letters were merged to spelled out again."""
        return self._spelled(ids)[0] if self._special[ids].any() else ids

    def _spelled(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `_ordinary`, and the place in `ids` that each came from."""
        parts = [self._spell(int(i)) if found else [i] for i, found in zip(ids, self._special[ids], strict=True)]
        places = np.repeat(np.arange(len(ids)), [len(part) for part in parts])
        return np.concatenate([*parts, []]).astype(np.int32), places

    def _spell(self, special: int) -> list[int]:
        """The ids of the text of a special token, letter by letter."""
        text = self._backend.id_to_token(special)
        letters = [[token.id for token in self._backend.model.tokenize(letter)] for letter in text]
        spelled = [i for ids in letters for i in ids]
        if not all(letters) or self._special[spelled].any():
            raise ValueError(f"a text must not hold {text!r}: the tokenizer can write it as a special token only")
        return spelled


def load(name_or_directory: str | os.PathLike, chat: chats.Chat | None = None) -> Tokenizer:
    """A tokenizer from a directory or a Hugging Face Hub id.

    A directory needs `tokenizer.json`, or the `vocab.json` and `merges.txt` of GPT-2's byte-level BPE.

    Args:
      chat: how dialogues are written and responses end; None = as the run that the directory is of has it, without a
        template where it is of none.

    Raises:
      ValueError: the tokenizer cannot be read or fetched, is slow, nearly empty, has no EOS, or gives a sentence fewer
        than two different tokens, as some releases do silently when they find no vocabulary; a template that cannot
        be read or does not write dialogues; an end token that the tokenizer does not have.
    """
    name = paths.expand(name_or_directory)
    if "://" in name:  # transformers reads local files only
        with tempfile.TemporaryDirectory() as folder:
            paths.copy_folder(name, folder, last="tokenizer.json")
            return load(folder, chat)
    directory = pathlib.Path(name)
    bare = (directory / "vocab.json").is_file() and not (directory / "tokenizer.json").is_file()
    try:
        if bare and not (directory / "tokenizer_config.json").is_file():
            # AutoTokenizer asks a model's config.json for the class, which a bare vocabulary does not have.
            pretrained = transformers.GPT2TokenizerFast.from_pretrained(name)
        else:
            pretrained = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:  # OSError, ValueError, and of a damaged file whatever the reader in Rust says
        raise ValueError(
            "config.data.tokenizer must be a directory with a fast tokenizer, or a Hub id that can be fetched from "
            f"here, got {name!r}: {' '.join(str(error).split())}"
        ) from error
    _check(pretrained, name)
    return _build(pretrained, chat or chats.kept(name) or chats.Chat(""), name)


def _build(pretrained: transformers.PreTrainedTokenizerFast, chat: chats.Chat, name: str) -> Tokenizer:
    """The tokenizer around a backend of its own, which the calls of `pretrained` cannot change."""
    backend = tokenizers.Tokenizer.from_str(pretrained.backend_tokenizer.to_str())
    backend.no_truncation()  # files of some models bring both, and texts are cut without a word
    backend.no_padding()
    backend.encode_special_tokens = True
    eos, bos, pad = pretrained.eos_token_id, pretrained.bos_token_id, pretrained.pad_token_id
    start = (bos,) if bos is not None and backend.encode(_SENTENCE).ids[0] == bos else ()
    # What letters without an id become is in texts, even where it is called special: the unknown token, and bytes.
    names = [pretrained.unk_token, getattr(backend.model, "unk_token", None)]
    names += [f"<0x{byte:02X}>" for byte in range(256)] if getattr(backend.model, "byte_fallback", False) else []
    unknown = {backend.token_to_id(name) for name in names if name}
    added = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special = (added | {bos, pad}) - unknown - {None} | {eos}
    content = [backend.to_str(), start, eos, sorted(special)]

    ids = set(backend.get_vocab().values())
    ordinary = backend.get_added_tokens_decoder().keys() - special
    texts = [[backend.id_to_token(i) for i in found] for found in (special, ordinary)]
    template = templates.make(chat, pretrained, name, *texts) if chat.template else None
    of_template, of_checkpoint = template.end if template else "", end_tokens.of_checkpoint(name)
    end_id, end_ids = end_tokens.settle(backend, chat.end_tokens, of_template, eos, of_checkpoint)
    if meant := ordinary & set(end_ids):  # the file calls them ordinary, but no message may end its own turn
        raw = json.loads(backend.to_str())
        for token in raw["added_tokens"]:
            token["special"] |= token["id"] in meant
        backend, special = tokenizers.Tokenizer.from_str(json.dumps(raw)), special | meant
        backend.encode_special_tokens = True
        content.append(sorted(meant))
    text_hash = _digest(content)
    if template or end_id != eos:
        content += [template.jinja if template else "", end_id]
    only_pad = {pad} - unknown - {None, eos, bos, *end_ids}  # many published tokenizers pad with another token
    known, is_special = np.zeros((2, 1 + max(ids)), bool)
    known[list(ids)], is_special[list(special)] = True, True
    return Tokenizer(
        start=start,
        bos=pretrained.bos_token if start else "",
        eos_id=eos,
        end_id=end_id,
        end_ids=end_ids,
        chat=template,
        pad=pretrained.pad_token if only_pad else "",
        vocab_size=1 + max(ids - only_pad),
        hash=_digest(content),
        text_hash=text_hash,
        _backend=backend,
        _pretrained=pretrained,
        _known=known,
        _special=is_special,
    )


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check(tokenizer: transformers.PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"config.data.tokenizer must be a fast tokenizer, got {type(tokenizer).__name__} from {name!r}"
        )
    if len(tokenizer) < _SMALLEST:
        raise ValueError(
            f"config.data.tokenizer must have at least {_SMALLEST} tokens, got {len(tokenizer)} from {name!r}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"config.data.tokenizer must have an EOS token, got none from {name!r}")
    ids = tokenizer.backend_tokenizer.encode(_SENTENCE, add_special_tokens=False).ids
    if len(set(ids)) < 2:
        raise ValueError(
            f"config.data.tokenizer must tell the words of a sentence apart, got {ids} for {_SENTENCE!r} from {name!r}"
        )


def train(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Tokenizer:
    """Trains a byte-level BPE (Radford et al. 2019, section 2.2) and saves it where `load` and AutoTokenizer find it.

    The same texts in the same order give the same file, whatever the number of threads.

    Args:
      texts: the training text.
      vocab_size: number of ids, with EOS, PAD and the 256 bytes among them.
      directory: where `tokenizer.json` and `tokenizer_config.json` go.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and the two special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes, EOS, PAD), got {vocab_size!r}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    fast.save_pretrained(paths.expand(directory))
    return load(directory)
