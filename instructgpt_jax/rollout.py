"""Sampling: prompts wait in a queue, slots answer them token by token, and a slot that is free takes the next prompt.

All of it is one program. A few prompts at a time go through the network by chunks, onto a *tray*; from there each is
copied into a slot of the *pool* as soon as one is free, once for every answer that is wanted. A step runs the last
token of every slot through the network and samples the next. All slots write at one column, the *clock*: a prompt is
copied so that it ends just before it, and what lies further back is EMPTY. So a write is one aligned slice, a slot's
tokens are the last ones before the clock, and attention reads the last half or quarter of the columns while the longest
slot fits into it. Each size of read is a loop of its own, in which the network is compiled once more.

Responses are sampled from the full softmax at a temperature unless told otherwise, and the log-probability of each
sampled token is kept: for PPO these are `old_logprobs`. The key of a token is (seed, iteration, episode, position) and
nothing else, so that a response does not depend on the slot, the order or the mesh that computed it: where sums are
taken in the same order its tokens are the same bits, elsewhere its log-probabilities agree to rounding.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from instructgpt_jax import models
from instructgpt_jax.models import Cache, ModelConfig, adapters, attention, quantised, sample
from instructgpt_jax.sharding import BATCH, ROLLOUT_RULES, batch_shards, constrain, constrain_params

PREFILL_CHUNK = 64  # columns of a prompt that go through the network at once
TRAY = 8  # prompts that go through it together: an eighth of the pool, and at least so many
READS, FEW_READS, PREFILL_READS = 3, 1, 1  # sizes of reads: of all slots, of the last (mostly the longest), of prompts
SPARE = 1  # columns of a cache that no read has: XLA's CPU compiler would copy what is read whole, at every step
TAIL, LONG = 4, 128  # the last of answers that may be so long go on in this part of the slots, as soon as they fit


class Rollout(NamedTuple):
    """Sampled responses, right-padded.

    tokens: (B, R) int32, 0 after the end.
    logprobs: (B, R) float32, of each token under the full distribution at the sampling temperature (at 1 when greedy),
      even where top-k or top-p narrowed the choice; 0 after the end.
    mask: (B, R) bool, True up to the end, the end-of-text token included.
    """

    tokens: jax.Array
    logprobs: jax.Array
    mask: jax.Array


class Run(NamedTuple):
    """What stays the same over a run; arrays but the parameters are whole on every device.

    params: as models.unstack makes them.
    prompts, lengths: (P, Q) and (P,) int32.
    counts: (P,) int32, responses to each prompt, in rows that follow one another.
    owners: (B,) int32, the prompt of each row.
    order: (P,) int32, the numbers of the prompts in the order in which they are taken.
    waiting: () int32, how many of these have responses to come.
    limits: (B,) int32, tokens of each response at most.
    max_new_tokens: R.
    choose: (hidden states (b, D), rows of the rollout (b,), positions (b,)) -> tokens, logprobs (b,).
    ended: tokens (b,) -> (b,) bool.
    shards: of the batch on the mesh; slots and tray are split among them, and a prompt stays on its shard.
    """

    config: ModelConfig
    params: dict
    prompts: jax.Array
    lengths: jax.Array
    counts: jax.Array
    owners: jax.Array
    order: jax.Array
    waiting: jax.Array
    limits: jax.Array
    max_new_tokens: int
    choose: Callable
    ended: Callable
    shards: int


class Pool(NamedTuple):
    """b slots; all but the cache whole on every device.

    cache: (b, M, S, H) of everything but each slot's last token.
    clock: () int32, the column that the last tokens go to.
    tokens, positions: (b,) int32, the last token of each slot, and where it stands; position -1 = the slot is free.
    rows: (b,) int32, which response each slot writes.
    """

    cache: Cache
    clock: jax.Array
    tokens: jax.Array
    positions: jax.Array
    rows: jax.Array


class Tray(NamedTuple):
    """g prompts without their last token, which end at the last column of their cache.

    cache: (g, M, Q', H).
    prompts: (g,) int32, numbers.
    left: (g,) int32, answers to each that have no slot yet.
    """

    cache: Cache
    prompts: jax.Array
    left: jax.Array


class Sampling(NamedTuple):
    """The state of the loop; `taken` () int32 prompts have left the queue."""

    pool: Pool
    tray: Tray
    taken: jax.Array
    rollout: Rollout


def generate(
    config: ModelConfig,
    params: dict,
    prompts: jax.Array,
    lengths: jax.Array,
    max_new_tokens: int,
    seed: int | jax.Array,
    temperature: float = 1.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | tuple[int, ...] | None = None,
    iteration: int | jax.Array = 0,
    episodes: jax.Array | None = None,
    wave: int | None = None,
    allowed: np.ndarray | None = None,
    answers: int | jax.Array = 1,
    limits: jax.Array | None = None,
) -> Rollout:
    """Samples responses to prompts.

    Args:
      config, params: a language model, its parameters as trained (stacked, float32).
      prompts: (P, Q) int32, right-padded with anything.
      lengths: (P,) int32 in [1, Q].
      max_new_tokens: R.
      seed, iteration: with the episode and the position, the key of every token; ints, or () arrays.
      temperature: divides the logits; 0 = greedy.
      top_k: sample among the k likeliest tokens; 0 = all.
      top_p: sample among the likeliest tokens that together hold this much probability; 1 = all.
      eos_id: the token that ends a response, or several, any of which does; None = every response has R tokens.
      episodes: (B,) int32, the identity of each response for its keys; 0 … B-1 by default.
      wave: slots, of which each answers one prompt at a time: bounds the cache. The shortest prompts are taken first,
        so that prompts of one length are read together. None = a slot for each of the B responses.
      allowed: (V,) bool, the ids that may be sampled, for a vocabulary with ids that no token has: the distribution,
        log-probabilities included, is over these alone. None = all.
      answers: K, responses to each prompt, which is read once for all of them; or (P,) int32, how many to which, all
        of them at most as many as `episodes` has rows.
      limits: (B,) int32 in [1, R], the tokens that each response may have; None = R.

    Returns:
      B = P · K responses, those to one prompt one after another; rows that no prompt has are empty.

    Raises:
      ValueError: an empty range, or a context too short.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    if allowed is not None:
        chex.assert_shape(allowed, (config.vocab_size,))
    (P, Q), mesh = prompts.shape, jax.sharding.get_abstract_mesh()
    for name, value in {"max_new_tokens": max_new_tokens, "answers": answers, "rollout.wave": wave}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.positions == "learned" and Q + max_new_tokens > config.max_length:
        raise ValueError(
            f"prompt and response must fit the context of {config.max_length}, got {Q} + {max_new_tokens} tokens "
            f"(beside such prompts at most {max(config.max_length - Q, 0)} fit)"
        )
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "temperature, top_k and top_p must be at least 0, at least 0 and in (0, 1], "
            f"got {temperature}, {top_k} and {top_p}"
        )
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    shards = 1 if mesh.empty else batch_shards(mesh)
    episodes = jnp.arange(P * answers) if episodes is None else episodes
    counts = jnp.broadcast_to(answers, P)
    prompts, lengths, episodes, counts = _whole(jax.tree.map(jnp.asarray, (prompts, lengths, episodes, counts)))
    if config.dtype == "float32" and adapters.has_adapter(params) and not quantised.found(params):
        # Once for all tokens. In bfloat16 the sum would round to the base wherever the change is below 1/256 of it:
        # there the adapter stays beside its kernel. And the sum of a quantised kernel would take its full memory.
        params = adapters.merged(params)
    params = models.unstack(config, constrain_params(models.cast(params, config.dtype), ROLLOUT_RULES))

    def choose(hidden, rows, positions):
        logits = models.project(config, params, hidden)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        keys = jax.vmap(lambda episode, position: jax.random.fold_in(jax.random.fold_in(key, episode), position))
        return sample(logits, keys(episodes[rows], positions), temperature, top_k, top_p)

    def ended(tokens):
        return jnp.zeros(tokens.shape, bool) if eos_id is None else jnp.isin(tokens, jnp.array(eos_id))

    B, asked = len(episodes), counts > 0
    owners = jnp.repeat(jnp.arange(P), counts, total_repeat_length=B)
    order = jnp.argsort(jnp.where(asked, lengths, Q + 1), stable=True)
    limits = _whole(jnp.full(B, max_new_tokens) if limits is None else jnp.asarray(limits))
    queue = prompts, lengths, counts, owners, order, asked.sum(), limits
    slots = B if wave is None else min(wave, _up(B, shards))
    return _run(Run(config, params, *queue, max_new_tokens, choose, ended, shards), slots)


def _run(run: Run, slots: int) -> Rollout:
    """Answers all prompts with a pool of so many slots."""
    D, C, (P, Q), R = run.shards, min(PREFILL_CHUNK, run.prompts.shape[1]), run.prompts.shape, run.max_new_tokens
    B, width = len(run.owners), _up(max(Q - 1, 1), C)
    refills = B > slots or D > 1  # some may wait for a slot
    tray = min(_up(P, D), _up(max(TRAY, -(-slots // TRAY)), D))
    free, empty = jnp.zeros(slots, jnp.int32), jnp.zeros(tray, jnp.int32)
    cache = functools.partial(models.init_cache, run.config)
    state = Sampling(
        Pool(cache(slots, width + R + SPARE), *_whole((jnp.int32(width), free, free - 1, free))),
        Tray(cache(tray, width + SPARE), *_whole((empty, empty))),
        jnp.int32(0),
        _whole(Rollout(*(jnp.zeros((B, R), dtype) for dtype in (jnp.int32, jnp.float32, bool)))),
    )
    few = slots // D // TAIL * D if R >= LONG and slots // D >= 2 * TAIL else 0

    def many(state):  # as many as ask for the whole pool
        waiting = (state.taken < run.waiting) | (state.tray.left.sum() > 0)
        return waiting | (jnp.sum(~_supply(run, state)[0], axis=1).max() > few // D)

    def decodes(fewest, most, state):
        """Whether a step is next, and the longest slot has more than `fewest` and at most `most` columns with it."""
        prefills, seats = _due(run, state)
        here = state.pool.clock < state.pool.cache.positions.shape[1]
        longest = state.pool.positions.max() + 1
        return here & (longest > fewest) & (longest <= most) & ~prefills & ~seats

    def loop(goes_on, fills, reads, state):
        bounds = 0, *attention.read_sizes(width + R, reads)

        def lap(state):
            if fills:
                state = jax.lax.while_loop(lambda s: _due(run, s)[0], lambda s: _prefill(run, C, s), state)
                state = jax.lax.while_loop(lambda s: _due(run, s)[1], lambda s: _seat(run, C, s), state)
            state = _rewind(state, width) if refills else state
            for fewest, most in itertools.pairwise(bounds):  # a loop for each read: choosing in each layer costs more
                due = functools.partial(decodes, fewest, most)
                state = jax.lax.while_loop(
                    lambda s, due=due: due(s) & goes_on(s), functools.partial(_decode, run, most), state
                )
            return state

        return jax.lax.while_loop(goes_on, lap, state)

    state = loop(many, True, READS, state)
    if few:  # the last answers, in fewer slots
        state = state._replace(pool=_shrunk(run, state.pool, few))
        state = loop(lambda s: jnp.any(s.pool.positions >= 0), False, FEW_READS, state)
    return state.rollout


def _decode(run: Run, read: int, state: Sampling) -> Sampling:
    """Samples the next token of every slot; their last `read` columns hold all of their tokens."""
    pool, rollout = state.pool, state.rollout
    active = pool.positions >= 0
    inputs = (constrain(x[:, None], BATCH, None) for x in (pool.tokens, pool.positions))
    positions = pool.positions + 1
    hidden, cache = models.extend(run.config, run.params, pool.cache, *inputs, pool.clock, read)
    tokens, logprobs = _whole(run.choose(hidden[:, 0], pool.rows, positions))
    length = positions - run.lengths[run.owners[pool.rows]]  # of the response before this token
    rows = jnp.where(active, pool.rows, len(rollout.mask))
    put = lambda array, x: array.at[rows, length].set(x, mode="drop")  # noqa: E731
    rollout = Rollout(put(rollout.tokens, tokens), put(rollout.logprobs, logprobs), put(rollout.mask, True))
    stays = active & ~run.ended(tokens) & (length + 1 < run.limits[pool.rows])
    slots = jnp.where(stays, tokens, 0), jnp.where(stays, positions, -1), pool.rows
    return state._replace(pool=Pool(cache, pool.clock + 1, *_whole(slots)), rollout=_whole(rollout))


def _supply(run: Run, state: Sampling) -> tuple[jax.Array, jax.Array]:
    """Which slots are free and which prompts of the tray have answers left, (D, …) bool by shard."""
    by_shard = lambda x: x.reshape(run.shards, -1)  # noqa: E731
    return by_shard(state.pool.positions < 0), by_shard(state.tray.left > 0)


def _due(run: Run, state: Sampling) -> tuple[jax.Array, jax.Array]:
    """Whether a shard with a free slot has an empty tray while prompts wait, and whether one has a full tray."""
    free, stocked = _supply(run, state)
    able, stocked = free.any(axis=1), stocked.any(axis=1)
    return (state.taken < run.waiting) & jnp.any(able & ~stocked), jnp.any(able & stocked)


def _prefill(run: Run, C: int, state: Sampling) -> Sampling:
    """Puts the next prompts in the places of the tray that are empty; the shards take them in turn."""
    tray, D = state.tray, run.shards
    empty = tray.left == 0
    turn = jnp.cumsum(empty.reshape(D, -1).T).reshape(-1, D).T.ravel() - 1
    taken = empty & (state.taken + turn < run.waiting)
    prompts = jnp.where(taken, run.order[jnp.minimum(state.taken + turn, len(run.order) - 1)], tray.prompts)
    lengths, texts = jnp.where(taken, run.lengths[prompts] - 1, 0), run.prompts[prompts]
    width = tray.cache.positions.shape[1]
    chunks = (jnp.max(lengths) + C - 1) // C

    def chunk(read, i, cache):
        column = width - (chunks - i) * C
        positions = jnp.maximum(column + jnp.arange(C) - width + lengths[:, None], -1)
        tokens = jnp.take_along_axis(texts, jnp.maximum(positions, 0), axis=1)
        tokens, positions = constrain(tokens, BATCH, None), constrain(positions, BATCH, None)
        return models.extend(run.config, run.params, cache, tokens, positions, column, read)[1]

    cache = tray.cache.emptied()
    for done, read in itertools.pairwise((0, *attention.read_sizes(width, PREFILL_READS))):
        first, last = done // C, read // C
        cache = jax.lax.fori_loop(first, jnp.minimum(chunks, last), functools.partial(chunk, read), cache)
    if D > 1:  # another shard may have had prompts left
        keep = lambda new, old: jnp.where(jnp.expand_dims(taken, range(1, new.ndim)), new, old)  # noqa: E731
        cache = jax.tree.map(keep, cache, tray.cache)
    left = jnp.where(taken, run.counts[prompts], tray.left)
    return state._replace(tray=Tray(cache, *_whole((prompts, left))), taken=state.taken + taken.sum(dtype=jnp.int32))


def _seat(run: Run, C: int, state: Sampling) -> Sampling:
    """Gives a free slot of each shard an answer that its tray has left."""
    pool, tray, D = state.pool, state.tray, run.shards
    free, stocked = _supply(run, state)
    taken = free.any(axis=1) & stocked.any(axis=1)  # (D,)
    slot, place = jnp.argmax(free, axis=1), jnp.argmax(stocked, axis=1)
    source = place + jnp.arange(D) * stocked.shape[1]
    target = jnp.where(taken, slot + jnp.arange(D) * free.shape[1], free.size)  # where there is none, nothing is put
    put = lambda array, x: array.at[target].set(x, mode="drop")  # noqa: E731
    prompts, left = tray.prompts[source], tray.left[source]
    lengths = run.lengths[prompts] - 1  # without the last token
    cache = pool.cache.with_copies(tray.cache, slot, place, jnp.where(taken, lengths, -1), pool.clock, C)
    rows = (jnp.cumsum(run.counts)[prompts] - left).astype(jnp.int32)
    slots = (put(pool.tokens, run.prompts[prompts, lengths]), put(pool.positions, lengths), put(pool.rows, rows))
    left = _whole(tray.left.at[source].add(-taken.astype(jnp.int32)))
    return state._replace(pool=Pool(cache, pool.clock, *_whole(slots)), tray=tray._replace(left=left))


def _rewind(state: Sampling, width: int) -> Sampling:
    """Where the clock has come to the end of the columns, moves all of them back as far as the longest slot allows.

    It stays at `width` at least: so long is the prompt that may come next.
    """
    S = state.pool.cache.positions.shape[1]

    def rewind(_, state):
        pool = state.pool
        clock = jnp.maximum(width, jnp.max(pool.positions))  # below S: the longest has a token to come
        return state._replace(pool=pool._replace(cache=pool.cache.rewound(clock), clock=clock))

    return jax.lax.fori_loop(0, (state.pool.clock == S).astype(jnp.int32), rewind, state)


def _shrunk(run: Run, pool: Pool, slots: int) -> Pool:
    """The slots that are not free, and free ones up to that many in all; as many on each shard."""
    D, b = run.shards, len(pool.rows)
    kept = jnp.argsort(pool.positions.reshape(D, -1) < 0, axis=1, stable=True)[:, : slots // D]
    flat = (kept + jnp.arange(D)[:, None] * (b // D)).ravel()
    slots = (x[flat] for x in (pool.tokens, pool.positions, pool.rows))
    return Pool(pool.cache.selected(kept), pool.clock, *_whole(tuple(slots)))


def _whole(arrays):
    """Every array whole on every device: few numbers, which every shard asks for."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), arrays)


def _up(count: int, unit: int) -> int:
    """The multiple of unit that is not below count."""
    return -(-count // unit) * unit
