"""Tensors on the wire: what goes in comes out, and whatever a peer gets wrong is refused in words."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capture import rows
from shared import int4, int8, wire
from shared.pb.privatelora.v1 import private_lora_pb2 as pb
from shared.wire import WireError, decode, encode

DTYPES = list(wire.TORCH_DTYPES)
IDS = [wire.dtype_name(dtype) for dtype in DTYPES]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7,), (2, 3, 4), (0, 6)])
def test_what_goes_in_comes_out(dtype: int, shape: tuple[int, ...]) -> None:
    sent = noise(*shape).to(wire.TORCH_DTYPES[dtype])
    message = pb.Tensor.FromString(encode(sent, dtype).SerializeToString())
    got = decode(message, dtype=dtype, shape=shape, what="it")
    assert got.dtype == sent.dtype and torch.equal(got, sent)


@each_dtype
def test_the_bytes_are_little_endian_rows(dtype: int) -> None:
    message = encode(torch.tensor([[1.0, -2.0], [0.5, 3.0]]), dtype)
    assert message.dtype == dtype and list(message.shape) == [2, 2]
    expected = {
        pb.DTYPE_FLOAT32: np.array([1, -2, 0.5, 3], "<f4").tobytes(),
        pb.DTYPE_FLOAT16: np.array([1, -2, 0.5, 3], "<f2").tobytes(),
        pb.DTYPE_BFLOAT16: bytes.fromhex("803f00c0003f4040"),
        pb.DTYPE_FLOAT64: np.array([1, -2, 0.5, 3], "<f8").tobytes(),
    }
    assert message.data == expected[dtype]


@each_dtype
def test_a_transposed_tensor_is_sent_as_it_reads(dtype: int) -> None:
    sent = noise(4, 3).to(wire.TORCH_DTYPES[dtype]).T
    assert torch.equal(decode(encode(sent, dtype), dtype=dtype, shape=(3, 4), what="it"), sent)


def test_what_comes_out_may_be_written_to() -> None:
    message = encode(noise(2, 2), pb.DTYPE_FLOAT32)
    got = decode(message, dtype=pb.DTYPE_FLOAT32, shape=(2, 2), what="it")
    got.zero_()
    assert decode(message, dtype=pb.DTYPE_FLOAT32, shape=(2, 2), what="it").abs().max() > 0


def test_a_tensor_with_gradients_is_sent_without() -> None:
    sent = torch.ones(1, 2, requires_grad=True)
    assert not decode(
        encode(sent, pb.DTYPE_FLOAT32), dtype=pb.DTYPE_FLOAT32, shape=(1, 2), what="it"
    ).requires_grad


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(dtype: int, value: float) -> None:
    tensor = noise(3, 4)
    tensor[2, 3] = value
    with pytest.raises(WireError, match="codes: holds NaN or infinity"):
        decode(encode(tensor, dtype), dtype=dtype, shape=(3, 4), what="codes")


@each_dtype
def test_the_largest_finite_values_pass(dtype: int) -> None:
    info = torch.finfo(wire.TORCH_DTYPES[dtype])
    sent = torch.tensor([[info.max, info.min, info.tiny, -0.0]], dtype=wire.TORCH_DTYPES[dtype])
    assert torch.equal(decode(encode(sent, dtype), dtype=dtype, shape=(1, 4), what="it"), sent)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sign", [1, -1])
def test_float64_beyond_float32_is_no_float32_array(sign: int) -> None:
    largest = float(torch.finfo(torch.float32).max)
    for value in (1e39, torch.finfo(torch.float64).max, largest * (1 + 2**-24)):  # the last one rounds up
        message = encode(torch.tensor([[0.5, sign * value]], dtype=torch.float64), pb.DTYPE_FLOAT64)
        with pytest.raises(WireError, match="codes: holds a number beyond float32's range"):
            wire.decode_array(message, dtype=pb.DTYPE_FLOAT64, shape=(1, 2), what="codes")
    message = encode(torch.tensor([[1e-300, sign * largest]], dtype=torch.float64), pb.DTYPE_FLOAT64)
    array = wire.decode_array(message, dtype=pb.DTYPE_FLOAT64, shape=(1, 2), what="codes")
    assert array.dtype == np.float32 and array.tolist() == [[0.0, sign * largest]]


@pytest.mark.parametrize(("dtype", "width"), [(pb.DTYPE_FLOAT16, 5), (pb.DTYPE_BFLOAT16, 8)])
def test_every_pattern_of_sixteen_bits(dtype: int, width: int) -> None:
    """A pattern is refused exactly when its exponent is all ones."""
    exponent = ((1 << width) - 1) << (15 - width)
    for bits in range(0, 1 << 16, 7):
        message = pb.Tensor(dtype=dtype, shape=[1], data=bits.to_bytes(2, "little"))
        if bits & exponent == exponent:
            with pytest.raises(WireError):
                decode(message, dtype=dtype, shape=(1,), what="it")
        else:
            assert decode(message, dtype=dtype, shape=(1,), what="it").isfinite().all()


def test_an_overflow_of_float16_is_never_silent() -> None:
    with pytest.raises(WireError, match="infinity"):
        decode(encode(torch.tensor([1e6]), pb.DTYPE_FLOAT16), dtype=pb.DTYPE_FLOAT16, shape=(1,), what="it")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (pb.Tensor(), "dtype is unknown dtype 0, this session agreed on float32"),
        (pb.Tensor(dtype=pb.DTYPE_BFLOAT16, shape=[2, 3], data=bytes(12)), "dtype is bfloat16"),
        (
            pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[3, 2], data=bytes(24)),
            r"shape is \(3, 2\), expected \(2, 3\)",
        ),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[6], data=bytes(24)), r"shape is \(6,\)"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, 2, 3], data=bytes(24)), "shape"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, data=bytes(24)), r"shape is \(\)"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3], data=bytes(23)), "23 bytes of data, expected 24"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3], data=bytes(25)), "25 bytes"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3]), "0 bytes"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**32 - 1] * 3, data=b"x"), "shape"),
    ],
)
def test_what_was_not_agreed_is_refused(message: pb.Tensor, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(message, dtype=pb.DTYPE_FLOAT32, shape=(2, 3), what="it")


def test_a_message_about_a_long_shape_is_short() -> None:
    with pytest.raises(WireError) as error:
        decode(pb.Tensor(dtype=1, shape=[1] * 100_000), dtype=1, shape=(2, 3), what="it")
    assert len(str(error.value)) < 200


def test_a_long_shape_is_not_read_in_full() -> None:
    """Four million dimensions as Python numbers would take half a second and 100 MB."""
    message = pb.Tensor(dtype=1, shape=[1] * 4_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="shape"):
            decode(message, dtype=1, shape=(2, 3), what="it")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(raw=st.binary(max_size=64))
def test_any_bytes_are_a_tensor_or_an_error(raw: bytes) -> None:
    for dtype in DTYPES:
        size = len(raw) // wire.TORCH_DTYPES[dtype].itemsize
        try:
            got = decode(
                pb.Tensor(dtype=dtype, shape=[size], data=raw), dtype=dtype, shape=(size,), what="it"
            )
        except WireError:
            continue
        assert got.shape == (size,) and got.isfinite().all()


# --- int8 ---------------------------------------------------------------------------------------------------


def scaled(data: bytes, scales: list[float], shape: tuple[int, ...] = (2, 3)) -> pb.Tensor:
    return pb.Tensor(dtype=wire.INT8, shape=shape, data=data, scales=np.array(scales, "<f4").tobytes())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_int8_is_the_rounding_of_each_group(tokens: int, groups: int) -> None:
    sent = noise(tokens, 6) * torch.tensor([1e-3, 1e-3, 1.0, 1.0, 1e3, 1e3])
    message = pb.Tensor.FromString(encode(sent, wire.INT8, groups).SerializeToString())
    assert len(message.data) == 6 * tokens and len(message.scales) == 4 * groups * tokens
    assert len(message.data) + len(message.scales) == tokens * wire.row_bytes(wire.INT8, 6, groups)
    runs = sent.numpy().reshape(tokens * groups, 6 // groups)
    expected = int8.restore(*int8.quantise(runs)).reshape(tokens, 6)
    got = decode(message, dtype=wire.INT8, shape=(tokens, 6), what="it", groups=groups)
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), expected)
    array = wire.decode_array(message, dtype=wire.INT8, shape=(tokens, 6), what="it", groups=groups)
    assert np.array_equal(array, expected)
    filled = pb.Tensor()
    wire.fill_array(filled, sent.numpy(), wire.INT8, groups)
    assert filled == message


@pytest.mark.parametrize("kind", wire.TORCH_DTYPES.values())
def test_int8_of_any_dtype_and_strides(kind: torch.dtype) -> None:
    sent = noise(4, 3).to(kind).T
    again = encode(sent.to(torch.float32).contiguous(), wire.INT8)
    assert encode(sent, wire.INT8) == again


def test_the_bytes_of_int8() -> None:
    message = encode(torch.tensor([[127.0, -2.0], [0.0, 254.0]]), wire.INT8)
    assert message.data == bytes([127, 0xFE, 0, 127])
    assert message.scales == np.array([1, 2], "<f4").tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_int8_of_what_is_not_finite_is_refused(value: float) -> None:
    tensor = noise(3, 4).double()
    tensor[2, 3] = value
    with pytest.raises(WireError, match="codes: holds NaN or infinity in a scale"):
        decode(encode(tensor, wire.INT8, 2), dtype=wire.INT8, shape=(3, 4), what="codes", groups=2)


def test_int8_of_the_largest_numbers_comes_back_finite() -> None:
    sent = torch.tensor([[torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]])
    got = decode(encode(sent, wire.INT8), dtype=wire.INT8, shape=(1, 2), what="it")
    assert got.isfinite().all() and ((got - sent).abs() <= sent.abs() / 254).all()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (scaled(bytes(6), []), "it: 0 bytes of scales, expected 8"),
        (scaled(bytes(6), [1]), "it: 4 bytes of scales, expected 8"),
        (scaled(bytes(6), [1] * 3), "it: 12 bytes of scales, expected 8"),
        (scaled(bytes(6), [1, -1]), "it: a scale is negative"),
        (scaled(bytes(6), [1, np.nan]), "it: holds NaN or infinity"),
        (scaled(bytes(6), [1, np.inf]), "it: holds NaN or infinity"),
        (scaled(bytes(6), [1, -np.inf]), "it: holds NaN or infinity"),
        (scaled(bytes(6), [1, 2.7e36]), "it: a scale is so large that 127 times it is infinite"),
        (scaled(bytes(5) + b"\x80", [1, 1]), "it: holds -128"),
        (scaled(bytes(5), [1, 1]), "it: 5 bytes of data, expected 6"),
        (scaled(bytes(6), [1, 1], (3, 2)), r"it: shape is \(3, 2\), expected \(2, 3\)"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2, 3], data=bytes(24)), "agreed on int8"),
    ],
)
def test_int8_that_cannot_be(message: pb.Tensor, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(message, dtype=wire.INT8, shape=(2, 3), what="it")


def test_int8_that_was_not_agreed() -> None:
    with pytest.raises(WireError, match="it: dtype is int8, this session agreed on bfloat16"):
        decode(scaled(bytes(6), [1, 1]), dtype=pb.DTYPE_BFLOAT16, shape=(2, 3), what="it")


@given(data=st.binary(min_size=6, max_size=6), scales=st.binary(min_size=8, max_size=8))
def test_any_bytes_are_int8_or_an_error(data: bytes, scales: bytes) -> None:
    message = pb.Tensor(dtype=wire.INT8, shape=[2, 3], data=data, scales=scales)
    try:
        got = decode(message, dtype=wire.INT8, shape=(2, 3), what="it")
    except WireError:
        return
    assert got.shape == (2, 3) and got.isfinite().all()


def test_dtypes_have_names() -> None:
    assert wire.dtype_name(pb.DTYPE_BFLOAT16) == "bfloat16"
    assert wire.dtype_name(42) == "unknown dtype 42"
    assert {
        wire.WIRE_DTYPES[torch_dtype]: torch_dtype for torch_dtype in wire.WIRE_DTYPES
    } == wire.TORCH_DTYPES


# --- int4 ---------------------------------------------------------------------------------------------------


def halved(data: bytes, scales: list[float], shape: tuple[int, ...] = (2, 3)) -> pb.Tensor:
    bits = np.array(scales, "<f4").view("<u4") >> 16
    return pb.Tensor(dtype=wire.INT4, shape=shape, data=data, scales=bits.astype("<u2").tobytes())


@pytest.mark.parametrize(("width", "groups"), [(6, 1), (6, 3), (9, 3), (5, 1)])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_int4_is_the_rounding_of_each_group(tokens: int, width: int, groups: int) -> None:
    sent = noise(tokens, width) * torch.logspace(-3, 3, width)
    message = pb.Tensor.FromString(encode(sent, wire.INT4, groups).SerializeToString())
    assert len(message.data) == -(-width // 2) * tokens and len(message.scales) == 2 * groups * tokens
    assert len(message.data) + len(message.scales) == tokens * wire.row_bytes(wire.INT4, width, groups)
    runs = sent.numpy().reshape(tokens * groups, width // groups)
    expected = int4.restore(*int4.quantise(runs)).reshape(tokens, width)
    got = decode(message, dtype=wire.INT4, shape=(tokens, width), what="it", groups=groups)
    assert got.dtype == torch.float32 and np.array_equal(got.numpy(), expected)
    array = wire.decode_array(message, dtype=wire.INT4, shape=(tokens, width), what="it", groups=groups)
    assert np.array_equal(array, expected)
    filled = pb.Tensor()
    wire.fill_array(filled, sent.numpy(), wire.INT4, groups)
    assert filled == message
    if tokens:
        seen = rows(message).reshape(tokens, width)  # as the benchmarks read what they capture
        assert np.array_equal(seen, expected)


@pytest.mark.parametrize("kind", wire.TORCH_DTYPES.values())
def test_int4_of_any_dtype_and_strides(kind: torch.dtype) -> None:
    sent = noise(4, 3).to(kind).T
    assert encode(sent, wire.INT4) == encode(sent.to(torch.float32).contiguous(), wire.INT4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_int4_of_what_is_not_finite_is_refused(value: float) -> None:
    tensor = noise(3, 4).double()
    tensor[2, 3] = value
    with pytest.raises(WireError, match="codes: holds NaN or infinity in a scale"):
        decode(encode(tensor, wire.INT4, 2), dtype=wire.INT4, shape=(3, 4), what="codes", groups=2)


def test_int4_of_the_largest_numbers_comes_back_finite() -> None:
    sent = torch.tensor([[torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]])
    got = decode(encode(sent, wire.INT4), dtype=wire.INT4, shape=(1, 2), what="it")
    assert got.isfinite().all() and ((got - sent).abs() <= sent.abs() / 14).all()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (halved(bytes(4), []), "it: 0 bytes of scales, expected 4"),
        (halved(bytes(4), [1]), "it: 2 bytes of scales, expected 4"),
        (halved(bytes(4), [1] * 4), "it: 8 bytes of scales, expected 4"),
        (halved(bytes(4), [1, -1]), "it: a scale is negative"),
        (halved(bytes(4), [1, np.nan]), "it: holds NaN or infinity"),
        (halved(bytes(4), [1, np.inf]), "it: holds NaN or infinity"),
        (halved(bytes(4), [1, -np.inf]), "it: holds NaN or infinity"),
        (halved(bytes(4), [1, 5e37]), "it: a scale is so large that 7 times it is infinite"),
        (halved(b"\0\0\x08\0", [1, 1]), "it: holds -8; int4 goes from -7 to 7"),
        (halved(b"\0\0\0\x10", [1, 1]), "it: holds a number behind the end of a row"),
        (halved(bytes(3), [1, 1]), "it: 3 bytes of data, expected 4"),
        (halved(bytes(6), [1, 1]), "it: 6 bytes of data, expected 4"),
        (halved(bytes(4), [1, 1], (3, 2)), r"it: shape is \(3, 2\), expected \(2, 3\)"),
        (scaled(bytes(6), [1, 1]), "dtype is int8, this session agreed on int4"),
    ],
)
def test_int4_that_cannot_be(message: pb.Tensor, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode(message, dtype=wire.INT4, shape=(2, 3), what="it")


def test_int4_that_was_not_agreed() -> None:
    with pytest.raises(WireError, match="it: dtype is int4, this session agreed on int8"):
        decode(halved(bytes(4), [1, 1]), dtype=wire.INT8, shape=(2, 3), what="it")


@given(data=st.binary(min_size=4, max_size=4), scales=st.binary(min_size=4, max_size=4))
def test_any_bytes_are_int4_or_an_error(data: bytes, scales: bytes) -> None:
    message = pb.Tensor(dtype=wire.INT4, shape=[2, 3], data=data, scales=scales)
    try:
        got = decode(message, dtype=wire.INT4, shape=(2, 3), what="it")
    except WireError:
        return
    assert got.shape == (2, 3) and got.isfinite().all()
