"""Settings as text: the TOML of `kvtier config show`, and the reference in docs/operations.md."""

from __future__ import annotations

import json
from typing import Any

from kvtier.config.fields import FIELDS, TENANT_FIELDS, TENANTS, Field, describe_type
from kvtier.config.load import effective
from kvtier.config.schema import Config, TenantConfig
from kvtier.config.units import format_bytes

_ON_EACH_MACHINE = {
    "node.name": "the host's name",
    "node.runtime_dir": "/run/kvtier, or $XDG_RUNTIME_DIR/kvtier",
    "node.state_dir": "/var/lib/kvtier, or ~/.local/state/kvtier",
}


def to_toml(config: Config, *, every: bool = True) -> str:
    """TOML that `load` reads back to the same settings, with the meaning and the origin of each.

    every: all settings, or only those that a file or an argument gave.
    """
    lines: list[str] = []
    section = ""
    settings = effective(config)
    for field in FIELDS.values():
        setting = settings[field.name]
        if not every and setting.origin == "default":
            continue
        if field.section != section:
            lines += [""] * bool(section) + [f"[{field.section}]"]
            section = field.section
        lines.append(f"# {field.description} ({setting.origin})")
        lines.append(f"{field.key} = {_toml_value(field, setting.value)}")
    lines += _tenants(config, bool(lines))
    return "".join(f"{line}\n" for line in lines)


def _tenants(config: Config, follows: bool) -> list[str]:
    """The tables of the tenants, with what each has otherwise."""
    lines: list[str] = []
    for tenant, settings in config.tenants.items():
        name = json.dumps(tenant, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines += [""] * (follows or bool(lines)) + [f"[{TENANTS}.{name}]"]
        for field in TENANT_FIELDS.values():
            origin = config.origins.get(f"{TENANTS}.{tenant}.{field.key}")
            if origin is not None:
                lines.append(f"# {field.description} ({origin})")
                lines.append(f"{field.key} = {_toml_value(field, getattr(settings, field.key))}")
    return lines


def reference() -> str:
    """All settings as Markdown tables, one for each section."""
    lines: list[str] = []
    section = ""
    for field in (*FIELDS.values(), *TENANT_FIELDS.values()):
        if field.section != section:
            section = field.section
            title = f"{section}.NAME" if section == TENANTS else section
            lines += [""] * bool(lines) + [f"### [{title}]", "", "| setting | type | default | meaning |"]
            lines.append("| --- | --- | --- | --- |")
        kind, default = describe_type(field), _default_text(field)
        key = field.name.rpartition(".")[2]
        lines.append(f"| `{key}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _toml_value(field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(field, item) for item in value)}]"
    if isinstance(value, int) and field.is_size:
        return f'"{format_bytes(value)}"'
    return repr(value)


def _default_text(field: Field) -> str:
    if field.name in _ON_EACH_MACHINE:
        return _ON_EACH_MACHINE[field.name]
    if field.section == TENANTS:
        return f"`{_toml_value(field, getattr(TenantConfig(), field.name.rpartition('.')[2]))}`"
    return f"`{_toml_value(field, effective(Config())[field.name].value)}`"
