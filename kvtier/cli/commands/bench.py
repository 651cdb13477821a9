"""`kvtier bench`: this machine's links on kvtier's own path, against the best plain rates."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtier.cli import options
from kvtier.config.units import parse_bytes
from kvtier.errors import ConfigError, TierFull, TierUnavailable

if TYPE_CHECKING:
    from kvtier.bench.lines import Line
    from kvtier.gpu.cuda.device import Device

MiB = 1 << 20
# Room of the drive's own file, of a store with as much room again, and of its next segment.
_ROOM = 4
_SPARE_BYTES = 512 * MiB
PARTS = ("copies", "disk")


def _size(_ctx: click.Context, _param: click.Parameter, value: str) -> int:
    try:
        found = parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if found < 32 * MiB:
        raise click.BadParameter("a block of the model has 32 MiB: give that much at least")
    return found // (32 * MiB) * 32 * MiB


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the pool is: cpu, cuda:0, or auto for the first GPU that is found.",
)
@click.option(
    "--directory", type=click.Path(file_okay=False), help="Whose drive; by default the disk tier's."
)
@click.option(
    "--bytes", "copy_bytes", default="256MiB", show_default=True, callback=_size, help="KV to copy."
)
@click.option(
    "--disk-bytes", default="128MiB", show_default=True, callback=_size, help="KV to write and read."
)
@click.option("--rounds", type=click.IntRange(min=1, max=100), default=3, show_default=True)
@click.option("--only", type=click.Choice(PARTS), help="One part alone.")
@options.config_option
@options.set_option
@options.json_option
def bench(
    device: str,
    directory: str | None,
    copy_bytes: int,
    disk_bytes: int,
    rounds: int,
    only: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure this machine's links: pool, host memory, disk, each way.

    Each figure is kvtier's own path, and beside it the best plain copy, or the drive's best rate, of the same
    rounds: a park gathers, a restore scatters. RATIO is the median of the rounds' own ratios. The KV is
    Llama-3-8B's in scattered pages, checksums are made and checked. Needs no daemon; one that serves at the
    same time makes the figures lower. Takes three times --bytes of memory; on the drive four times
    --disk-bytes and 512 MiB at most, in a folder of its own that is deleted.
    """
    from kvtier.cli import output

    where = Path(directory) if directory else Path(options.read_config(config_file, settings).disk_directory)
    lines: list[Line] = []
    for line in _figures(device, where, copy_bytes, disk_bytes, rounds, only):
        lines.append(line)
        if as_json:
            click.echo(line.json())
        else:
            output.print_progress(f"{line.name}: {line.value:g} {line.unit}")
    if not as_json:
        _show(lines)


def _figures(
    device: str, where: Path, copy_bytes: int, disk_bytes: int, rounds: int, only: str | None
) -> Iterator[Line]:
    if only != "disk":
        gpu = find_gpu(device)
        if gpu is None:
            from kvtier.bench.copies import SCATTERED, copies

            yield from copies(copy_bytes, rounds, [SCATTERED])
        else:
            from kvtier.bench.gpu import gpu_copies

            yield from gpu_copies(gpu, copy_bytes, rounds)
    if only != "copies":
        from kvtier.bench.disk import short

        with _folder(where, disk_bytes) as folder:
            yield from short(folder, disk_bytes, rounds)


def find_gpu(device: str) -> Device | None:
    """The GPU that is meant, None for host memory. Raises ConfigError, TierUnavailable."""
    from kvtier.gpu.cuda.cupy_device import CudaDevice

    if device == "cpu":
        return None
    kind, _, number = device.partition(":")
    if kind == "cuda" and number.isdigit():
        return CudaDevice(int(number))
    if device != "auto":
        raise ConfigError("--device", f"there is no device {device!r}", fix="give cpu, cuda:0 or auto")
    try:
        return CudaDevice(0)
    except TierUnavailable as error:
        from kvtier.cli import output

        output.print_progress(f"the pool is in host memory, for there is no GPU to use: {error}")
        return None


@contextmanager
def _folder(where: Path, nbytes: int) -> Iterator[Path]:
    """A folder on the drive of `where`, which need not be there yet; deleted however this ends.

    Raises TierFull; TierUnavailable also for what the system says while it is measured.
    """
    needed = _ROOM * nbytes + _SPARE_BYTES
    # A service manager's way to end it; the default would leave the folder.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        there = next(path for path in (where.absolute(), *where.absolute().parents) if path.is_dir())
        if shutil.disk_usage(there).free < needed:
            raise TierFull(
                f"{there} has no {needed // MiB} MiB free", needed_bytes=needed, fix="lower --disk-bytes"
            )
        with tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=there) as folder:
            yield Path(folder)
    except OSError as error:
        raise TierUnavailable(
            f"the drive of {where} cannot be measured: {error}", fix="give another --directory"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(lines: list[Line]) -> None:
    from kvtier.cli import output

    head = ("LINK", "RATE", "BEST PLAIN", "RATIO", "OF")
    rows = (
        (
            line.name,
            f"{line.value:g} {line.unit}",
            f"{line.limit:g} {line.unit}",
            f"{line.ratio:.2f}",
            str(line.detail.get("limit_is") or line.detail.get("limit_way", "")),
        )
        for line in lines
    )
    output.print_table(head, rows, numbers=head[1:4])
