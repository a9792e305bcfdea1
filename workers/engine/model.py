"""What a decoder-only model is, as one flat record of sizes and switches; knows no file and no tensor."""

from dataclasses import dataclass

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ADAPTER = "adapter"  # the family of models that run on transformers' own layers


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su et al. 2021) over the first `dims` of a head, and how their frequencies are stretched.

    "linear": all by `factor`; "llama3": the low ones, blended between `low` and `high` turns of `original_context`;
    "yarn" (Peng et al. 2023): the same between dimensions, blended between `low` and `high` turns;
    "longrope" (Ding et al. 2024): each by its own of `factors` [dims / 2].
    """

    theta: float
    dims: int
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    amplitude: float = 1.0  # of sines and cosines
    truncate: bool = True  # yarn: blend between whole dimensions
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts (Shazeer et al. 2017): each token's MLP is a weighted sum of `active` of `count` MLPs."""

    count: int
    active: int
    intermediate: int
    renormalize: bool  # the weights of the chosen experts sum to 1
    layers: tuple[int, ...]  # which have experts; the others have one MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. `family` names the tensor layout; everything else is a switch on the same block."""

    family: str  # a key of families.NAMES, or ADAPTER
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int  # positions the model knows
    norm_eps: float
    activation: str
    tied: bool  # the head is the embedding
    ropes: tuple[Rope, ...] = ()  # none: learned positions; two: of layers without and with a window
    windows: tuple[int, ...] = ()  # per layer: tokens that a token sees, itself included, 0 for all; (): no windows
    rms_norm: bool = True  # otherwise LayerNorm
    norm_bias: bool = True  # of LayerNorm
    norm_offset: bool = False  # norm weights are stored less 1
    post_norms: bool = False  # what attention and MLP add to the residual is normed as well
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: Experts | None = None
    position_offset: int = 0  # rows of the position table before that of position 0
    embedding_scale: float = 1.0
    score_scale: float | None = None  # of attention scores; None: 1 / sqrt(head_dim)
    score_cap: float | None = None  # attention scores s become cap * tanh(s / cap)
    logit_cap: float | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def crossed(self) -> bool:
        """It reads an encoder's states."""
        return False

    def window(self, layer: int) -> int:
        """How many tokens a token of this layer sees, itself included; 0 for all."""
        return self.windows[layer] if self.windows else 0
