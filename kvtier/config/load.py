"""Read a node's settings: defaults, then a TOML file, then arguments; each error names field and fix.

    config = load("/etc/kvtier/kvtier.toml", {"host.capacity_bytes": "8GiB"})
    config.host.capacity_bytes          # 8589934592
    effective(config)["host.capacity_bytes"].origin   # 'argument'

The sections and their meaning stand in schema.py.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from kvtier.config.checks import check
from kvtier.config.fields import FIELDS, SECTIONS, TENANT_FIELDS, TENANTS, Field, describe_type
from kvtier.config.schema import Config, Origin, TenantConfig
from kvtier.config.units import parse_bytes, parse_seconds
from kvtier.errors import ConfigError

__all__ = ["Config", "Setting", "effective", "load"]

_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """The value that a field has, and who set it."""

    value: Any
    origin: Origin


def load(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings of one node. Raises ConfigError.

    path: a TOML file, or None for defaults alone.  overrides: dotted name to value, which win over the
    file; None values count as absent; texts are read as TOML would hold them ("8GiB", "true", "1000,1001").
    """
    given: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for name, value in _from_file(path):
        given[name] = _convert(_field(name), value, lax=False)
        origins[name] = "file"
    for name, value in (overrides or {}).items():
        if value is not None:
            given[name] = _convert(_field(name), value, lax=True)
            origins[name] = "argument"
    config = _build(given, origins)
    check(config)
    return config


def effective(config: Config) -> dict[str, Setting]:
    """Every setting with its value and where it came from, in the order of the schema."""
    return {
        field.name: Setting(
            getattr(getattr(config, field.section), field.key), config.origins.get(field.name, "default")
        )
        for field in FIELDS.values()
    }


def _from_file(path: str | Path | None) -> Iterator[tuple[str, Any]]:
    if path is None:
        return
    for section, table in _read(Path(path)).items():
        if section not in (*SECTIONS, TENANTS):
            close = difflib.get_close_matches(section, (*SECTIONS, TENANTS), n=1)
            known = f"known are {', '.join((*SECTIONS, TENANTS))}"
            raise ConfigError(
                section, f"is not a section ({path})", fix=f"did you mean [{close[0]}]?" if close else known
            )
        if not isinstance(table, dict):
            raise ConfigError(
                section, f"is a section, not a value ({path})", fix=f"write [{section}] above its settings"
            )
        if section == TENANTS:
            yield from _of_tenants(table, path)
            continue
        for key, value in table.items():
            yield f"{section}.{key}", value


def _of_tenants(tables: Mapping[str, Any], path: str | Path) -> Iterator[tuple[str, Any]]:
    for tenant, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{TENANTS}.{tenant}",
                f"is a section, not a value ({path})",
                fix=f"write [{TENANTS}.{tenant}] above its settings",
            )
        for key, value in table.items():
            yield f"{TENANTS}.{tenant}.{key}", value


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read: {error.strerror}", fix="check the path and its permissions"
        ) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(str(path), "is larger than 1 MiB", fix="name a kvtier configuration file")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not TOML: {error}", fix="correct that line") from error


def _field(name: str) -> Field:
    field = FIELDS.get(name)
    if field is not None:
        return field
    if name.startswith(f"{TENANTS}."):
        return _tenant_field(name)
    section = name.partition(".")[0]
    siblings = [known for known in FIELDS if known.startswith(f"{section}.")]
    close = difflib.get_close_matches(name, siblings or FIELDS, n=1)
    known = f"known are {', '.join(siblings)}" if siblings else f"known sections are {', '.join(SECTIONS)}"
    raise ConfigError(name, "is not a setting", fix=f"did you mean {close[0]}?" if close else known)


def _tenant_field(name: str) -> Field:
    """Of a setting like tenants.acme.codec; a tenant's name may have dots in it."""
    tenant, key = _tenant_and_key(name)
    field = TENANT_FIELDS.get(key)
    if field is None or not tenant:
        raise ConfigError(name, "is not a setting", fix=f"a tenant's settings are {', '.join(TENANT_FIELDS)}")
    return replace(field, name=name)


def _tenant_and_key(name: str) -> tuple[str, str]:
    tenant, _, key = name.removeprefix(f"{TENANTS}.").rpartition(".")
    return tenant, key


def _convert(field: Field, value: Any, *, lax: bool) -> Any:
    """`value` in the field's type. lax: texts may stand for numbers, booleans and lists."""
    try:
        plain = _from_text(field, value, lax) if isinstance(value, str) else value
        return msgspec.convert(plain, field.annotation, strict=not lax)
    except (msgspec.ValidationError, ValueError) as error:
        problem = str(error).split(" - at `", 1)[0].replace("`", "")
        raise ConfigError(
            field.name,
            f"{value!r} is not valid: {problem[:1].lower()}{problem[1:]}",
            fix=_how_to_write(field),
        ) from error


def _from_text(field: Field, text: str, lax: bool) -> Any:
    if text[:1].isdigit() and field.is_size:
        return parse_bytes(text)
    if text[:1].isdigit() and field.is_time:
        seconds = parse_seconds(text)
        return int(seconds) if seconds.is_integer() else seconds
    if lax and get_origin(get_args(field.annotation)[0]) is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _how_to_write(field: Field) -> str:
    if field.is_size:
        return 'write a number of bytes, or a text like "8GiB"'
    if field.is_time:
        return 'write seconds, or a text like "500ms", "10s" or "2d"'
    return f"it is {describe_type(field)}: {field.description}"


def _build(given: Mapping[str, Any], origins: dict[str, Origin]) -> Config:
    kinds = get_type_hints(Config)
    sections = {
        section: kinds[section](
            **{f.key: given[f.name] for f in FIELDS.values() if f.section == section and f.name in given}
        )
        for section in SECTIONS
    }
    tenants: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        if name.startswith(f"{TENANTS}."):
            tenant, key = _tenant_and_key(name)
            tenants.setdefault(tenant, {})[key] = value
    return Config(
        **sections, tenants={name: TenantConfig(**table) for name, table in tenants.items()}, origins=origins
    )
