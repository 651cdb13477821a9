"""Options that several commands share, and what they make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvtier import paths
from kvtier.config.units import parse_seconds
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.client.client import Client
    from kvtier.config.schema import Config

Command = TypeVar("Command", bound=Callable[..., Any])

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    help="TOML file with the node's settings.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="One setting, such as host.capacity_bytes=8GiB; wins over the file. Repeatable.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON for programs.")


def seconds(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    """Callback of options that are durations, such as 0.5, 500ms or 2d; a usage error otherwise."""
    try:
        return parse_seconds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def node_options(command: Command) -> Command:
    """Options that say which daemon is meant."""
    for option in reversed(
        (
            click.option("--socket", "socket_path", help="The node's socket; wins over --config."),
            config_option,
            click.option("--token-file", help="File with the token, when this user needs one."),
            click.option(
                "--timeout",
                "timeout_s",
                default="5s",
                show_default=True,
                metavar="DURATION",
                callback=seconds,
                help="How long to wait.",
            ),
        )
    ):
        command = option(command)
    return command


def read_config(config_file: str | None, settings: tuple[str, ...] = (), **overrides: Any) -> Config:
    """Settings from --config, --set and options of their own (`section__key`). Raises ConfigError."""
    from kvtier.config.load import load

    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(name, "has no value", fix=f"write --set {name}=VALUE")
        given[name.strip()] = value.strip()
    for name, value in overrides.items():
        if value is not None:
            given[name.replace("__", ".")] = value
    return load(config_file, given)


def open_client(
    socket_path: str | None, config_file: str | None, token_file: str | None, timeout_s: float
) -> Client:
    """A connection to the daemon that the options name. Raises DaemonNotFound, AuthError, ConfigError."""
    from kvtier.client.client import connect

    if config_file is not None:
        config = read_config(config_file)
        socket_path = socket_path or str(paths.node_socket(config.node.runtime_dir))
        token_file = token_file or config.access.token_file or None
    return connect(socket_path, token_file=token_file, timeout_s=timeout_s)
