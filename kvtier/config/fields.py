"""The list of all settings, taken from the schema: names, types, meanings."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from kvtier.config.schema import Config, TenantConfig
from kvtier.config.section import Section
from kvtier.config.units import format_bytes

_PLAIN = {int: "integer", str: "text", bool: "true or false", float: "seconds"}


@dataclass(frozen=True, slots=True)
class Field:
    """One setting of the schema: dotted name, annotated type, its meaning, and the name of its section."""

    name: str
    annotation: Any
    description: str
    section: str

    @property
    def key(self) -> str:
        """Name within the section."""
        return self.name.removeprefix(f"{self.section}.").rpartition(".")[2]

    @property
    def is_size(self) -> bool:
        """Whether it is a number of bytes, in all or for a time, that may be written "8GiB"."""
        return self.key.endswith("_bytes") or "bytes_per_" in self.key

    @property
    def is_time(self) -> bool:
        """Whether it is a number of seconds, that may be written "500ms"."""
        return self.key.endswith("_s") and not self.is_size


def _schema() -> Iterator[Field]:
    for section, kind in get_type_hints(Config).items():
        if isinstance(kind, type) and issubclass(kind, Section):
            for key, annotation in get_type_hints(kind, include_extras=True).items():
                yield Field(f"{section}.{key}", annotation, _description(annotation), section)


def _description(annotation: Any) -> str:
    for extra in get_args(annotation)[1:]:
        if isinstance(extra, msgspec.Meta) and extra.description:
            return extra.description
    raise AssertionError(f"{annotation} has no description")


# Of every table [tenants.NAME], by key.
TENANTS: Final = "tenants"
TENANT_FIELDS: Final[dict[str, Field]] = {
    key: Field(f"{TENANTS}.NAME.{key}", annotation, _description(annotation), TENANTS)
    for key, annotation in get_type_hints(TenantConfig, include_extras=True).items()
}
FIELDS: Final[dict[str, Field]] = {field.name: field for field in _schema()}
SECTIONS: Final[tuple[str, ...]] = tuple(dict.fromkeys(field.section for field in FIELDS.values()))


def describe_type(field: Field) -> str:
    """The type and bounds of a setting, for people."""
    text = _describe(field.annotation)
    text = text.replace("integer", "size") if field.is_size else text
    return text if field.is_time else text.replace("seconds", "number")


def _describe(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        bounds = [text for extra in extras if isinstance(extra, msgspec.Meta) for text in _bounds(extra)]
        return ", ".join([_describe(inner), *bounds])
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(annotation))
    if origin is tuple:
        return "list of texts" if str in get_args(annotation) else "list of integers"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(choice) for choice in get_args(annotation))
    return _PLAIN[origin or annotation]


def _bounds(meta: msgspec.Meta) -> list[str]:
    texts = []
    if meta.gt is not None:
        texts.append(f"above {meta.gt:g}")
    if meta.ge is not None:
        texts.append(f"from {_number(meta.ge)}")
    if meta.le is not None:
        texts.append(f"to {_number(meta.le)}")
    return texts


def _number(value: float) -> str:
    return format_bytes(int(value)) if value >= 64 << 10 else f"{value:g}"
