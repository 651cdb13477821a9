"""Short numbers for what is said of blocks, so that a row is one 64-bit word: holder, tenant, form."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from kvtier.directory.announcements import Layout
from kvtier.directory.rows import Keys

_TENANT_SHIFT, _HOLDER_SHIFT = 24, 48
_FIELD = (1 << 24) - 1

Value = TypeVar("Value", bound=Hashable)


class Form(NamedTuple):
    """What a node has of a block. tokens: of the block. host, disk: bits of the layout's whole parts."""

    layout: Layout
    tokens: int
    host: int
    disk: int

    @property
    def host_bytes(self) -> int:
        """In host memory."""
        return part_bytes(self.layout, self.tokens, self.host)

    @property
    def disk_bytes(self) -> int:
        """On disk, before compression."""
        return part_bytes(self.layout, self.tokens, self.disk)


def part_bytes(layout: Layout, tokens: int, parts: int) -> int:
    """Bytes of those parts of a block of so many tokens."""
    return sum(
        part.nbytes * (1 if part.kind == "state" else tokens)
        for bit, part in enumerate(layout.parts)
        if parts >> bit & 1
    )


class Numbers(Generic[Value]):
    """Gives each value a number, from 0 on. At most `most` values have one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._numbers: dict[Value, int] = {}
        self.values: list[Value] = []

    def number(self, value: Value) -> int | None:
        """The value's number; None when there are too many others."""
        found = self._numbers.get(value)
        if found is None and len(self.values) < self._most:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        return found

    def known(self, value: Value) -> int | None:
        """The value's number if it has one."""
        return self._numbers.get(value)


def word(holder: int, tenant: int, form: int) -> int:
    """The word of a row; its fields have 16, 24 and 24 bits."""
    return holder << _HOLDER_SHIFT | tenant << _TENANT_SHIFT | form


def tenants_of(words: Keys) -> Keys:
    """The tenant of each word."""
    return (words >> np.uint64(_TENANT_SHIFT)) & np.uint64(_FIELD)


def forms_of(words: Keys) -> Keys:
    """The form of each word."""
    return words & np.uint64(_FIELD)


def fields(of: int) -> tuple[int, int, int]:
    """Holder, tenant and form of one word."""
    return of >> _HOLDER_SHIFT, of >> _TENANT_SHIFT & _FIELD, of & _FIELD
