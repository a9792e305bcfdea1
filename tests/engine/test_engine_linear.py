"""Every form of a matrix product against torch's own, whatever sizes, rows and order of filling."""

import subprocess
import sys

import pytest
import torch
from ralmq.workers.engine import int8, linear
from ralmq.workers.engine.int8 import Int8
from ralmq.workers.engine.linear import Blocked, Linear, Packed, Plain, empty, parts_of
from torch import Tensor
from torch.nn import functional

CPU = torch.device("cpu")
SIZES = [(64, 64), (200, 96), (130, 1000), (65, 3072), (1, 1800), (768, 768)]  # outputs, inputs
ROWS = [0, 1, 2, 3, 15, 16, 17, 33, 64]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def filled(made: Linear, weight: Tensor, bias: Tensor | None, *, cut: int) -> Linear:
    """Filled in two goes, as from two tensors that are stacked."""
    made.fill(0, weight[:cut])
    made.fill(cut, weight[cut:])
    made.bias = bias
    return made.finished()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_blocked_matrix_is_the_plain_one(outputs: int, inputs: int, rows: int) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    for bias in (None, torch.randn(outputs)):
        for cut in (0, outputs // 3, min(64, outputs)):
            made = filled(Blocked(outputs, inputs), weight, bias, cut=cut)
            got, expected = made(x), functional.linear(x.double(), weight.double()).float()
            assert got.shape == (rows, outputs) and got.is_contiguous()
            assert torch.allclose(got, expected if bias is None else expected + bias, atol=2e-6 * inputs**0.5 * 4)


def test_a_blocked_matrix_is_filled_by_columns_too() -> None:
    weight = torch.randn(200, 3072).half()
    whole, pieces = Blocked(200, 3072), Blocked(200, 3072)
    whole.fill(0, weight)
    for start, end in ((0, 100), (100, 900), (900, 3072)):
        pieces.fill(0, weight[:70, start:end], start)
        pieces.fill(70, weight[70:, start:end], start)
    x = torch.randn(3, 3072)
    assert torch.equal(whole(x), pieces(x))
    ids = torch.tensor([0, 63, 64, 199, 64])
    assert torch.equal(pieces.rows(ids), weight[ids].float())


def test_a_row_of_a_blocked_matrix_is_the_same_wherever_it_stands_among_sixteen() -> None:
    made = filled(Blocked(300, 768), torch.randn(300, 768), None, cut=0)
    x = torch.randn(16, 768)
    order = torch.randperm(16)
    assert torch.equal(made(x)[order], made(x[order]))


def test_small_products_stay_below_the_bound_of_their_kernels() -> None:
    for inputs in range(64, 9000, 32):
        parts = parts_of(inputs)
        if parts is not None:
            assert inputs % parts == 0 and inputs // parts * linear.WIDTH * linear.GROUP <= linear.SMALL
    assert parts_of(768) == 1 and parts_of(3072) == 4
    assert parts_of(4099) is None  # a prime


@pytest.mark.skipif(not linear.onednn_packs(), reason="this torch packs nothing")
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_packed_matrix_is_the_plain_one(rows: int) -> None:
    weight, bias, x = torch.randn(512, 512), torch.randn(512), torch.randn(rows, 512)
    made = filled(Plain(torch.empty(512, 512), packed=True), weight, bias, cut=100)
    assert isinstance(made, Packed) and made.nbytes == weight.nbytes
    assert torch.allclose(made(x), functional.linear(x, weight, bias), atol=1e-4)


def test_what_is_small_stays_plain() -> None:
    made = filled(Plain(torch.empty(8, 8), packed=True), torch.randn(8, 8), None, cut=0)
    assert isinstance(made, Plain)
    assert isinstance(empty(8, 8, torch.float32, CPU, packed=True), Plain)


def test_the_form_depends_on_sizes_threads_and_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "blas_blocks", lambda: True)
    assert isinstance(empty(768, 768, torch.float32, CPU, packed=True), Blocked)
    for made in (
        empty(768, 768, torch.float32, CPU),
        empty(768, 768, torch.bfloat16, CPU, packed=True),
        empty(768, 4099, torch.float32, CPU, packed=True),
        empty(768, 768, torch.float32, torch.device("meta"), packed=True),
    ):
        assert isinstance(made, Plain)
    torch.set_num_threads(2)
    assert isinstance(empty(768, 768, torch.float32, CPU, packed=True), Plain)
    torch.set_num_threads(1)
    monkeypatch.setattr(linear, "blas_blocks", lambda: False)
    assert isinstance(empty(768, 768, torch.float32, CPU, packed=True), Plain)


def test_without_their_products_a_matrix_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_packs", lambda: False)
    monkeypatch.setattr(int8, "fbgemm_quantizes", lambda: False)
    monkeypatch.setattr(int8, "onednn_quantizes", lambda: False)
    weight, x = torch.randn(512, 512), torch.randn(4, 512)
    assert isinstance(filled(Plain(torch.empty(512, 512), packed=True), weight, None, cut=0), Plain)
    made = filled(Int8(512, 512, CPU, packed=True), weight, None, cut=0)
    assert relative(made(x), functional.linear(x, weight)) < 0.01


def relative(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of what is expected."""
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=["fbgemm", "onednn", ""])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each kernel that this torch and processor have, and none."""
    if request.param and not getattr(int8, f"{request.param}_quantizes")():
        pytest.skip(f"this torch or processor multiplies no int8 with {request.param}")
    monkeypatch.setattr(int8, "fbgemm_quantizes", lambda: request.param == "fbgemm")
    return bool(request.param)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_int8_stays_near(outputs: int, inputs: int, rows: int, packed: bool) -> None:
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    for added in (None, bias):
        made = filled(Int8(outputs, inputs, CPU, packed), weight, added, cut=outputs // 3)
        got, expected = made(x), functional.linear(x, weight, added)
        assert got.shape == expected.shape
        assert made.nbytes == outputs * (inputs + 4)
        if rows:
            assert 0 < relative(got, expected) < (0.03 if packed else 0.015)


def test_int8_without_rounded_activations_is_the_dequantized_product() -> None:
    weight, x = torch.randn(700, 3000) * torch.rand(700, 1), torch.randn(5, 3000)  # more than one tile
    made = filled(Int8(700, 3000, CPU, packed=False), weight, None, cut=0)
    scale = weight.abs().amax(1, keepdim=True) / 127
    near = (weight / scale).round() * scale
    assert torch.allclose(made(x), functional.linear(x, near), atol=1e-3)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half.float(), made(x)) < 0.02


def test_int8_takes_whole_rows_alone() -> None:
    with pytest.raises(AssertionError, match="a scale is of a row"):
        Int8(8, 8, CPU, packed=False).fill(0, torch.ones(8, 4), 2)


def test_an_int8_row_is_the_same_bits_whatever_is_beside_it(packed: bool) -> None:
    if not packed:
        pytest.skip("torch's own product of floats")
    made = filled(Int8(500, 768, CPU, packed), torch.randn(500, 768), torch.randn(500), cut=0)
    x = torch.randn(40, 768) * torch.logspace(-3, 3, 40)[:, None]
    assert torch.equal(made(x), torch.cat([made(row[None]) for row in x]))


def test_int8_of_zeros_and_of_what_is_no_number(packed: bool) -> None:
    weight = torch.randn(64, 64)
    weight[3] = 0
    made = filled(Int8(64, 64, CPU, packed), weight, None, cut=0)
    x = torch.zeros(3, 64)
    x[1] = 1
    x[2, 5] = float("nan")
    got = made(x)
    assert not got[0].any() and got[1].isfinite().all() and got[1, 3] == 0
    assert got[2].isnan().any()


def test_both_kernels_of_int8_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (int8.fbgemm_quantizes() and int8.onednn_quantizes()):
        pytest.skip("one of them is not there")
    weight, bias, x = torch.randn(300, 768), torch.randn(300), torch.randn(9, 768)
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    found = []
    for there in (True, False):
        monkeypatch.setattr(int8, "fbgemm_quantizes", lambda there=there: there)
        made = filled(Int8(300, 768, CPU, packed=True), weight, bias, cut=0)
        assert isinstance(made, Int8) and not made._codes.untyped_storage().nbytes()  # held once
        found.append(made(x))
    assert torch.backends.quantized.engine == "qnnpack"  # what others have set stays
    assert relative(*found) < 1e-4  # numbers halfway between two integers go either way


@pytest.mark.parametrize("fault", ["saturates", "zero", "order", "one row", "missing"])
def test_a_kernel_that_is_wrong_is_not_taken(fault: str) -> None:
    def kernel(codes: Tensor, scale: Tensor) -> int8.Product:
        if fault == "missing":
            raise RuntimeError("no such engine")
        weight = codes.float().flip(0) if fault == "order" else codes.float()

        def product(x: Tensor) -> Tensor:
            out = (x * 127).round() @ weight.t() / 127 + (1 if fault == "zero" else 0)
            if fault == "one row" and len(x) == 1:
                out += 1
            return out.clamp(max=9000) if fault == "saturates" else out

        return product

    assert not int8.exact(kernel)


def test_a_kernel_that_is_right_is_taken() -> None:
    assert int8.exact(lambda codes, scale: lambda x: x @ codes.float().t())


def test_int8_says_nothing_of_what_torch_will_end() -> None:
    """torch tells of it once a process."""
    code = "import torch; from ralmq.workers.engine.int8 import Int8; a = Int8(64, 64, torch.device('cpu'), True)"
    command = [sys.executable, "-c", f"{code}; a.fill(0, torch.ones(64, 64)); a.finished()"]
    assert not subprocess.run(command, capture_output=True, text=True, check=True).stderr
