"""`kvtier demo`: the command line of kvtier.cli.demo."""

from __future__ import annotations

from typing import Literal

import click

from kvtier.cli import options
from kvtier.cli.main import require


@click.command()
@click.option("--conversations", type=click.IntRange(min=1), help="Only the first so many.")
@click.option("--seed", type=int, help="Of the model's random weights.")
@click.option("--directory", type=click.Path(file_okay=False), help="Where to work; must be empty.")
@click.option("--keep", is_flag=True, help="Leave the working folder.")
@click.option(
    "--daemon",
    type=click.Choice(["ray", "embedded"]),
    default="ray",
    show_default=True,
    help="What `kvtier up` starts, or a daemon inside the serving processes.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="What runs the model: cpu, cuda:0, or auto for a GPU where torch finds one.",
)
@options.json_option
@click.pass_context
def demo(
    ctx: click.Context,
    /,
    conversations: int | None,
    seed: int | None,
    directory: str | None,
    keep: bool,
    daemon: Literal["ray", "embedded"],
    device: str,
    as_json: bool,
) -> None:
    """Park and restore real conversations on this machine, and compare.

    Makes a small model with random weights, chats with it through a daemon of its own, ends that daemon
    with kill -9 between turns, and compares every continuation bit for bit. Exit code 1 when any differs.
    With --json the last line is one JSON object. Takes about three minutes on two cores.
    """
    require("daemon", "transformers")
    from kvtier.cli.demo.run import DEFAULT_SEED, main

    ctx.exit(
        main(
            as_json=as_json,
            keep=keep,
            directory=directory,
            seed=DEFAULT_SEED if seed is None else seed,
            conversations=conversations,
            daemon=daemon,
            device=device,
        )
    )
