"""`kvtier drain`."""

from __future__ import annotations

import click

from kvtier.cli import exits, options


@click.command()
@click.argument("node")
@options.config_option
@options.set_option
@click.option("--state-dir", help="Folder with the record of what `up` started here.")
@click.option(
    "--grace",
    "grace_s",
    default="30s",
    show_default=True,
    metavar="DURATION",
    callback=options.seconds,
    help="How long the node may write what only its memory holds.",
)
@options.json_option
@click.pass_context
def drain(
    ctx: click.Context,
    node: str,
    config_file: str | None,
    settings: tuple[str, ...],
    state_dir: str | None,
    grace_s: float,
    as_json: bool,
) -> None:
    """Take NODE, by its name or the begin of Ray's id, out of service; run it on any node of the cluster.

    The node takes no park from then on, writes to disk what only its memory holds, gives what it has in
    memory to other nodes, the most worth first, and ends its tiers.
    `kvtier up` on that node takes it back. Exit code 1 when something was lost, or may have been.
    """
    from kvtier.cli import output

    config = options.read_config(config_file, settings, node__state_dir=state_dir)
    from kvtier.cluster.drain_node import drain as carry_out

    report = carry_out(config, node, grace_s)
    lost = report.get("lost_bytes")
    if as_json:
        output.print_json(report)
    else:
        output.print_facts(
            (
                ("state", str(report.get("phase", "not known"))),
                ("because", str(report.get("reason", ""))),
                ("written to disk", output.size(report.get("flushed_bytes", 0))),
                ("moved to other nodes", output.size(report.get("moved_bytes", 0))),
                ("lost", "not known" if lost is None else output.size(lost)),
            )
        )
    well = lost == 0 and report.get("phase") == "done"
    ctx.exit(exits.OK if well else exits.ANSWER_IS_NO)
