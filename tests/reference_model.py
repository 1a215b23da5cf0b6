"""One forward pass of the transformer in numpy, token by token and head by head, for comparison; nothing is shared."""

import math

import jax
import numpy as np

from instructgpt_jax.models import ModelConfig


def random_params(config: ModelConfig, init, seed: int = 0) -> dict:
    """Parameters with every norm and bias away from its start, and weights large enough to matter."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        start = (path[-1].key == "scale") * (1 - config.norm_offset)
        return np.asarray(start + 0.2 * rng.standard_normal(x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: init(config, jax.random.key(0))))


def _norm(config, x, p):
    if config.norm == "rmsnorm":
        scale = p["scale"] + config.norm_offset
        return x / math.sqrt(sum(v * v for v in x) / len(x) + config.norm_eps) * scale
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(variance + config.norm_eps) * p["scale"] + p["bias"]


def _activation(name, x):
    def one(v):
        if name == "relu":
            return max(v, 0.0)
        if name == "silu":
            return v / (1 + math.exp(-v))
        if name == "gelu":
            return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))
        return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    return np.array([one(v) for v in x])


def _rotate(config, x, position, window):
    x, R = x.copy(), config.rotary_width
    theta = config.local_rotary_theta if window and config.local_rotary_theta else config.rotary_theta
    for i in range(R // 2):
        a, b = (2 * i, 2 * i + 1) if config.rotary_interleaved else (i, i + R // 2)
        angle = position * theta ** (-2 * i / R)
        x[a], x[b] = x[a] * math.cos(angle) - x[b] * math.sin(angle), x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return x


def _attention(config, xs, p, window):
    """Attention over the normed inputs xs of one sequence."""
    group = config.num_heads // config.num_kv_heads
    scale = config.attention_scale or 1 / math.sqrt(config.head_width)

    def project(name, x, head):
        y = x @ p[name]["kernel"][:, head] + (p[name]["bias"][head] if config.qkv_bias else 0)
        if name != "value" and config.qk_norm:
            y = y / math.sqrt(np.mean(y * y) + config.norm_eps) * (p[f"{name}_norm"]["scale"] + config.norm_offset)
        return y

    keys, values, out = [], [], []
    for t, x in enumerate(xs):
        turn = (lambda y, t=t: _rotate(config, y, t, window)) if config.positions == "rotary" else (lambda y: y)
        keys.append([turn(project("key", x, m)) for m in range(config.num_kv_heads)])
        values.append([project("value", x, m) for m in range(config.num_kv_heads)])
        total = p["out"]["bias"].copy() if config.out_bias else np.zeros(config.width)
        first = max(0, t - window + 1) if window else 0
        for n in range(config.num_heads):
            query = turn(project("query", x, n))
            scores = [math.exp(scale * (query @ keys[s][n // group])) for s in range(first, t + 1)]
            mixed = sum(w * values[s][n // group] for w, s in zip(scores, range(first, t + 1), strict=True))
            total += mixed / sum(scores) @ p["out"]["kernel"][n]
        out.append(total)
    return out


def _mlp(config, x, p):
    def dense(name, x):
        return x @ p[name]["kernel"] + (p[name]["bias"] if config.mlp_bias else 0)

    y = dense("up", x)
    if config.gated_mlp:
        return dense("down", y * _activation(config.activation, dense("gate", x)))
    return dense("down", _activation(config.activation, y))


def forward(config: ModelConfig, params: dict, tokens) -> np.ndarray:
    """(n, V) float64 logits of one sequence (of n scalars with a scalar head)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    xs = [p["embed"]["tokens"][token] for token in tokens]
    if config.scaled_embeddings:
        xs = [x * math.sqrt(config.width) for x in xs]
    if config.embedding_width != config.width:
        xs = [x @ p["embed"]["project_in"] for x in xs]
    if config.positions == "learned":
        xs = [x + p["embed"]["positions"][t + config.position_offset] for t, x in enumerate(xs)]
    for index in range(config.num_layers):
        b = jax.tree.map(lambda x: x[index], p["blocks"])  # noqa: B023
        window = config.windows[index % len(config.windows)]
        if config.residual == "post_norm":
            ys = _attention(config, xs, b["attention"], window)
            xs = [_norm(config, x + y, b["norm1"]) for x, y in zip(xs, ys, strict=True)]
            xs = [_norm(config, x + _mlp(config, x, b["mlp"]), b["norm2"]) for x in xs]
            continue
        normed = [_norm(config, x, b["norm1"]) for x in xs]
        ys = _attention(config, normed, b["attention"], window)
        if config.residual == "sandwich":
            xs = [x + _norm(config, y, b["norm1_after"]) for x, y in zip(xs, ys, strict=True)]
            ys = [_mlp(config, _norm(config, x, b["norm2"]), b["mlp"]) for x in xs]
            xs = [x + _norm(config, y, b["norm2_after"]) for x, y in zip(xs, ys, strict=True)]
        elif config.residual == "sequential":
            xs = [x + y for x, y in zip(xs, ys, strict=True)]
            xs = [x + _mlp(config, _norm(config, x, b["norm2"]), b["mlp"]) for x in xs]
        else:
            if config.residual == "parallel":
                normed = [_norm(config, x, b["norm2"]) for x in xs]
            xs = [x + y + _mlp(config, z, b["mlp"]) for x, y, z in zip(xs, ys, normed, strict=True)]
    if config.residual != "post_norm":
        xs = [_norm(config, x, p["final_norm"]) for x in xs]
    if config.embedding_width != config.width:
        xs = [x @ p["embed"]["project_out"] for x in xs]
    if config.head == "scalar":
        return np.array([x @ p["scalar_head"]["kernel"] + p["scalar_head"]["bias"] for x in xs])
    head = p.get("head", {})
    logits = np.array(xs) @ head.get("kernel", p["embed"]["tokens"]).T + head.get("bias", 0)
    return logits[:, : config.vocab_size]
