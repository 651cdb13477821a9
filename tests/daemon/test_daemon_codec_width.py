"""Codecs that take numbers apart are told how wide the numbers of a pool are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvtier.client.client import connect
from kvtier.daemon.embedded import Embedded
from kvtier.disk.tier import DiskTier
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.model.fingerprint import Fingerprint
from kvtier.node import wire
from kvtier.objects import Shard
from kvtier.testing.kv_memory import tokens_of

LAYERS, HEADS, DIM, PAGE_TOKENS, BLOCK_TOKENS, PAGES = 2, 4, 32, 16, 64, 16
COUNT = PAGES * PAGE_TOKENS
TOKENS = tokens_of(1, COUNT)


def park(daemon: Embedded, dtype: str, **how: Any) -> int:
    """Park noise of that type on disk; answers the bytes that the drive was written."""
    draw = np.random.default_rng(1)
    planes = [draw.standard_normal((PAGES, PAGE_TOKENS, HEADS, DIM)).astype(dtype) for _ in range(2 * LAYERS)]
    pairs = list(zip(planes[0::2], planes[1::2], strict=True))
    layout = paged(pairs, "page token head dim", block_tokens=BLOCK_TOKENS)
    model = Fingerprint.of_revision(
        f"org/{dtype}@1", {"model_type": "llama"}, kv_dtype=dtype, layout=layout.layout_id
    )
    with (
        connect(daemon.socket_path) as client,
        client.attach(model, Pool(layout, planes), shard=Shard(0, LAYERS, 0, HEADS)) as worker,
    ):
        before = client.status().counters["disk_written_bytes"]
        receipt = worker.park("chat", TOKENS, list(range(PAGES)), level="disk", **how).result()
        assert receipt.level == "disk", receipt
        return int(client.status().counters["disk_written_bytes"] - before)


@pytest.mark.parametrize(
    ("dtype", "how", "width"),
    [("float32", {}, 4), ("float16", {}, 2), ("float32", {"fidelity": "fp8"}, 1)],
)
def test_the_width_is_that_of_what_is_stored(
    make_daemon: Callable[..., Embedded],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    how: dict[str, Any],
    width: int,
) -> None:
    used: set[int] = set()
    write_many = DiskTier.write_many

    def watched(self: DiskTier, items: Any, *args: Any, item_bytes: int = 0, **rest: Any) -> Any:
        used.add(item_bytes)
        return write_many(self, items, *args, item_bytes=item_bytes, **rest)

    monkeypatch.setattr(DiskTier, "write_many", watched)
    park(make_daemon(disk__codec="planes-zstd"), dtype, **how)
    assert used == {width}


def test_planes_of_single_precision_become_smaller_with_the_right_width(
    make_daemon: Callable[..., Embedded], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = park(make_daemon(disk__codec="planes-zstd"), "float32")
    monkeypatch.setattr(wire, "item_bytes", lambda *_: 2)
    wrong = park(make_daemon(disk__codec="planes-zstd"), "float32")
    assert right < 0.95 * wrong
