"""The compiler of loops over blocks, with a type that the checker knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function as machine code, made at its first call."""
    fast: Function = njit(function)
    return fast
