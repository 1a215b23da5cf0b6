"""The ids of what a chat template wrote: those of `apply_chat_template`, but for special tokens inside a message."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

from instructgpt_jax.data.chats import Rendered

_Ids = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, and where each begins and ends in the text


class Encoder:
    """Ids of rendered texts. Nothing changes it once it is built.

    A text is encoded as a whole, since letters merge across the border of a template's words and a message's. Only one
    that holds a special token's text in a message is cut, at the special tokens that are the template's: so every
    tokenizer cuts its texts before it encodes what lies between.

    Args:
      backend: of the tokenizer; not changed.
      special: (ids,) bool, ids that no message has.
      spelled: ids of ordinary text -> the same with special tokens that its letters were merged to spelled out, and the
        place in the input that each id came from.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: np.ndarray,
        spelled: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ):
        self._special, self._spelled = special, spelled
        content = json.loads(backend.to_str())
        content["post_processor"] = None  # it would trim the places of the ids
        self._whole, self._whole_text = _backends(content)
        later = json.loads(json.dumps(content).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
        self._later, self._later_text = (self._whole, self._whole_text) if later == content else _backends(later)

    def encode(self, texts: Sequence[Rendered]) -> list[np.ndarray]:
        """The ids of each text behind what it skips, (length,) int32."""
        found = []
        for text, (ids, starts, ends) in zip(texts, self._encode(texts), strict=True):
            if np.any((starts < text.skip) & (ends > text.skip)):  # merged with the prompt's last letters
                ids, _, _ = self._rest(text)
            else:
                ids = ids[starts >= text.skip]
            found.append(ids)
        return found

    def encode_dialogues(self, texts: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids of each text, (length,) int32, and which of them are loss tokens, (length,) bool."""
        found = []
        for text, (ids, starts, _) in zip(texts, self._encode(texts), strict=True):
            loss = np.zeros(len(ids), bool)
            for first, last in text.loss:
                loss |= (starts >= first) & (starts < last)
            found.append((ids, loss))
        return found

    def _encode(self, texts: Sequence[Rendered]) -> list[_Ids]:
        plain = [number for number, text in enumerate(texts) if not text.ordinary]
        batch = self._whole.encode_batch([texts[number].text for number in plain], add_special_tokens=False)
        found = {number: _arrays(encoding) for number, encoding in zip(plain, batch, strict=True)}
        return [
            found[number] if number in found else self._cut(text, self._whole, self._whole_text)
            for number, text in enumerate(texts)
        ]

    def _rest(self, text: Rendered) -> _Ids:
        """What stands behind the skipped part, encoded by itself."""
        ordinary = tuple((a - text.skip, b - text.skip) for a, b in text.ordinary if a >= text.skip)
        return self._cut(Rendered(text.text[text.skip :], ordinary), self._later, self._later_text)

    def _cut(self, text: Rendered, backend: tokenizers.Tokenizer, first: tokenizers.Tokenizer) -> _Ids:
        """One text in pieces; `first` encodes a piece that stands at its beginning."""
        masked = text.text
        for start, end in text.ordinary:  # letters that are no special token
            masked = masked[:start] + "x" * (end - start) + masked[end:]
        ids, starts, ends = _arrays(backend.encode(masked, add_special_tokens=False))
        pieces, place = [], 0

        def between(stop: int) -> None:
            if place < stop:
                encoder = self._later_text if place else first
                piece = _arrays(encoder.encode(text.text[place:stop], add_special_tokens=False))
                spelled, came_from = self._spelled(piece[0])
                pieces.append((spelled, piece[1][came_from] + place, piece[2][came_from] + place))

        for number in np.flatnonzero(self._special[ids]):
            between(int(starts[number]))
            pieces.append((ids[number : number + 1], starts[number : number + 1], ends[number : number + 1]))
            place = int(ends[number])
        between(len(text.text))
        ids, starts, ends = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return ids.astype(np.int32), starts, ends


def _backends(content: dict) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """One that knows special tokens by their text, and one to which it is ordinary text."""
    made = [tokenizers.Tokenizer.from_str(json.dumps(content)) for _ in range(2)]
    made[1].encode_special_tokens = True
    return made[0], made[1]


def _arrays(encoding: tokenizers.Encoding) -> _Ids:
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), places[:, 0], places[:, 1]
