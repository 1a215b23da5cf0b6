"""Log-probabilities of endings behind contexts: packed rows, in which a context that endings share is read once.

A benchmark asks for the log-probability of each of several endings behind one context. A segment of a row is that
context without its last token, and behind it a branch for each ending: the last token of the context again, then the
ending without its own last token. So every token of an ending is predicted by a column of its own branch. A branch
sees the context and itself (models/attention.py), and its positions go on from the context's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from instructgpt_jax import models
from instructgpt_jax.data import packing, padding
from instructgpt_jax.models import ModelConfig
from instructgpt_jax.sharding import constrain

OPEN_ROWS = 512  # that a context may still go to while rows are packed
TOKENS = 512  # whose logits exist at a time, of all rows together
AHEAD = 4  # batches that are computed while the host reads the results of an earlier one

Request = tuple[Sequence[int], Sequence[int]]  # the ids of a context and of its ending, at least one each


class Shared(NamedTuple):
    """A context with its endings.

    prompt: (length,) int32, the context without its last token; empty where nothing is shared.
    last: that token.
    endings: (length,) int32 each.
    places: of the requests in their list.
    """

    prompt: np.ndarray
    last: int
    endings: list[np.ndarray]
    places: list[int]


class Batch(NamedTuple):
    """Rows that go through the network together.

    rows: `tokens`, `positions`, `segments`, `branches` (B, T) int32; `columns` (B, T) int32, in which columns of its
      row endings are predicted, these first; `targets` (B, T) int32, what column is to be predicted there; `counts`
      (B,) int32, how many of a row there are.
    where: (place of a request, row, first, length): where its results stand in (B, T).
    """

    rows: dict[str, np.ndarray]
    where: list[tuple[int, int, int, int]]


def share(requests: Sequence[Request], max_length: int) -> tuple[list[Shared], int]:
    """Requests with the same context together, and how many contexts were cut.

    A context is cut from the left, as lm-evaluation-harness does, where it and its ending but for its last token have
    more than `max_length` tokens.

    Raises:
      ValueError: an ending without a token, or longer than `max_length`; a context without a token.
    """
    found: dict[tuple, Shared] = {}
    cut = 0
    for place, (context, ending) in enumerate(requests):
        if not context or not 1 <= len(ending) <= max_length:
            raise ValueError(
                f"request {place} must have a context of at least one token and an ending of 1 to {max_length} (the "
                f"model's context), got {len(context)} and {len(ending)} tokens"
            )
        kept = tuple(context[-(max_length + 1 - len(ending)) :])
        cut += len(kept) < len(context)
        key = kept if len(kept) > 1 else (place, None)  # one token is not worth sharing
        if key not in found:
            found[key] = Shared(np.array(kept[:-1], np.int32), kept[-1], [], [])
        found[key].endings.append(np.array(ending, np.int32))
        found[key].places.append(place)
    return list(found.values()), cut


def batches(groups: Sequence[Shared], row_length: int, rows: int, mesh: Mesh) -> Iterator[Batch]:
    """The rows of all contexts, the longest first.

    Args:
      row_length: T of contexts that fit; longer ones have rows of twice, four times … as many tokens.
      rows: B of such a batch; of longer rows as many as have the same tokens.
    """
    pieces: dict[int, list[tuple[Shared, list[int], int]]] = {}  # width -> (context, numbers of endings, tokens)
    for group in groups:
        lengths, width = [len(ending) for ending in group.endings], row_length
        while width < len(group.prompt) + max(lengths):
            width *= 2
        for piece in packing.split_comparison(len(group.prompt), lengths, width, shared_prompt=True):
            size = len(group.prompt) + sum(lengths[k] for k in piece)
            pieces.setdefault(width, []).append((group, piece, size))
    for width in sorted(pieces, reverse=True):
        B = padding.rows(max(1, rows * row_length // width), mesh)
        ordered = sorted(pieces[width], key=lambda piece: -piece[2])
        packed = list(packing.first_fit((size for *_, size in ordered), width, min(len(ordered), OPEN_ROWS)))
        for part in padding.cuts(len(packed), B):
            yield _lay([[ordered[number] for number in row] for row in packed[part]], B, width)


def _lay(packed: list[list[tuple[Shared, list[int], int]]], B: int, T: int) -> Batch:
    """Pieces in their rows, and where their endings are predicted."""
    rows = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "segments", "branches")}
    rows |= {"columns": np.zeros((B, T), np.int32), "targets": np.zeros((B, T), np.int32)}
    rows["counts"], where = np.zeros(B, np.int32), []
    for row, inside in enumerate(packed):
        column = 0
        for segment, (group, numbers, size) in enumerate(inside, 1):
            P = len(group.prompt)
            rows["segments"][row, column : column + size] = segment
            rows["tokens"][row, column : column + P] = group.prompt
            rows["positions"][row, column : column + P] = np.arange(P)
            column += P
            for branch, number in enumerate(numbers, 1):
                ending, first = group.endings[number], rows["counts"][row]
                n = len(ending)
                here, wanted = slice(column, column + n), slice(first, first + n)
                rows["tokens"][row, here] = [group.last, *ending[:-1]]
                rows["positions"][row, here] = np.arange(P, P + n)
                rows["branches"][row, here] = branch
                rows["columns"][row, wanted] = np.arange(column, column + n)
                rows["targets"][row, wanted] = ending
                rows["counts"][row] += n
                where.append((group.places[number], row, int(first), n))
                column += n
    return Batch(rows, where)


def ending_logprobs(network: ModelConfig, params: dict, rows: dict) -> tuple[jax.Array, jax.Array]:
    """The log-probability of every target, and whether it is the likeliest token there.

    Args:
      network, params: a language model.
      rows: see Batch.

    Returns:
      (B, T) float32 and (B, T) bool in the order of `columns`, whole on every device; past `counts` 0 and False.
    """
    chex.assert_equal_shape([rows[name] for name in ("tokens", "positions", "segments", "branches", "columns")])
    hidden = models.hidden(network, params, *(rows[name] for name in ("tokens", "positions", "segments", "branches")))
    hidden = jnp.take_along_axis(hidden, rows["columns"][..., None], axis=1)  # stays in its row, and so on its device
    (B, T), targets = rows["tokens"].shape, rows["targets"]
    chunk = min(T, max(1, TOKENS // B))

    def one(i, found):
        h, y = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (hidden, targets))
        logits = models.project(network, params, h)  # (B, chunk, V)
        is_target = jnp.arange(logits.shape[-1]) == y[..., None]
        logprobs = jnp.where(is_target, logits, 0.0).sum(axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        new = logprobs, jnp.argmax(logits, axis=-1) == y
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, part, i * chunk, 1) for x, part in zip(found, new, strict=True)
        )

    trips = (rows["counts"].max() + chunk - 1) // chunk
    found = jax.lax.fori_loop(0, trips, one, (jnp.zeros((B, T)), jnp.zeros((B, T), bool)))
    wanted = jnp.arange(T) < rows["counts"][:, None]
    return tuple(constrain(jnp.where(wanted, x, jnp.zeros((), x.dtype)), None, None) for x in found)


def score(
    program: Callable[[dict], tuple[jax.Array, jax.Array]],
    requests: Sequence[Request],
    max_length: int,
    row_length: int,
    rows: int,
    mesh: Mesh,
) -> tuple[list[tuple[float, bool]], int]:
    """(summed log-probability, whether greedy decoding gives it) of each ending, and how many contexts were cut.

    Args:
      program: `ending_logprobs` of rows on the mesh.
      requests, max_length: see `share`.
      row_length, rows: see `batches`.
    """
    groups, cut = share(requests, max_length)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    running: list[tuple[list, tuple[jax.Array, jax.Array]]] = []

    def read(count: int) -> None:
        while len(running) > count:
            where, results = running.pop(0)
            logprobs, greedy = jax.device_get(results)
            for place, row, first, n in where:
                inside = row, slice(first, first + n)
                found[place] = float(logprobs[inside].sum(dtype=np.float64)), bool(greedy[inside].all())

    for batch in batches(groups, row_length, rows, mesh):
        running.append((batch.where, program(padding.put(batch.rows, mesh))))
        read(AHEAD)
    read(0)
    return found, cut
