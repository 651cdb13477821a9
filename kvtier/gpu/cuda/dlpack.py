"""Tensors of other frameworks, by DLPack, without a copy. Not run on a GPU yet."""

from __future__ import annotations

from typing import Any

from kvtier.errors import GeometryError, TierUnavailable


def borrowed(tensor: Any) -> Any:
    """An array over the same memory that `describe` and `Pool` understand.

    Torch tensors and whatever has __cuda_array_interface__ need no help; anything with __dlpack__, such as a
    JAX array, goes through cupy.  Its type must be one that DLPack and cupy both know: view fp8 and bf16 as
    uint8 or uint16 first.  Raises GeometryError; TierUnavailable where cupy is missing.
    """
    if not hasattr(tensor, "__dlpack__"):
        raise GeometryError(f"{type(tensor).__name__} has no __dlpack__")
    try:
        import cupy
    except ImportError as error:
        raise TierUnavailable(
            f"cupy cannot be imported: {error}", fix="pip install 'kvtier[cuda13]'"
        ) from error
    try:
        return cupy.from_dlpack(tensor)
    except (RuntimeError, TypeError, ValueError, BufferError) as error:
        raise GeometryError(f"{type(tensor).__name__} cannot be borrowed: {error}") from error
