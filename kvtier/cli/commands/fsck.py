"""`kvtier fsck`: whether a directory of the disk tier holds what its index says."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtier.cli import exits, options

if TYPE_CHECKING:
    from kvtier.disk.fsck import OnProgress, Report
    from kvtier.disk.store import OpenVault

_SAY_EVERY_S = 5.0


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repair", is_flag=True, help="Mend the index, or make it anew from the segments.")
@click.option(
    "--keys-directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The key store of sealed blocks; without it only their headers are checked.",
)
@click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The master key of the key store.",
)
@options.json_option
@click.pass_context
def fsck(
    ctx: click.Context,
    directory: Path,
    repair: bool,
    keys_directory: Path | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Check a directory of the disk tier while no daemon uses it.

    Reads every segment, and compares with the index.  Exit code 0 when all is there, 1 when there is
    damage (also when --repair mended it), 2 when the directory is in use or is none of kvtier's.
    """
    from kvtier.cli import output
    from kvtier.cli.app import one_line
    from kvtier.disk.fsck import fsck as check
    from kvtier.errors import TierUnavailable

    open_vault = _vault_opener(keys_directory, key_file)
    try:
        report = check(directory, repair=repair, on_progress=_progress(), open_vault=open_vault)
    except TierUnavailable as problem:
        sys.stderr.write(f"kvtier: {one_line(str(problem))}\n")
        ctx.exit(exits.USAGE)
    if as_json:
        output.print_json(report)
    else:
        _print_report(report)
    ctx.exit(exits.OK if report.is_clean else exits.ANSWER_IS_NO)


def _vault_opener(keys_directory: Path | None, key_file: Path | None) -> OpenVault | None:
    """What opens the key store; None when none is named. Raises click.UsageError, ConfigError."""
    from kvtier.disk.master_key import read_master_key
    from kvtier.disk.vault import Vault

    if keys_directory is None and key_file is None:
        return None
    if keys_directory is None or key_file is None:
        raise click.UsageError("--keys-directory and --key-file go together")
    if not Vault.exists(keys_directory):
        raise click.UsageError(f"{keys_directory} holds no key store")
    folder, master_key = keys_directory, read_master_key(key_file)
    return lambda store_id: Vault(folder, store_id, master_key)


def _progress() -> OnProgress:
    """Says how far it is, every few seconds."""
    from kvtier.cli import output

    said_s = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s >= _SAY_EVERY_S:
            said_s = now_s
            output.print_progress(f"{output.size(done)} of {output.size(total)} checked")

    return on_progress


def _print_report(report: Report) -> None:
    from kvtier.cli import output

    index = ": ".join([report.index, *report.index_problems])
    output.print_facts(
        (
            ("directory", report.directory),
            ("index", index),
            ("graves", report.graves),
            ("segments", f"{report.segments} ({output.size(report.segment_bytes)})"),
            ("objects", f"{report.objects:,} ({output.size(report.object_bytes)}) intact"),
            ("conversations", _conversations(report)),
            ("not checked", ": ".join([f"{report.unchecked:,}", *report.unchecked_why])),
            ("damaged", f"{report.damaged_headers:,} headers, {report.damaged_payloads:,} payloads"),
            ("listed and not there", f"{report.entries_without_object:,}"),
            ("overlaps", f"{report.overlaps:,}"),
            ("quarantined before", f"{report.quarantined:,}"),
            ("lost", output.size(report.lost_bytes)),
            ("orphans", f"{report.orphans:,} ({output.size(report.orphan_bytes)})"),
            ("ended, in free room", f"{report.forgotten:,}"),
            ("foreign headers", f"{report.foreign:,}"),
        )
    )
    for done in report.repaired:
        output.print_line(f"repaired: {done}")
    output.print_line(_verdict(report))


def _conversations(report: Report) -> str:
    damaged = f", {report.damaged_records:,} of their records damaged" if report.damaged_records else ""
    return f"{report.conversations:,}{damaged}"


def _verdict(report: Report) -> str:
    if report.is_clean:
        return "clean"
    if report.repaired:
        return "damage was found and repaired"
    listed = report.damaged_headers + report.damaged_payloads + report.entries_without_object
    if listed + report.overlaps + report.damaged_records:
        return "damage was found: run with --repair"
    if report.index != "sound":
        return "the index cannot be used: run with --repair"
    return "damage was found before, and is quarantined: it heals when these objects are parked again"
