"""`python -m benchmarks.core`: see README.md beside this file."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator

from kvtier.bench.lines import Line, table

GROUPS = ("copies", "decisions", "daemon", "up")


def main() -> int:
    """Run the chosen groups and print their figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, of {', '.join(GROUPS)}")
    parser.add_argument("--gib", type=float, default=2.0, help="GiB of KV that the copies move")
    options = parser.parse_args()
    chosen = options.only.split(",")
    unknown = sorted(set(chosen) - set(GROUPS))
    if unknown:
        parser.error(f"no such group: {', '.join(unknown)}")
    lines: list[Line] = []
    for line in _figures(chosen, int(options.gib * (1 << 30))):
        lines.append(line)
        if options.json:
            print(line.json(), flush=True)
        else:
            print(f"  {line.name}: {line.value:g} {line.unit}", file=sys.stderr, flush=True)
    if not options.json:
        print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
        print(table(lines))
    return 0


def _figures(chosen: list[str], nbytes: int) -> Iterator[Line]:
    if "copies" in chosen:
        from kvtier.bench.copies import copies

        yield from copies(nbytes)
    if "decisions" in chosen:
        from benchmarks.decisions import decisions

        yield from decisions()
    if "daemon" in chosen:
        from benchmarks.daemon import daemon

        yield from daemon(nbytes)
    if "up" in chosen:
        from benchmarks.up import up

        yield from up()


if __name__ == "__main__":
    sys.exit(main())
