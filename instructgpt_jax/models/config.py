"""The shape of a decoder-only transformer, and the named sizes."""

import dataclasses
import hashlib
import json
import math

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")
POSITIONS = ("learned", "rotary", "none")
NORMS = ("layernorm", "rmsnorm")
RESIDUALS = ("sequential", "parallel", "parallel_shared_norm", "post_norm", "sandwich")
REMAT = ("none", "light", "dots", "full")
ATTENTION = ("auto", "xla", "cudnn", "splash")
DTYPES = ("float32", "bfloat16")
HEADS = ("lm", "scalar")
DROPOUTS = ("residual_dropout", "embedding_dropout", "attention_dropout")
# What a stage sets and a checkpoint does not: precision, memory, noise. They change the work, not the function.
RUNTIME_FIELDS = ("dtype", "remat", "attention", *DROPOUTS)
PROJECTIONS = ("query", "key", "value", "out", "up", "gate", "down")  # of a block: what an adapter can change


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A change of low rank to projections whose weights are frozen (LoRA, Hu et al. 2021): see models/adapters.py.

    Attributes:
      rank: r, the columns of A.
      alpha: the change is multiplied by alpha / rank.
      targets: which of PROJECTIONS, the same in every layer.
      dropout: rate at which inputs of A are zeroed, where a dropout key is given.
      base: how the frozen kernels of all projections are stored while it trains, one of quantised.FORMATS; '' = in the
        compute dtype.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    base: str = ""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                "rank, alpha and dropout of an adapter must be at least 1, above 0 and in [0, 1), "
                f"got {self.rank}, {self.alpha} and {self.dropout}"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that changes the function a network computes; hashable, so a jitted function can close over it.

    Attributes:
      vocab_size: V, the tokenizer's vocabulary. Inside, embeddings have `padded_vocab_size` rows.
      num_layers, width, num_heads, mlp_width: L, D, N, F.
      max_length: the context in tokens; learned positions have this many rows.
      num_kv_heads: key/value heads, each shared by num_heads / num_kv_heads queries; None = num_heads.
      head_width: H; None = width / num_heads.
      embedding_width: E; None = width. Otherwise tokens are embedded in E channels and projected to D, and back to E
        after the last layer (OPT-350M).
      positions: `learned` (added to the embedding), `rotary` (queries and keys are rotated), or `none`.
      scaled_embeddings: token embeddings are multiplied by sqrt(E), in the compute dtype, where they are read; the tied
        unembedding is not.
      position_offset: rows of the learned positions that stand unused before the row of position 0 (OPT has 2).
      rotary_width: how many of the H channels are rotated; None = all.
      rotary_interleaved: pairs are neighbours (2i, 2i+1), as in GPT-J; otherwise halves (i, i + rotary_width/2), as in
        Llama.
      rotary_theta: the base of the rotary wavelengths.
      rotary_scaling: () or the context extension as sorted (name, value) pairs, `kind` among them: see
        attention.rotary_frequencies.
      local_rotary_theta: the base in the layers that have a window, and no scaling there (Gemma 3); None = as in the
        other layers.
      norm, norm_eps: LayerNorm with bias, or RMSNorm.
      norm_offset: added to the scale of every norm: 1 where the parameter is what a scale has above 1 (Gemma).
      activation, gated_mlp: act(x·up)·down, or (act(x·gate) * x·up)·down (SwiGLU with `silu`).
      residual: `sequential`; `parallel` (attention and MLP read the same x through a norm each);
        `parallel_shared_norm`; `post_norm` (sequential, a norm after each addition and none at the end); `sandwich`
        (sequential, a norm before and one after attention and MLP each).
      qkv_bias, out_bias, mlp_bias, head_bias: which projections have a bias.
      qk_norm: RMSNorm over H on queries and keys, before the rotation.
      tied_embeddings: the unembedding is the token embedding.
      windows: the local attention window of each layer, repeated over the layers; 0 = dense. A token sees the keys less
        than `window` positions back, itself included. GPT-3's alternation is `(0, 256)` (its band width is
        unpublished).
      attention_scale: multiplies q·k; None = 1/sqrt(H).
      residual_dropout, embedding_dropout, attention_dropout: rates, active where a dropout key is given.
      dtype: of activations and matrix products. Parameters are kept in float32, norms and softmax computed in it.
      remat: what the backward pass recomputes: `none` (nothing but norms, activations and softmax: keeping them costs
        more than computing them), `light` (also the projection out of attention, and attention itself where no fused
        kernel does it: queries, keys, values, what attention gives and what the activation takes are kept), `dots`
        (also attention: all but the products with weights), `full` (all but each block's input).
      attention: the backend that attends over whole rows: `auto` (the platform's, or `xla` with a line in the log where
        that cannot serve them), or `xla`, `cudnn` or `splash` by force; see flash.py. A cache is read by `xla` always.
      head: `lm` (logits) or `scalar` (a reward or value a token).
      adapter: what trains where the rest is frozen; None = everything, or nothing. The parameters of the whole network
        are those of `adapters.join`.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    max_length: int
    num_kv_heads: int | None = None
    head_width: int | None = None
    embedding_width: int | None = None
    scaled_embeddings: bool = False
    positions: str = "learned"
    position_offset: int = 0
    rotary_width: int | None = None
    rotary_interleaved: bool = False
    rotary_theta: float = 10_000.0
    rotary_scaling: tuple[tuple[str, float | str], ...] = ()
    local_rotary_theta: float | None = None
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    activation: str = "gelu_tanh"
    gated_mlp: bool = False
    residual: str = "sequential"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    windows: tuple[int, ...] = (0,)
    attention_scale: float | None = None
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    head: str = "lm"
    adapter: Adapter | None = None

    def __post_init__(self):
        if isinstance(self.adapter, dict):  # from JSON
            object.__setattr__(self, "adapter", Adapter(**self.adapter))
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("positions", POSITIONS),
            ("norm", NORMS),
            ("residual", RESIDUALS),
            ("remat", REMAT),
            ("attention", ATTENTION),
            ("dtype", DTYPES),
            ("head", HEADS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("vocab_size", "num_layers", "width", "num_heads", "mlp_width", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        object.__setattr__(self, "windows", tuple(self.windows))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_width is None:
            if self.width % self.num_heads:
                raise ValueError(f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}")
            object.__setattr__(self, "head_width", self.width // self.num_heads)
        if self.embedding_width is None:
            object.__setattr__(self, "embedding_width", self.width)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rotary_width is None:
            object.__setattr__(self, "rotary_width", self.head_width)
        if self.positions == "rotary" and (self.rotary_width % 2 or self.rotary_width > self.head_width):
            raise ValueError(
                f"rotary_width must be even and at most head_width={self.head_width}, got {self.rotary_width}"
            )
        if not self.windows or any(window < 0 for window in self.windows):
            raise ValueError(f"windows must be one or more sizes of at least 0 (0 = dense), got {self.windows!r}")
        for name in DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        if self.adapter is not None and not set(self.adapter.targets) <= set(self.projections):
            raise ValueError(f"targets must be among {self.projections}, got {self.adapter.targets}")

    def replace(self, **changes) -> "ModelConfig":
        """A copy with some fields changed.

        Raises:
          ValueError: an unknown field.
        """
        fields = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(fields))
        if unknown:
            raise ValueError(f"fields of a model must be among {fields}, got {unknown}")
        # Fields that follow from others by default follow them again, unless they were set apart.
        if changes.keys() & {"width", "num_heads"}:
            if self.head_width * self.num_heads == self.width:
                changes = {"head_width": None} | changes
            if self.embedding_width == self.width:
                changes = {"embedding_width": None} | changes
            if self.num_kv_heads == self.num_heads:
                changes = {"num_kv_heads": None} | changes
        if "head_width" in changes and self.rotary_width == self.head_width:
            changes = {"rotary_width": None} | changes
        return dataclasses.replace(self, **changes)

    def without_dropout(self) -> "ModelConfig":
        """The same network without noise, which is the setting of one stage and not of a network."""
        adapter = self.adapter and dataclasses.replace(self.adapter, dropout=0.0)
        return self.replace(**dict.fromkeys(DROPOUTS, 0.0), adapter=adapter)

    @property
    def has_dropout(self) -> bool:
        """Whether a dropout key changes what it computes."""
        return any(getattr(self, name) for name in DROPOUTS) or bool(self.adapter and self.adapter.dropout)

    def digest(self) -> str:
        """16 hexadecimal digits of the body's architecture, for which an adapter was made; the head is its own."""
        own = {"head", "adapter", *RUNTIME_FIELDS}
        told = {name: value for name, value in dataclasses.asdict(self).items() if name not in own}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections of a block that this network has."""
        return tuple(name for name in PROJECTIONS if self.gated_mlp or name != "gate")

    @property
    def training_passes(self) -> int:
        """Passes over the weights of a forward pass with its backward: a frozen weight has no gradient of its own."""
        return 2 if self.adapter else 3

    @property
    def padded_vocab_size(self) -> int:
        """V rounded up to a multiple of 128: divisible by any tensor axis, and friendly to matrix units."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each of the L layers."""
        return tuple(self.windows[layer % len(self.windows)] for layer in range(self.num_layers))

    def flops_per_token(self, context: float = 0.0) -> float:
        """Model FLOPs of one token's forward pass: 2 a weight that multiplies it, and attention over `context` keys.

        The backward pass costs twice as much. The usual accounting of the field (Kaplan et al. 2020, section 2.1);
        embedding look-ups are free and the unembedding counts.
        """
        D, F, N, M, H = self.width, self.mlp_width, self.num_heads, self.num_kv_heads, self.head_width
        block = D * H * (N + 2 * M) + N * H * D + D * F * (3 if self.gated_mlp else 2)
        E = self.embedding_width
        head = E if self.head == "scalar" else E * self.vocab_size
        head += 2 * D * E if E != D else 0
        return 2.0 * (self.num_layers * (block + 2 * N * H * context) + head)


def _gpt3(num_layers: int, width: int, num_heads: int) -> ModelConfig:
    return ModelConfig(50_257, num_layers, width, num_heads, mlp_width=4 * width, max_length=2_048)


# The named sizes. GPT-3's are those of Brown et al. 2020, table 2.1, with dense attention in every layer and tied
# embeddings; the table prints 24 heads of 128 for the 1.3B model, which do not fill its width of 2,048: 16 do, and
# Stiennon et al. 2020 (table 3) use 16. InstructGPT calls the 6.7B model "6B".
#
#   name          layers  width   heads  parameters
#   tiny               2     64       4      165,632   (a vocabulary of 512, a context of 512)
#   gpt3-125m         12    768      12  125,226,240
#   gpt3-350m         24  1,024      16  355,871,744
#   gpt3-760m         24  1,536      16  760,300,032
#   gpt3-1.3b         24  2,048      16  1,315,723,264
#   gpt3-2.7b         32  2,560      32  2,651,553,280
#   gpt3-6.7b         32  4,096      32  6,658,404,352
#   gpt3-13b          40  5,120      40  12,853,386,240  (the paper prints a width of 5,140: 40 heads of 128 fill 5,120)
#   gpt3-175b         96 12,288      96  174,604,259,328
#   llama2-7b         32  4,096      32  6,738,415,616  (Touvron et al. 2023, table 1)
SIZES = {
    "tiny": ModelConfig(vocab_size=512, num_layers=2, width=64, num_heads=4, mlp_width=256, max_length=512),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1_024, 16),
    "gpt3-760m": _gpt3(24, 1_536, 16),
    "gpt3-1.3b": _gpt3(24, 2_048, 16),
    "gpt3-2.7b": _gpt3(32, 2_560, 32),
    "gpt3-6.7b": _gpt3(32, 4_096, 32),
    "gpt3-13b": _gpt3(40, 5_120, 40),
    "gpt3-175b": _gpt3(96, 12_288, 96),
    "llama2-7b": ModelConfig(
        vocab_size=32_000, num_layers=32, width=4_096, num_heads=32, mlp_width=11_008, max_length=4_096,
        positions="rotary", norm="rmsnorm", activation="silu", gated_mlp=True, qkv_bias=False, out_bias=False,
        mlp_bias=False, tied_embeddings=False,
    ),
}  # fmt: skip
