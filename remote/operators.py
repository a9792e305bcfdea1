"""The operators that may run on a worker, by name: a fixed list. Names are looked up in it and nowhere else."""

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional

from .values import mapped


def _words(text: str) -> list[str]:
    return text.split()


# what torch offers under one name as a function and as a method
_BOTH = _words("""
abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arccos
arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh baddbmm
bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_to ceil
cholesky chunk clamp clamp_max clamp_min clip clone copysign corrcoef cos cosh count_nonzero cov cross cummax cummin
cumprod cumsum deg2rad det detach diag diag_embed diagflat diagonal diff digamma dist div divide dot dsplit eq equal
erf erfc erfinv exp exp2 expm1 fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac
gather gcd ge greater greater_equal gt heaviside histc hsplit hypot i0 index_add index_copy index_fill index_select
inner inverse is_floating_point is_nonzero isclose isfinite isinf isnan isneginf isposinf isreal kron kthvalue lcm
ldexp le lerp less less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logcumsumexp logdet logical_and
logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_scatter masked_select matmul matrix_exp
matrix_power max maximum mean median min minimum mm mode moveaxis movedim mul multiply mv nan_to_num nanmean nanmedian
nanquantile nansum narrow ne neg negative nextafter nonzero norm not_equal numel outer permute pinverse polygamma
positive pow prod quantile rad2deg ravel reciprocal relu remainder renorm repeat_interleave reshape roll rot90 round
rsqrt scatter scatter_add select sgn sigmoid sign signbit sin sinc sinh slogdet softmax log_softmax sort split sqrt
square squeeze std sub subtract sum svd swapaxes swapdims t take take_along_dim tan tanh tensor_split tile topk trace
transpose tril triu true_divide trunc unbind unflatten unique unique_consecutive unsqueeze var vsplit where xlogy
""")
_FUNCTIONS = _words("""
atleast_1d atleast_2d atleast_3d block_diag bucketize cartesian_prod cat cdist chain_matmul column_stack combinations
concat concatenate cosine_similarity dstack einsum full_like hstack linspace logspace meshgrid ones_like searchsorted
stack std_mean tensordot trapezoid tril_indices triu_indices var_mean vander vstack zeros_like celu selu rms_norm
layer_norm group_norm batch_norm arange zeros ones full eye
""")
_METHODS = _words("""
bfloat16 bool contiguous cpu cuda dim double element_size expand expand_as float half int is_contiguous item long
new_full new_ones new_zeros ndimension nelement repeat reshape_as short size stride sum_to_size to tolist type_as
unfold view view_as
""")
_IN_PLACE = _words("""
abs_ add_ addcdiv_ addcmul_ addmm_ bitwise_and_ bitwise_not_ bitwise_or_ bitwise_xor_ ceil_ clamp_ clamp_max_
clamp_min_ copy_ cos_ cumsum_ div_ exp_ fill_ fill_diagonal_ floor_ floor_divide_ fmod_ index_add_ index_copy_
index_fill_ lerp_ log_ logical_and_ logical_not_ logical_or_ masked_fill_ mul_ neg_ pow_ reciprocal_ relu_ remainder_
round_ rsqrt_ scatter_ scatter_add_ sigmoid_ sign_ sin_ sqrt_ square_ sub_ tanh_ tril_ triu_ trunc_ zero_
""")
_NN = _words("""
adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d bilinear
binary_cross_entropy binary_cross_entropy_with_logits conv1d conv2d conv3d conv_transpose1d conv_transpose2d
cosine_embedding_loss cosine_similarity cross_entropy ctc_loss elu embedding embedding_bag gaussian_nll_loss gelu glu
hardsigmoid hardswish hardtanh hinge_embedding_loss huber_loss interpolate kl_div l1_loss layer_norm leaky_relu linear
log_softmax logsigmoid margin_ranking_loss max_pool1d max_pool2d mish mse_loss nll_loss normalize one_hot pad
pairwise_distance pixel_shuffle pixel_unshuffle poisson_nll_loss prelu relu relu6 rms_norm
scaled_dot_product_attention selu sigmoid silu smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink
softsign tanh tanhshrink threshold triplet_margin_loss unfold
""")
_LINALG = "cholesky det eigh eigvalsh inv lstsq matrix_norm matrix_rank norm qr slogdet solve svd svdvals vector_norm"
_PYTHON = _words("""
abs add and_ eq floordiv ge getitem gt invert le lshift lt matmul mod mul ne neg or_ pos pow rshift sub truediv xor
""")


def _identity(value: Any) -> Any:
    return value


def _item_set(value: Any, index: Any, new: Any) -> Any:
    value[index] = new
    return value


class _Scaled(torch.autograd.Function):
    """The same value; gradients are multiplied on their way back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.factor, None


def scaled(value: Any, factor: float) -> Any:
    """The same value; gradients of its tensors are multiplied on their way back."""
    return mapped(value, lambda tensor: _Scaled.apply(tensor, factor) if tensor.requires_grad else tensor)


def _joined(values: Any) -> Any:
    """Results of one kind for some rows each, as one for all rows."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        if not first.ndim:
            raise ValueError("results without rows cannot be joined: have the module return one value for each row")
        return torch.cat(values)
    if isinstance(first, list | tuple):
        return type(first)([_joined(entries) for entries in zip(*values, strict=True)])
    if isinstance(first, dict):
        return {name: _joined([value[name] for value in values]) for name in first}
    return first


def _named() -> dict[str, Callable[..., Any]]:
    rooms: list[tuple[str, Any, list[str]]] = [
        ("torch", torch, _BOTH + _FUNCTIONS),
        ("Tensor", torch.Tensor, _BOTH + _METHODS + _IN_PLACE),
        ("nn", functional, _NN),
        ("linalg", torch.linalg, _LINALG.split()),
        ("operator", operator, _PYTHON),
    ]
    found = {
        f"{room}.{name}": getattr(owner, name) for room, owner, names in rooms for name in names if hasattr(owner, name)
    }
    found |= {f"Tensor.{name}": getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "real")}
    found |= {"value": _identity, "bool": bool, "int": int, "float": float, SET: _item_set}
    found |= {"scaled": scaled, "joined": _joined}
    return found


SET: Final = "operator.setitem"
OPERATORS: Final = _named()
IN_PLACE: Final = frozenset([f"Tensor.{name}" for name in _IN_PLACE] + [SET])
METHODS: Final = frozenset(_BOTH + _METHODS + _IN_PLACE)
# what answers with a value for the caller's program, at once
VALUES: Final = frozenset(
    ["bool", "int", "float", "torch.allclose", "torch.equal", "torch.is_floating_point", "torch.is_nonzero"]
    + ["torch.numel"]
    + [
        f"Tensor.{name}"
        for name in ["allclose", "equal", "is_floating_point", "is_nonzero", "numel", "dim", "size", "stride", "item"]
    ]
    + [f"Tensor.{name}" for name in ["tolist", "element_size", "is_contiguous", "ndimension", "nelement"]]
)
# the size of whose result is no matter of tensors
SIZED: Final = frozenset(
    [f"torch.{name}" for name in ("arange", "eye", "full", "linspace", "logspace", "ones", "tile", "zeros")]
    + [f"Tensor.{name}" for name in ("new_full", "new_ones", "new_zeros", "repeat", "tile")]
)
_SEVERAL = _words("""
aminmax chunk cummax cummin dsplit hsplit kthvalue median mode nanmedian slogdet sort split svd tensor_split topk
unbind vsplit std_mean var_mean meshgrid
""")
# what may answer with several tensors: the caller's program takes them apart at once
SEVERAL: Final = frozenset(
    [f"{room}.{name}" for room in ("torch", "Tensor") for name in [*_SEVERAL, "max", "min", "unique"]]
    + ["torch.unique_consecutive", "Tensor.unique_consecutive"]
    + [f"linalg.{name}" for name in ("eigh", "lstsq", "qr", "slogdet", "svd")]
)
_NAMES: Final[dict[Any, str]] = {
    **{found: name for name, found in reversed(OPERATORS.items()) if not name.startswith("operator.")},
    **{getattr(torch.Tensor, f"__{name.strip('_')}__"): f"operator.{name}" for name in _PYTHON},
}


def name_of(function: Callable[..., Any]) -> str | None:
    """The name under which a function of torch may run on a worker; None where it may not."""
    try:
        return _NAMES.get(function)
    except TypeError:  # not hashable
        return None
