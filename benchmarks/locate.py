"""What POST /locate costs a gateway: over a connection that it keeps, and over a fresh one for each question.

python -m benchmarks.locate [--json]
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
from collections.abc import Callable, Iterator

from kvtier.bench.lines import Line, micros_line, seconds, table
from kvtier.client.client import connect
from kvtier.testing.kv_memory import SHARD, KvMemory, pages_for, tokens_of
from kvtier.testing.service_processes import ServiceProcesses

_QUESTIONS, _WARM = 2000, 100
_AIM_US = 2000.0
_TOKENS = 4000


def locate() -> Iterator[Line]:
    """One node in processes of its own, one conversation of 4,000 tokens in 125 blocks."""
    settings = {"metrics.enabled": True, "disk.enabled": False}
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder,
        ServiceProcesses(folder, settings) as services,
        connect(services.socket_path) as client,
    ):
        pages = pages_for(_TOKENS)
        kv = KvMemory(len(pages))
        with client.attach(kv.model, kv.pool, shard=SHARD) as worker:
            worker.park("chat-1", tokens_of(1, _TOKENS), pages).result()
        yield _line("Client.locate, the socket alone", lambda: client.locate("chat-1"))
        address = client.status().metrics_url.removeprefix("http://")
        kept = http.client.HTTPConnection(address, timeout=10)
        yield _line("POST /locate, kept connection", lambda: _ask(kept))
        kept.close()

        def fresh() -> None:
            once = http.client.HTTPConnection(address, timeout=10)
            _ask(once)
            once.close()

        yield _line("POST /locate, fresh connection", fresh)


def _ask(connection: http.client.HTTPConnection) -> None:
    connection.request("POST", "/locate", b'{"conversation": "chat-1"}')
    assert len(json.loads(connection.getresponse().read())["nodes"]) == 1


def _line(name: str, work: Callable[[], object]) -> Line:
    for _ in range(_WARM):
        work()
    return micros_line(name, [seconds(work) for _ in range(_QUESTIONS)], _AIM_US)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description="What POST /locate costs a gateway.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    lines = list(locate())
    print("\n".join(line.json() for line in lines) if parser.parse_args().json else table(lines))


if __name__ == "__main__":
    main()
