"""`kvtier status` and `kvtier models`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from kvtier.cli import exits, options

if TYPE_CHECKING:
    from kvtier.receipts import StatusReport


@click.command()
@options.node_options
@options.json_option
@click.pass_context
def status(ctx: click.Context, /, as_json: bool, **where: Any) -> None:
    """Show the node: tiers, workers, counters.

    Exit code 0 when it is ready and every tier works, 1 when not.
    """
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        report = kv.status()
    if as_json:
        output.print_json(report)
    else:
        _print_report(report)
    ctx.exit(exits.OK if is_well(report) else exits.ANSWER_IS_NO)


def is_well(report: StatusReport) -> bool:
    """Whether the node serves with all the tiers that it was given."""
    return report.ready and all(tier.state in ("ready", "absent") for tier in report.tiers)


@click.command()
@options.node_options
@options.json_option
def models(as_json: bool, **where: Any) -> None:
    """List the models whose KV is here. --json writes one object for each line."""
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        found = list(kv.models())
    if as_json:
        for model in found:
            output.print_json(model)
        return
    columns = ("MODEL", "FINGERPRINT", "WORKERS", "CONVERSATIONS", "OBJECTS", "HOST", "DISK")
    output.print_table(
        columns,
        (
            (
                f"{model.model} (retired)" if model.retired else model.model,
                model.fingerprint[:16],
                str(model.workers),
                str(model.conversations),
                str(model.objects),
                output.size(model.host_bytes),
                output.size(model.disk_bytes),
            )
            for model in found
        ),
        numbers=columns[2:],
    )


@click.command()
@click.argument("fingerprint")
@options.node_options
@options.json_option
def retire(fingerprint: str, as_json: bool, **where: Any) -> None:
    """Say that no worker will serve a model again, by its FINGERPRINT or the beginning of it.

    With policy.eviction = "cost" its KV is worth nothing from then on: it leaves each tier first, and is not
    written to disk any more. That ends when a worker attaches with it, or the daemon restarts.
    """
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        model = kv.retire(fingerprint)
    if as_json:
        output.print_json(model)
    else:
        held = f"{output.size(model.host_bytes)} in host memory, {output.size(model.disk_bytes)} on disk"
        output.print_line(f"retired {model.model or 'a model'} {model.fingerprint[:16]}: {held}")


def _peer_facts(report: StatusReport) -> Iterator[tuple[str, str]]:
    from kvtier.cli import output

    counters = report.counters
    if report.transport:
        came, wire = counters.get("peer_received_bytes", 0), counters.get("peer_wire_bytes", 0)
        read = f", {output.size(int(came))} of KV read as {output.size(int(wire))}" if came else ""
        yield "other nodes", report.transport + read
    relayed = [node for node, way in report.peers if way == "ray"]
    if relayed:
        size = output.size(int(counters.get("peer_relayed_bytes", 0)))
        yield "not by TCP", f"{', '.join(relayed)}: through Ray, slowly, {size} of KV read so"
    lent = [node for node, way in report.peers if way == "nixl"]
    if lent:
        size = output.size(int(counters.get("peer_lent_bytes", 0)))
        yield "by NIXL", f"{', '.join(lent)}: {size} of KV read in their memory"


def _disk_facts(counters: dict[str, float]) -> Iterator[tuple[str, str]]:
    from kvtier.cli import output

    written, user = counters.get("disk_written_bytes", 0), counters.get("disk_user_bytes", 0)
    if user:
        text = f"{output.size(int(written))} for {output.size(int(user))} of KV ({written / user:.2f})"
        yield "disk writes", text if counters.get("disk_direct_io") else f"{text}, without O_DIRECT"
    limit = counters.get("disk_wear_limit_bytes", 0)
    if limit:
        left = counters.get("disk_wear_left_bytes", 0)
        yield "drive's day", f"{output.size(int(left))} of {output.size(int(limit))} may still be written"


def _print_report(report: StatusReport) -> None:
    from kvtier.cli import output

    output.print_facts(
        (
            ("node", f"{report.node}  (kvtier {report.version}, epoch {report.epoch})"),
            ("state", "ready" if report.ready else "not ready"),
            ("up for", output.duration(report.uptime_s)),
            ("conversations", str(report.conversations)),
            ("waiting parks", str(report.waiting_parks)),
            *((("metrics", f"{report.metrics_url}/metrics"),) if report.metrics_url else ()),
            *_peer_facts(report),
            *_disk_facts(report.counters),
            *(("warning", warning) for warning in report.warnings),
        )
    )
    tiers = ("TIER", "STATE", "USED", "CAPACITY", "LIMBO", "OBJECTS", "QUARANTINED", "DETAIL")
    output.print_line(" ")
    output.print_table(
        tiers,
        (
            (
                tier.name,
                tier.state,
                output.size(tier.used_bytes),
                output.size(tier.capacity_bytes),
                output.size(tier.limbo_bytes),
                str(tier.objects),
                str(tier.quarantined),
                tier.detail,
            )
            for tier in report.tiers
        ),
        numbers=tiers[2:7],
    )
    if report.workers:
        output.print_line(" ")
        output.print_table(
            ("WORKER", "MODEL", "SHARD", "MODE", "COPIES", "GPU BYTES", "PID", "JOBS"),
            (
                (
                    w.worker,
                    w.model,
                    w.shard,
                    w.mode,
                    w.place,
                    output.size(w.gpu_bytes),
                    str(w.pid),
                    str(w.running_jobs),
                )
                for w in report.workers
            ),
            numbers=("GPU BYTES", "PID", "JOBS"),
        )
    if report.counters:
        output.print_line(" ")
        output.print_facts((name, f"{value:g}") for name, value in sorted(report.counters.items()))
