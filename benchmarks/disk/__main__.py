"""`python -m benchmarks.disk`: the disk tier against the drive. See ../README.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.disk.async_files import async_files
from benchmarks.disk.many import many
from benchmarks.disk.peers import peers, skipped
from benchmarks.disk.quiet import quiet
from benchmarks.disk.scale import scale
from kvtier.bench.disk import BLOCK_BYTES, CONVERSATIONS, large
from kvtier.bench.lines import Line, table

GROUPS = ("large", "peers", "aiofiles", "many", "quiet", "scale")


def main() -> int:
    """Run the chosen groups and print their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, of {', '.join(GROUPS)}")
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="folder on the drive to measure")
    parser.add_argument("--gib", type=float, default=1.0, help="GiB of the large conversation")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--lmcache-python", type=Path, help="a Python that has lmcache and torch")
    parser.add_argument("--mooncake-python", type=Path, help="a Python that has mooncake-transfer-engine")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks of the large index")
    options = parser.parse_args()
    unknown = sorted(set(options.only.split(",")) - set(GROUPS))
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}")
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-", dir=options.dir) as folder:
        for line in _figures(options, Path(folder)):
            lines.append(line)
            print(line.json() if options.json else f"  {line.name}: {line.value:g} {line.unit}", flush=True)
    if not options.json:
        print(table(lines))
    return 0


def _figures(options: argparse.Namespace, folder: Path) -> Iterator[Line]:
    chosen = options.only.split(",")
    nbytes = int(options.gib * 32) * (32 << 20)
    if "large" in chosen:
        yield from large(folder, nbytes, options.rounds)
    if "peers" in chosen:
        for missing in skipped(options.lmcache_python, options.mooncake_python):
            print(missing, file=sys.stderr)
        # Half as much: the others keep a copy of everything in memory of their own.
        half = max(CONVERSATIONS * BLOCK_BYTES, nbytes // 2)
        yield from peers(folder, half, options.rounds, options.lmcache_python, options.mooncake_python)
    if "aiofiles" in chosen:
        yield from async_files(folder, nbytes, options.rounds)
    if "many" in chosen:
        yield from many(folder, options.conversations, options.rounds)
    if "quiet" in chosen:
        yield from quiet(folder, options.rounds)
    if "scale" in chosen:
        yield from scale(folder, options.blocks)


if __name__ == "__main__":
    sys.exit(main())
