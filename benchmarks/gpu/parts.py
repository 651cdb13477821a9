"""The parts of the GPU benchmarks by name; run as `python -m benchmarks.gpu.parts NAME`, one process a part.

A process each, because an error on a device ends its context: what comes after would fail too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from benchmarks.gpu import copies, decode, library, lossy, model, neighbours, processes
from benchmarks.gpu.rig import Bench
from kvtier.bench.lines import Line

PARTS: dict[str, Callable[[Bench], list[Line]]] = {
    "limits": copies.limits,
    "ways": copies.ways,
    "conversation": copies.conversation,
    "cross-layer": copies.cross,
    "layers": copies.layers,
    "checksums": copies.checksums,
    "interference": decode.interference,
    "model": model.model,
    "processes": processes.processes,
    "lossy": lossy.lossy,
    "transformers": library.library,
    "neighbours": neighbours.neighbours,
}


def main() -> int:
    """Print one JSON object a line: first what the device is, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.dry_run)
    print(json.dumps({"facts": bench.facts()}), flush=True)
    for line in PARTS[given.part](bench):
        print(line.json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
