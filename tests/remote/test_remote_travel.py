"""What modules travel, equal in what they give, and what is refused with its reason."""

from typing import Any

import pytest
import ralmq
import torch
from ralmq.errors import NoService, Refused
from ralmq.remote.chunks import Staging, cut, pieces, sizes, specs
from ralmq.remote.classes import torch_classes
from ralmq.remote.tree import received, shipped
from ralmq.schema.errors import Malformed
from ralmq.schema.tensor import tensor_of
from remote_modules import Block, Plain, Unlisted
from remote_served import Served
from torch import nn
from torch.nn.utils import parametrizations

SEQUENCE = (2, 5, 8)
MODULES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 3, bias=False), (4, 8)),
    (nn.Sequential(nn.Linear(8, 8), nn.GELU("tanh"), nn.LayerNorm(8, eps=1e-3), nn.Dropout(0.3)), (4, 8)),
    (nn.Conv2d(3, 4, 3, padding=1, stride=2, groups=1, padding_mode="reflect"), (2, 3, 9, 9)),
    (nn.Conv1d(4, 4, 3, padding="same", dilation=2, bias=False), (2, 4, 9)),
    (nn.ConvTranspose2d(3, 4, 3, output_padding=1, stride=2), (2, 3, 5, 5)),
    (nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()), (2, 3, 8, 8)),
    (nn.GroupNorm(2, 4), (2, 4, 3)),
    (nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True, proj_size=3), SEQUENCE),
    (nn.GRU(8, 6, bias=False), SEQUENCE),
    (nn.RNN(8, 6, nonlinearity="relu"), SEQUENCE),
    (nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True), SEQUENCE),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8)), SEQUENCE),
    (nn.PReLU(8), (4, 8)),
    (nn.Sequential(nn.Linear(8, 8), nn.Sequential()), (4, 8)),  # an empty one counts as false
    (nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True), (1, 2, 4, 4)),
    (nn.Softmax(dim=-1), (4, 8)),
    (Block(nn.Sequential(nn.Linear(8, 8), nn.SiLU()), 8, scale=0.5), (4, 8)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES, ids=lambda value: type(value).__name__)
def test_a_copy_gives_the_same(served: Served, module: nn.Module, shape: tuple[int, ...]) -> None:
    module.eval()
    x = torch.randn(shape)
    found, wanted = ralmq.remote_copy(module, "one")(x).to_here(), module(x)
    for one, other in zip(*([v] if isinstance(v, torch.Tensor) else [v[0]] for v in (found, wanted)), strict=True):
        assert torch.equal(one, other)


def test_embeddings_and_losses(served: Served) -> None:
    embedding = nn.Embedding(10, 4, padding_idx=0)
    ids = torch.tensor([[1, 0, 9]])
    assert torch.equal(ralmq.remote_copy(embedding, "one")(ids).to_here(), embedding(ids))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]), label_smoothing=0.1)
    logits, target = torch.randn(3, 2), torch.tensor([0, 1, 1])
    assert torch.equal(ralmq.remote_copy(loss, "one")(logits, target).to_here(), loss(logits, target))


def test_attention(served: Served) -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=6, vdim=5, batch_first=True).eval()
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    found, weights = ralmq.remote_copy(attention, "one")(q, k, v).to_here()
    assert torch.equal(found, attention(q, k, v)[0]) and torch.equal(weights, attention(q, k, v)[1])


def test_every_class_that_is_listed_exists() -> None:
    assert len(torch_classes()) > 90


def test_tied_parameters_stay_tied(served: Served) -> None:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    shipment = shipped(nn.Sequential(embedding, head))
    assert len(shipment.tensors) == 1
    classes = torch_classes()
    again = received(shipment.body, [tensor.clone() for tensor in shipment.tensors], classes)
    assert again[0].weight is again[1].weight  # type: ignore[index]


def test_flags_travel(served: Served) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module[0].weight.requires_grad_(False)
    module[1].eval()
    shipment = shipped(module)
    again = received(shipment.body, shipment.tensors, torch_classes())
    assert [p.requires_grad for p in again.parameters()] == [False, True]
    assert [part.training for part in again.modules()] == [True, True, False]


def changed() -> nn.Module:
    module = nn.LayerNorm(4)
    module.eps = 0.5  # this travels
    module.extra = 3  # type: ignore[assignment]
    return module


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    return nn.Sequential(module)


def patched() -> nn.Module:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def grown() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("more", torch.zeros(1))
    return module


def local_class() -> nn.Module:
    class Within(nn.Module):
        pass

    return Within()


REFUSED: list[tuple[Any, str]] = [
    (hooked, r"hooks .*\(at 0\): remove them"),
    (patched, "forward was replaced"),
    (changed, "extra does not travel"),
    (grown, "other tensors than its class"),
    (local_class, "defined within a function"),
    (Plain, "scale, a tensor, .* register_buffer"),
    (Unlisted, ",remote_modules:Unlisted"),
    (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "parametriz"),
    (lambda: nn.TransformerEncoderLayer(8, 2, activation=lambda x: x), "activation"),
    (lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "compiled"),
    (lambda: Block(nn.Identity(), 4, scale=lambda: 1), "lambda"),  # type: ignore[arg-type]
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_cannot_travel_is_refused_with_the_reason(served: Served, make: Any, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        ralmq.remote_copy(make(), "one")


def test_modules_by_name(served: Served) -> None:
    module = ralmq.remote("nn.Linear", "one", in_features=3, out_features=2)
    assert module(torch.zeros(1, 3)).shape == (1, 2) and len(module.parameters()) == 2
    assert ralmq.remote("Odd", "one", size=2)(torch.ones(1, 2))["double"].to_here().tolist() == [[2, 2]]
    for name, match in (("os:system", "no module called"), ("nn.Nothing", "no module called"), ("Linear", "no module")):
        with pytest.raises(Refused, match=match):
            ralmq.remote(name, "one")
    with pytest.raises(Refused, match="cannot be built"):
        ralmq.remote("nn.Linear", "one", inputs=3)
    with pytest.raises(NoService):
        ralmq.remote("nn.Linear", "nobody", in_features=1, out_features=1)
    with pytest.raises(Refused, match="cannot be on"):
        ralmq.remote_copy(nn.Linear(1, 1), "one", device="cuda:99")


def test_a_tree_from_elsewhere_builds_only_what_is_listed(served: Served) -> None:
    peer = served.home.peer("one")
    for tree in ({"class": "os:system", "args": {"command": "true"}}, {"class": 3}, "nn.Linear", None):
        out = peer.number()
        staging = peer.number()
        peer.ask("stage", {"specs": [], "out": staging}).result()
        body = {"tree": tree, "named": {}, "eval": [], "staging": staging, "out": out}
        with pytest.raises(Refused):
            peer.ask("copy", body).result()


def test_pieces_cover_all_bytes_and_damage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ralmq.remote.chunks.CHUNK", 64)
    tensors = [torch.randn(33), torch.zeros(0, 3), torch.randint(0, 9, (7,), dtype=torch.int8), torch.tensor(3.0)]
    staging = Staging(specs(tensors))
    with pytest.raises(Malformed, match="missing"):
        staging.complete()
    for where in pieces(sizes(tensors)):
        digest, found = cut(tensors, where)
        assert sum(map(len, found)) <= 64
        with pytest.raises(Malformed, match="hash"):
            staging.put(where, [tensor_of(part) for part in found], "0" * 64)
        staging.put(where, [tensor_of(part) for part in found], digest)
    assert all(torch.equal(one, other) for one, other in zip(staging.complete(), tensors, strict=True))
