"""The group of all commands; loads the module of a command when it is asked for."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any, Final

import click

import kvtier
from kvtier.cli import exits
from kvtier.errors import KvtierError

# Command -> module and one line of help, so that `kvtier --help` imports no command.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "up": ("cluster", "Start the daemon of this node."),
    "down": ("cluster", "End the daemon that `up` started, and nothing else."),
    "drain": ("drain", "Take NODE, by its name or the begin of Ray's id, out of service."),
    "status": ("status", "Show the node: tiers, workers, counters."),
    "ls": ("conversations", "List parked conversations."),
    "show": ("conversations", "Show one parked conversation."),
    "explain": ("explain", "Tell why a conversation lies where it lies, and what it is worth there."),
    "models": ("status", "List the models whose KV is here."),
    "retire": ("status", "Say that no worker will serve a model again: its KV goes first."),
    "forget": ("conversations", "Erase a conversation, every branch of it."),
    "doctor": ("doctor", "Tell what the machine can do for the GPU tier, and what is wrong."),
    "bench": ("bench", "Measure this machine's links: pool, host memory, disk."),
    "fsck": ("fsck", "Check a directory of the disk tier while no daemon uses it."),
    "rotate": ("rotate", "Give the key store of sealed blocks another master key."),
    "size": ("size", "Tell how large a model's KV cache is."),
    "breakeven": ("breakeven", "Tell how long an idle conversation is worth keeping."),
    "hitratio": ("hitratio", "Replay a recorded trace against cache policies."),
    "simulate": ("simulate", 'Ask "what if" of a day: memory, drives and policies of a cluster.'),
    "sweep": ("sweep", "Simulate a load at every size of host memory and disk per node."),
    "record": ("record", "Check a daemon's log of stimuli, and make a load of it."),
    "config": ("config", "Check or show the configuration."),
    "demo": ("demo", "Park and restore real conversations on this machine, and compare."),
}


class App(click.Group):
    """Commands by name from COMMANDS; errors of kvtier end as one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a person meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"kvtier.cli.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a KvtierError becomes its message on stderr and its exit code."""
        try:
            return super().invoke(ctx)
        except KvtierError as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            print(f"kvtier: {one_line(str(error))}", file=sys.stderr)
            ctx.exit(exits.exit_code(error))


def one_line(text: str) -> str:
    """The text without line ends and control characters, so that it cannot reach into the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def run_app(arguments: list[str]) -> int:
    """Run the command line `arguments` and return the exit code."""
    try:
        code = app.main(arguments, prog_name="kvtier", standalone_mode=False)
    except click.Abort:
        print("kvtier: interrupted", file=sys.stderr)
        return exits.INTERRUPTED
    except click.ClickException as error:
        error.show()
        return exits.USAGE
    return code if isinstance(code, int) else exits.OK


@click.command(cls=App, epilog=exits.HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(kvtier.__version__, prog_name="kvtier", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
def app(debug: bool) -> None:
    """Park the KV cache of chats between turns, and have it back on the next one."""
