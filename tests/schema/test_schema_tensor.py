"""Tensors: every dtype and memory layout, without a copy where none is needed; what cannot travel is refused."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from ralmq.schema.codec import decode, encode
from ralmq.schema.errors import Malformed
from ralmq.schema.limits import MAX_DIMS, MAX_MESSAGE, MAX_TENSORS_INLINE
from ralmq.schema.message import Request
from ralmq.schema.tensor import DTYPES, Tensor, checked_size, tensor_of
from schema_samples import address, described

NUMPY_NAMES = {name: numpy_name for name, (numpy_name, _) in DTYPES.items() if name != "bf16"}
TORCH_DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u64": torch.uint64,
    "u32": torch.uint32,
    "u16": torch.uint16,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def sent(value: Any) -> Tensor:
    """The tensor as the other side receives it."""
    frames = [bytes(frame) for frame in encode(Request("echo", tensors=[value]))]
    tensor = decode(frames)[1].tensors[0]
    assert isinstance(tensor, Tensor)
    return tensor


@pytest.mark.parametrize("rows", [3, 3000])
@pytest.mark.parametrize("name", sorted(NUMPY_NAMES))
def test_every_numpy_dtype(name: str, rows: int) -> None:
    array = (np.arange(rows * 4) % 2).reshape(rows, 4).astype(NUMPY_NAMES[name])
    tensor = sent(array)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (name, (rows, 4), array.nbytes)
    back = tensor.numpy()
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_every_torch_dtype(name: str) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(TORCH_DTYPES[name])
    tensor = sent(value)
    assert (tensor.dtype, tensor.shape) == (name, (2, 3))
    assert tensor.nbytes == 6 * DTYPES[name][1] == value.numel() * value.element_size()
    np.testing.assert_array_equal(tensor.numpy().astype(np.int64), [[0, 1, 1], [1, 0, 1]])


def test_the_table_holds_every_dtype_once() -> None:
    assert set(DTYPES) == set(TORCH_DTYPES)
    for name, (numpy_name, size) in DTYPES.items():
        assert np.dtype(numpy_name).itemsize == size == TORCH_DTYPES[name].itemsize


def layouts() -> dict[str, np.ndarray[Any, Any]]:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    locked = base.copy()
    locked.flags.writeable = False
    return {
        "plain": base,
        "scalar": np.array(2.5, dtype=np.float32),
        "empty": np.empty((0, 3), dtype=np.float32),
        "empty inside": np.empty((2, 0, 4), dtype=np.int64),
        "transposed": base.transpose(2, 0, 1),
        "fortran": np.asfortranarray(base),
        "strided": base[:, ::2, 1:3],
        "negative strides": base[::-1, :, ::-1],
        "broadcast": np.broadcast_to(np.arange(3, dtype=np.int32), (4, 3)),
        "read-only": locked,
        "byte-swapped": base.astype(">f4"),
        "byte-swapped, transposed": base.astype(">f4").T,
        "byte-swapped scalar": np.array(7, dtype=">i8"),
        "misaligned": np.frombuffer(b"\x00" + base.tobytes(), dtype=np.uint8)[1:].view(np.float32),
        "bool": base > 11,
        "eight dimensions": base.reshape(1, 2, 1, 3, 1, 4, 1, 1),
    }


@pytest.mark.parametrize("case", list(layouts()))
def test_numpy_layouts_arrive_as_they_were(case: str) -> None:
    array = layouts()[case]
    back = sent(array).numpy()
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, np.asarray(array))


def test_numpy_scalars_are_tensors_without_dimensions() -> None:
    assert described(np.float32(1.5)) == ("f32", (), np.float32(1.5).tobytes())
    assert sent(np.bool_(True)).numpy() == np.True_


def torch_layouts() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return {
        "plain": base,
        "scalar": torch.tensor(2.5),
        "scalar bf16": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "empty bf16": torch.empty(2, 0, dtype=torch.bfloat16),
        "transposed": base.transpose(0, 2),
        "transposed bf16": base.to(torch.bfloat16).transpose(0, 2),
        "offset": base[1, 1:],
        "strided": base[:, ::2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "requires_grad": base.clone().requires_grad_(),
        "computed": base.clone().requires_grad_() * 2,
        "parameter": torch.nn.Parameter(base.clone()),
        "negated lazily": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "negated lazily, contiguous": torch.tensor([1 + 2j]).conj().imag,
        "inference": torch.inference_mode()(lambda: base + 1)(),
    }


@pytest.mark.parametrize("case", list(torch_layouts()))
def test_torch_layouts_arrive_as_they_were(case: str) -> None:
    value = torch_layouts()[case]
    back = sent(value).numpy()
    assert back.shape == tuple(value.shape)
    np.testing.assert_array_equal(back, value.detach().float().resolve_neg().numpy())


def test_bf16_travels_as_its_own_bits() -> None:
    bits = np.array([0x3F80, 0xBF80, 0x0001, 0x7F80, 0xFF80, 0x7F7F, 0x4049], dtype=np.uint16)
    value = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    tensor = sent(value)
    assert (tensor.dtype, bytes(tensor.buffer)) == ("bf16", bits.tobytes())
    back = tensor.numpy()
    assert back.dtype == np.float32
    assert back.tobytes() == value.float().numpy().tobytes()


@pytest.mark.parametrize("name", ["f32", "bf16", "bool"])
def test_torch_memory_is_shared_not_copied(name: str) -> None:
    value = torch.zeros(200, 100, dtype=TORCH_DTYPES[name])[50:]
    frames = encode(Request("echo", tensors=[value]))
    assert address(frames[1]) == value.data_ptr()
    value[0, 0] = 1
    assert bytes(frames[1][: value.element_size()]) != bytes(value.element_size())


def test_numpy_memory_is_shared_not_copied() -> None:
    array = np.zeros((200, 100), dtype=np.float32)[50:]
    frames = encode(Request("echo", tensors=[array]))
    assert address(frames[1]) == array.ctypes.data
    tensor = decode(frames)[1].tensors[0]
    assert tensor.numpy().ctypes.data == array.ctypes.data
    array[0, 0] = 7
    assert tensor.numpy()[0, 0] == 7


def test_a_frame_keeps_the_tensor_alive_and_lets_it_go() -> None:
    value = torch.full((3000,), 5.0)
    memory = weakref.ref(value.untyped_storage())
    expected = value.numpy().tobytes()
    frames = encode(Request("echo", tensors=[value]))
    del value
    gc.collect()
    assert memory() is not None
    assert bytes(frames[1]) == expected
    array = np.ones(3000)
    seen = weakref.ref(array)
    more = encode(Request("echo", tensors=[array]))
    del array
    assert seen() is not None and len(more) == 2
    del more
    assert seen() is None
    del frames
    gc.collect()
    assert memory() is None


def test_a_frame_does_not_keep_what_a_gradient_would_need() -> None:
    factor = torch.full((3000,), 2.0)
    saved = weakref.ref(factor.untyped_storage())
    frames = encode(Request("echo", tensors=[torch.ones(3000, requires_grad=True) * factor]))
    assert len(frames) == 2 and saved() is not None
    del factor
    gc.collect()
    assert saved() is None


def test_a_received_tensor_is_a_view_of_its_frame() -> None:
    frames = [bytes(frame) for frame in encode(Request("echo", tensors=[np.arange(5000.0), np.arange(4.0)]))]
    large, small = decode(frames)[1].tensors
    assert large.numpy().ctypes.data == address(frames[1])
    assert small.numpy().ctypes.data == address(frames[0]) + len(frames[0]) - 32


def test_a_received_array_is_read_only_wherever_it_lies() -> None:
    frame = bytearray(b"\x00" * 33)
    for start in (0, 1):  # aligned: a view; misaligned: a copy
        array = Tensor("f32", (2, 4), memoryview(frame)[start : start + 32]).numpy()
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_misaligned_bytes_are_copied_where_they_are_used() -> None:
    expected = np.arange(8, dtype=np.float64)
    frame = b"\x00" + expected.tobytes()
    array = Tensor("f64", (2, 4), memoryview(frame)[1:]).numpy()
    assert array.flags.aligned
    np.testing.assert_array_equal(array, expected.reshape(2, 4))


def test_a_received_tensor_can_be_sent_on_without_a_copy() -> None:
    array = np.arange(5000, dtype=np.int16)
    tensor = decode(encode(Request("echo", tensors=[array])))[1].tensors[0]
    assert address(encode(Request("echo", tensors=[tensor]))[1]) == array.ctypes.data


def test_a_tensor_says_what_it_is() -> None:
    assert repr(tensor_of(np.zeros((2, 3), np.int8))) == "Tensor(i8, [2, 3])"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (Tensor("f99", (1,), b"\x00"), "unknown dtype"),
        (Tensor("f32", (2,), b"\x00" * 4), "4 bytes, its shape says 8"),
        (Tensor("u8", (-1,), b""), "dimension"),
        (Tensor("u8", (3,), "abc"), "cannot travel"),
        (Tensor("u8", (2,), memoryview(b"abcd")[::2]), "cannot travel"),
    ],
)
def test_a_tensor_built_by_hand_is_checked(tensor: Tensor, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        tensor_of(tensor)


def test_a_tensor_built_by_hand_may_hold_any_buffer() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert described(Tensor("i32", (2, 3), memoryview(array))) == described(array)
    assert described(Tensor("i32", (0, 3), memoryview(array[:0]))) == ("i32", (0, 3), b"")
    assert described(Tensor("i32", [2, 3], bytearray(array.tobytes()))) == described(array)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1.0, 2.0], "a list is no tensor: pass a numpy array or a torch tensor"),
        (1.0, "a float is no tensor"),
        (None, "a NoneType is no tensor"),
        (np.array(["a"]), "does not travel: cast to one of f64"),
        (np.array([object()]), "dtype object does not travel"),
        (np.zeros(1, dtype=np.complex64), "dtype complex64 does not travel"),
        (np.zeros(1, dtype=np.longdouble), "does not travel"),
        (np.zeros(1, dtype=[("a", np.int8)]), "does not travel"),
        (np.zeros(1, dtype="datetime64[s]"), "does not travel"),
        (torch.zeros(1, dtype=torch.complex64), "dtype torch.complex64 does not travel: cast to one of f64"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), "does not travel"),
        (torch.eye(3).to_sparse(), "sparse or meta tensor does not travel: make it a dense one"),
        (torch.empty(3, device="meta"), "make it a dense one"),
        (np.zeros((1,) * (MAX_DIMS + 1)), "at most 8 dimensions: reshape it"),
        (torch.zeros((1,) * (MAX_DIMS + 1)), "at most 8 dimensions: reshape it"),
    ],
)
def test_what_is_no_tensor_is_refused_with_what_to_do(value: Any, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        tensor_of(value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused() -> None:
    value = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(Malformed, match="a nested, sparse or meta tensor does not travel: make it a dense one"):
        tensor_of(value)


@pytest.mark.parametrize(
    "value",
    [
        np.broadcast_to(np.float32(0), (1 << 14, 1 << 14)),  # four bytes here, 1 GiB when copied
        torch.zeros(1).expand(1 << 14, 1 << 14),
        np.broadcast_to(np.int8(0), (1 << 29,)),
    ],
)
def test_an_oversize_tensor_is_refused_before_it_is_made_contiguous(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(*_: Any) -> Any:
        raise AssertionError("copied before it was measured")

    monkeypatch.setattr(np, "ascontiguousarray", copied)
    monkeypatch.setattr(torch.Tensor, "contiguous", copied)
    with pytest.raises(Malformed, match=str(MAX_MESSAGE)):
        tensor_of(value)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("f32", [], 4),
        ("bool", [0], 0),
        ("f64", [2, 3], 48),
        ("u8", [MAX_MESSAGE], MAX_MESSAGE),
        ("i16", [MAX_MESSAGE // 4, 2], MAX_MESSAGE),
        ("bf16", [1] * MAX_DIMS, 2),
        ("f32", [0, 1 << 20, 1 << 20], 0),
    ],
)
def test_the_size_of_a_descriptor(dtype: str, shape: list[int], size: int) -> None:
    assert checked_size(dtype, shape) == size


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("f128", [1]),
        (None, [1]),
        (b"f32", [1]),
        (["f32"], [1]),
        ("f32", None),
        ("f32", "1"),
        ("f32", {}),
        ("f32", [1] * (MAX_DIMS + 1)),
        ("f32", [-1]),
        ("f32", [True]),
        ("f32", [1.0]),
        ("f32", [None]),
        ("u8", [MAX_MESSAGE + 1]),
        ("u8", [2, MAX_MESSAGE // 2 + 1]),
        ("i16", [MAX_MESSAGE // 2 + 1]),
        ("u8", [1 << 28] * 8),
        ("u8", [0, 1 << 28, 1 << 28]),  # no bytes, but more than numpy can count
        ("u8", [1 << 28, 1 << 28, 0]),
    ],
)
def test_a_descriptor_out_of_range_is_refused(dtype: Any, shape: Any) -> None:
    with pytest.raises(Malformed, match="a tensor"):
        checked_size(dtype, shape)


def test_any_shape_that_is_accepted_can_be_used() -> None:
    shape = [0, 1 << 20, 1 << 20, 1 << 5]
    assert checked_size("f64", shape) == 0
    assert Tensor("f64", tuple(shape), b"").numpy().shape == tuple(shape)
    assert Tensor("bf16", (*shape, 4), b"").numpy().shape == (*shape, 4)


def test_small_tensors_ride_in_frame_0_at_multiples_of_16_bytes() -> None:
    sizes = [1, 15, 16, 17, 0, 3, 4000]
    arrays = [np.full(size, size % 251, dtype=np.uint8) for size in sizes]
    for text in ("", "a", "ab" * 7):  # whatever lies before them
        frames = encode(Request("echo", body={"text": text}, tensors=arrays))
        assert len(frames) == 1
        for size, tensor in zip(sizes, decode(frames)[1].tensors, strict=True):
            assert bytes(tensor.buffer) == bytes([size % 251]) * size
            if size:
                assert (address(tensor.buffer) - address(frames[0])) % 16 == 0


@pytest.mark.parametrize(("size", "frames"), [(MAX_TENSORS_INLINE, 1), (MAX_TENSORS_INLINE + 1, 2)])
def test_which_tensors_ride_inline(size: int, frames: int) -> None:
    message = Request("echo", tensors=[np.zeros(size, dtype=np.uint8)])
    assert len(encode(message)) == frames


def test_inline_tensors_share_one_bound() -> None:
    half = np.ones(MAX_TENSORS_INLINE // 2, dtype=np.uint8)
    frames = encode(Request("echo", tensors=[half, half, half, np.empty(0)]))
    assert [len(frame) for frame in frames[1:]] == [len(half)]
    tensors = decode(frames)[1].tensors
    assert [tensor.shape for tensor in tensors] == [(4096,), (4096,), (4096,), (0,)]
    assert all(bytes(tensor.buffer) == half.tobytes() for tensor in tensors[:3])
