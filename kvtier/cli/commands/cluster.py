"""`kvtier up` and `kvtier down`."""

from __future__ import annotations

import click

from kvtier.cli import options
from kvtier.cli.main import require

_KINDS = {"private": "private, begun here", "joined": "private, joined", "guest": "as a guest"}


@click.command()
@options.config_option
@options.set_option
@click.option("--detach", is_flag=True, help="Return when the node is ready; `kvtier down` ends it.")
@click.option("--address", help="Join this Ray cluster (host:port): one that kvtier began, or as a guest.")
@click.option("--name", help="Name of this node.")
@click.option("--runtime-dir", help="Folder of the sockets.")
@click.option("--state-dir", help="Folder of secrets, and of the record that `down` needs.")
@click.option("--host-bytes", help='Bound of the arena in host memory, such as 8GiB, or "auto".')
@click.option("--disk-dir", help="Folder of the disk store.")
@click.option("--disk-bytes", help="Bound of the disk store, such as 64GiB.")
@click.option("--metrics-port", help="Port of /metrics, /healthz and /readyz.")
@options.json_option
def up(
    config_file: str | None,
    settings: tuple[str, ...],
    detach: bool,
    address: str | None,
    name: str | None,
    runtime_dir: str | None,
    state_dir: str | None,
    host_bytes: str | None,
    disk_dir: str | None,
    disk_bytes: str | None,
    metrics_port: str | None,
    as_json: bool,
) -> None:
    """Start the daemon of this node and stay with it; ^C ends it.

    A node that was drained and still runs is taken back into service. Options win over the file.
    `kvtier config show --effective` lists all settings.
    """
    from kvtier.cli import output

    if as_json and not detach:
        raise click.UsageError("--json tells of a daemon that stays: give --detach too")
    require("daemon")
    config = options.read_config(
        config_file,
        settings,
        ray__address=address,
        node__name=name,
        node__runtime_dir=runtime_dir,
        node__state_dir=state_dir,
        host__capacity_bytes=host_bytes,
        disk__directory=disk_dir,
        disk__capacity_bytes=disk_bytes,
        metrics__port=metrics_port,
    )
    from kvtier.cluster.up import up as start

    started = start(config, detach=detach, address=config.ray.address, report=output.print_progress)
    if as_json:
        output.print_json(started)
    elif detach:
        output.print_facts(
            (
                ("ready in", output.duration(started.ready_s)),
                ("socket", started.socket),
                ("Ray cluster", f"{started.address} ({_KINDS[started.kind]})"),
                *((name, f"pid {pid}") for name, pid in started.pids.items()),
            )
        )


@click.command()
@options.config_option
@options.set_option
@click.option("--state-dir", help="Folder with the record of what `up` started.")
@options.json_option
def down(config_file: str | None, settings: tuple[str, ...], state_dir: str | None, as_json: bool) -> None:
    """End the daemon that `up` started, and nothing else.

    Only processes that `up` recorded in the state folder are ended. Exit code 0 also when there was none.
    """
    from kvtier.cli import output

    config = options.read_config(config_file, settings, node__state_dir=state_dir)
    from kvtier.cluster.down import down as end

    ended = end(config, report=output.print_progress)
    if as_json:
        output.print_json(ended)
    elif not ended.found:
        output.print_line("nothing to end: `kvtier up` recorded nothing here")
    else:
        how = "in order" if ended.graceful else "not in order"
        killed = f", {ended.killed} of them with SIGKILL" if ended.killed else ""
        output.print_line(f"ended {how}: {ended.ended} processes{killed} {ended.detail}".rstrip())
