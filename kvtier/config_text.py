"""Settings as text: the TOML of `kvtier config show`, and the reference in docs/operations.md."""

from __future__ import annotations

import json
from typing import Any

from kvtier.config import effective
from kvtier.config_fields import FIELDS, Field, describe_type
from kvtier.config_schema import Config
from kvtier.config_units import format_bytes

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
    return "".join(f"{line}\n" for line in lines)


def reference() -> str:
    """All settings as Markdown tables, one for each section."""
    lines: list[str] = []
    section = ""
    for field in FIELDS.values():
        if field.section != section:
            section = field.section
            lines += [""] * bool(lines) + [f"### [{section}]", "", "| setting | type | default | meaning |"]
            lines.append("| --- | --- | --- | --- |")
        kind, default = describe_type(field), _default_text(field)
        lines.append(f"| `{field.key}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _toml_value(field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(str(item) for item in value)}]"
    if isinstance(value, int) and field.key.endswith("_bytes"):
        return f'"{format_bytes(value)}"'
    return repr(value)


def _default_text(field: Field) -> str:
    if field.name in _ON_EACH_MACHINE:
        return _ON_EACH_MACHINE[field.name]
    return f"`{_toml_value(field, effective(Config())[field.name].value)}`"
