"""The lossy codecs: their bytes, their bounds, and what they refuse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvtier.errors import GeometryError
from kvtier.gpu.quantise import Dtype, Loss, Values, decode, dtype_of, encode

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of a value, and of the largest value of its vector.
BOUNDS = {"int8": (0.0, 0.5 / 127), "fp8": (1 / 16 + 1e-3, 2.0**-10 / 448 * 1.01)}
# Rounding to the pool's own dtype.
GRAIN = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}


def raw(of: npt.NDArray[np.float32], dtype: Dtype) -> npt.NDArray[np.uint8]:
    tensor = torch.from_numpy(of).to(TORCH[dtype])
    return tensor.view(torch.uint8).reshape(-1).numpy()


def real(of: npt.NDArray[np.uint8], dtype: Dtype) -> npt.NDArray[np.float64]:
    return torch.from_numpy(of).view(TORCH[dtype]).double().numpy()


def there_and_back(
    given_: npt.NDArray[np.uint8], values: Values, codec: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], Loss]:
    encoded = np.full(values.encoded_bytes(given_.nbytes), 0xA5, np.uint8)
    back = np.full(given_.nbytes, 0x5A, np.uint8)
    loss = encode(given_, values, codec, encoded)
    decode(encoded, values, codec, back)
    return encoded, back, loss


vectors = st.sampled_from([1, 2, 16, 128]).flatmap(
    lambda d: arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.just(d)),
        elements=st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
    )
)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@given(of=vectors)
def test_what_a_value_loses_is_bounded(of: npt.NDArray[np.float32], dtype: Dtype, codec: str) -> None:
    values = Values(dtype, of.shape[1])
    given_ = raw(of, dtype)
    _, back, loss = there_and_back(given_, values, codec)
    before = real(given_, dtype).reshape(of.shape)
    after = real(back, dtype).reshape(of.shape)
    largest = np.abs(before).max(axis=1, keepdims=True)
    of_value, of_largest = BOUNDS[codec]
    grain = GRAIN[dtype] * np.maximum(np.abs(before), np.abs(after)) * 1.1 + (
        2.0**-24 if dtype == "fp16" else 6e-36
    )
    allowed = of_value * np.abs(before) + of_largest * largest * (1 + 1e-5) + grain
    assert (np.abs(after - before) <= allowed).all()
    assert loss.value_squares == pytest.approx((before**2).sum())


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_the_measured_loss_is_the_real_one(codec: str) -> None:
    of = np.random.default_rng(3).standard_normal((400, 64), np.float32)
    given_ = raw(of, "fp32")
    _, back, loss = there_and_back(given_, Values("fp32", 64), codec)
    lost = real(back, "fp32") - real(given_, "fp32")
    assert loss.relative == pytest.approx(np.sqrt((lost**2).sum() / (of.astype(float) ** 2).sum()), rel=1e-4)
    assert 0.001 < loss.relative < {"int8": 0.01, "fp8": 0.04}[codec]


def test_the_bytes_are_those_of_other_implementations() -> None:
    of = np.random.default_rng(4).standard_normal((64, 128), np.float32)
    encoded, _, _ = there_and_back(raw(of, "fp32"), Values("fp32", 128), "fp8")
    scales = torch.from_numpy(of).abs().amax(1) / 448
    halves = (torch.from_numpy(of) / scales[:, None]).half()
    assert np.array_equal(encoded[: 64 * 4].view(np.float32), scales.numpy())
    expected = halves.float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encoded[64 * 4 :].reshape(64, 128), expected)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e30])
def test_the_ends_of_the_range(codec: str, size: float) -> None:
    of = np.full((3, 8), size, np.float32)
    of[1] *= -1
    _, back, _ = there_and_back(raw(of, "fp32"), Values("fp32", 8), codec)
    assert real(back, "fp32").reshape(3, 8) == pytest.approx(of if size > 1e-40 else 0 * of, rel=1e-5)


def test_many_vectors_are_encoded_like_few() -> None:
    of = np.random.default_rng(5).standard_normal((3000, 96), np.float32)
    whole, _, _ = there_and_back(raw(of, "bf16"), Values("bf16", 96), "int8")
    part, _, _ = there_and_back(raw(of[2900:], "bf16"), Values("bf16", 96), "int8")
    assert np.array_equal(whole[-100 * 96 :], part[-100 * 96 :])


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    of = np.ones((700, 128), np.float32)
    of[650, 5] = bad
    with pytest.raises(GeometryError, match="not finite"):
        there_and_back(raw(of, "bf16"), Values("bf16", 128), codec)


def test_lengths_that_do_not_fit_are_refused() -> None:
    values = Values("bf16", 64)
    with pytest.raises(GeometryError, match="do not become"):
        encode(np.zeros(130, np.uint8), values, "int8", np.zeros(68, np.uint8))
    with pytest.raises(GeometryError, match="do not become"):
        decode(np.zeros(67, np.uint8), values, "int8", np.zeros(128, np.uint8))


def test_dtypes() -> None:
    assert [
        dtype_of(n) for n in ("torch.bfloat16", "float16", "float32", "uint8", "torch.float8_e4m3fn")
    ] == [
        "bf16",
        "fp16",
        "fp32",
        None,
        None,
    ]
