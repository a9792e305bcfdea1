"""Module classes that may travel by name, and what their constructors were given. Imports nothing that it is told.

The arguments of an existing module are read from its attributes: torch keeps each under the name of its parameter, but
for those in the tables here.
"""

import inspect
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from ..schema.errors import Refused

CONTAINERS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _words(text: str) -> list[str]:
    return text.split()


_TORCH: Final = _words("""
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AlphaDropout AvgPool1d
AvgPool2d AvgPool3d BCELoss BCEWithLogitsLoss BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ConstantPad1d
ConstantPad2d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineEmbeddingLoss
CosineSimilarity CrossEntropyLoss Dropout Dropout1d Dropout2d Dropout3d ELU Embedding EmbeddingBag Flatten Fold GELU
GLU GRU GRUCell GroupNorm Hardshrink Hardsigmoid Hardswish Hardtanh HuberLoss Identity InstanceNorm1d InstanceNorm2d
InstanceNorm3d KLDivLoss L1Loss LSTM LSTMCell LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax
MSELoss MaxPool1d MaxPool2d MaxPool3d Mish ModuleDict ModuleList MultiheadAttention NLLLoss PReLU PairwiseDistance
PixelShuffle PixelUnshuffle RMSNorm RNN RNNCell RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReplicationPad2d SELU
Sequential SiLU Sigmoid SmoothL1Loss Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
TransformerDecoderLayer TransformerEncoder TransformerEncoderLayer Unflatten Unfold Upsample ZeroPad2d
""")
_RECURRENT: Final = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
_LAYER: Final = [
    "d_model",
    "nhead",
    "dim_feedforward",
    "dropout",
    "activation",
    "layer_norm_eps",
    "batch_first",
    "norm_first",
    "bias",
]
_PARAMETERS: Final[dict[type[nn.Module], list[str]]] = {
    nn.RNN: [*_RECURRENT, "nonlinearity"],
    nn.GRU: _RECURRENT,
    nn.LSTM: [*_RECURRENT, "proj_size"],
    nn.Identity: [],
    nn.TransformerEncoderLayer: _LAYER,
    nn.TransformerDecoderLayer: _LAYER,
    nn.TransformerEncoder: ["encoder_layer", "num_layers", "norm", "enable_nested_tensor", "mask_check"],
}
_SKIPPED: Final = {"device", "dtype", "size_average", "reduce", "min_value", "max_value"}  # of the call, or obsolete
_Read = Callable[[Any], Any]
_READ: Final[dict[tuple[type[nn.Module], str], _Read]] = {
    (nn.MultiheadAttention, "bias"): lambda module: module.in_proj_bias is not None,
    (nn.MultiheadAttention, "add_bias_kv"): lambda module: module.bias_k is not None,
    (nn.PReLU, "init"): lambda module: 0.25,  # its weight follows
    (nn.TransformerEncoder, "encoder_layer"): lambda module: module.layers[0],
    **{
        (layer, name): read
        for layer in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        for name, read in {
            "d_model": lambda module: module.self_attn.embed_dim,
            "nhead": lambda module: module.self_attn.num_heads,
            "dim_feedforward": lambda module: module.linear1.out_features,
            "dropout": lambda module: module.dropout.p,
            "activation": lambda module: _activation(module.activation),
            "layer_norm_eps": lambda module: module.norm1.eps,
            "batch_first": lambda module: module.self_attn.batch_first,
            "bias": lambda module: module.linear1.bias is not None,
        }.items()
    },
}
_FUNCTIONS: Final = ("relu", "gelu")  # that a constructor takes by name


def _activation(found: Any) -> Any:
    name = getattr(found, "__name__", "")
    if name in _FUNCTIONS and getattr(nn.functional, name) is found:
        return name
    if isinstance(found, nn.Module):
        return found
    raise Refused(f"its activation {name or found!r} does not travel: use 'relu', 'gelu' or a module")


def torch_classes() -> dict[str, type[nn.Module]]:
    """The classes of torch that every worker builds, by name on the wire."""
    found = {f"nn.{name}": getattr(nn, name) for name in _TORCH if hasattr(nn, name)}
    return found


def wire_name(kind: type[nn.Module]) -> str:
    """`nn.Linear` for one of torch's, `package.module:Class` for a user's."""
    name = f"nn.{kind.__name__}"
    return name if torch_classes().get(name) is kind else f"{kind.__module__}:{kind.__qualname__}"


def arguments(module: nn.Module) -> dict[str, Any]:
    """What the constructor of a module must be given to make one like it, without its tensors.

    A class of a user's may say so itself by a method `remote_arguments`.

    Raises:
        Refused: a parameter of the constructor that left no attribute of its name.
    """
    told = getattr(module, "remote_arguments", None)
    if callable(told):
        return dict(told())
    kind = type(module)
    found = {}
    for name, default in _parameters(kind).items():
        read = next((_READ[base, name] for base in kind.__mro__ if (base, name) in _READ), None)
        if read is not None:
            found[name] = read(module)
        elif not hasattr(module, name):
            if default is inspect.Parameter.empty:
                raise Refused(
                    f"the argument {name} of {kind.__name__} cannot be told from the module: keep it in an attribute "
                    f"of that name, or give the class a method remote_arguments"
                )
        else:
            value = getattr(module, name)
            if name == "bias" and not isinstance(value, bool):
                value = value is not None
            found[name] = value
    return found


def _parameters(kind: type[nn.Module]) -> dict[str, Any]:
    """Names and defaults of the constructor's parameters that matter."""
    if kind.__init__ is nn.Module.__init__:
        return {}
    if kind in _PARAMETERS:
        return dict.fromkeys(_PARAMETERS[kind])
    found = {}
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Refused(f"{kind.__name__} takes any arguments: give the class a method remote_arguments")
        if parameter.name not in _SKIPPED and not parameter.name.startswith("_"):
            found[parameter.name] = parameter.default
    return found
