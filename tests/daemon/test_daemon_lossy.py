"""Parks at a lossy fidelity, through the whole daemon, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from kvtier.client.client import connect
from kvtier.client.worker import Worker
from kvtier.daemon.embedded import Embedded
from kvtier.errors import GeometryError
from kvtier.geometry import LOSSY
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.gpu.shared_pool import SharedMemory, SharedPool
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.testing.kv_memory import SHARD as BYTES_SHARD
from kvtier.testing.kv_memory import KvMemory, tokens_of

LAYERS, HEADS, DIM, PAGE_TOKENS, BLOCK_TOKENS, PAGES = 2, 4, 32, 16, 32, 32
COUNT = 200
TOKENS = tokens_of(1, COUNT)
MINE, OTHERS = list(range(13)), list(range(15, 28))
Halves = npt.NDArray[np.float16]


@dataclass
class Rig:
    planes: list[Halves]
    worker: Worker

    def rows(self, pages: list[int]) -> npt.NDArray[np.float64]:
        rows = [p[pages].reshape(-1, HEADS, DIM)[:COUNT].astype(np.float64) for p in self.planes]
        return np.stack(rows)


@pytest.fixture(params=["worker", "shared"])
def rig(request: pytest.FixtureRequest, make_daemon: Callable[..., Embedded]) -> Iterator[Rig]:
    daemon = make_daemon()
    shape = (PAGES, PAGE_TOKENS, HEADS, DIM)
    nbytes = int(np.prod(shape)) * 2
    memory = SharedMemory.create(2 * LAYERS * nbytes)
    planes: list[Halves] = [memory.array(shape, np.float16) for _ in range(2 * LAYERS)]  # type: ignore[misc]
    draw = np.random.default_rng(1)
    for plane in planes:
        plane[...] = draw.standard_normal(shape)
    pairs = list(zip(planes[0::2], planes[1::2], strict=True))
    layout = paged(pairs, "page token head dim", block_tokens=BLOCK_TOKENS)
    pool = SharedPool.create(layout, memory) if request.param == "shared" else Pool(layout, planes)
    model = Fingerprint.of_revision(
        "org/model@1", {"model_type": "llama"}, kv_dtype="fp16", layout=layout.layout_id
    )
    with (
        connect(daemon.socket_path) as client,
        client.attach(model, pool, shard=Shard(0, LAYERS, 0, HEADS)) as worker,
    ):
        yield Rig(planes, worker)
    memory.close()


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("level", ["host", "disk"])
def test_a_lossy_park_answers_lossy_restores_alone(rig: Rig, codec: str, level: str) -> None:
    before = rig.rows(MINE)
    receipt = rig.worker.park("chat", TOKENS, MINE, fidelity=codec, level=level).result()  # type: ignore[arg-type]
    assert receipt.ok, receipt
    exact_bytes = before.size * 2
    assert exact_bytes / 2 < receipt.bytes_stored < 0.6 * exact_bytes
    assert rig.worker.plan("chat", TOKENS).load_tokens == 0, "an exact park was promised to nobody"
    other = next(c for c in LOSSY if c != codec)
    assert rig.worker.plan("chat", TOKENS, fidelity=other).load_tokens == 0
    for plane in rig.planes:
        plane[OTHERS] = np.nan
    got = rig.worker.restore(rig.worker.plan("chat", TOKENS, fidelity=codec), OTHERS, deadline_s=10)
    assert got.ok and got.tokens == COUNT
    after = rig.rows(OTHERS)
    error = np.sqrt(((after - before) ** 2).sum() / (before**2).sum())
    assert receipt.relative_error == pytest.approx(error, rel=0.02)
    assert 0.001 < error < {"int8": 0.01, "fp8": 0.04}[codec]
    assert np.array_equal(rig.rows(MINE), before)


def test_exact_and_lossy_stand_side_by_side(rig: Rig) -> None:
    before = rig.rows(MINE)
    for fidelity in ("exact", *LOSSY):
        receipt = rig.worker.park("chat", TOKENS, MINE, fidelity=fidelity).result()
        assert receipt.ok and receipt.objects_shared == 0
        assert (receipt.relative_error == 0.0) == (fidelity == "exact")
    got = rig.worker.restore(rig.worker.plan("chat", TOKENS), OTHERS, deadline_s=10)
    assert got.tokens == COUNT
    assert np.array_equal(rig.rows(OTHERS), before)
    again = rig.worker.park("chat", TOKENS, MINE, fidelity="fp8").result()
    assert again.ok and again.objects_stored == 0


def test_what_a_codec_cannot_keep_is_said_and_nothing_is_kept(rig: Rig) -> None:
    rig.planes[0][3, 2, 1, 5] = np.inf
    receipt = rig.worker.park("chat", TOKENS, MINE, fidelity="int8").result()
    assert receipt.level == "none" and receipt.reason == "copy_failed" and "not finite" in receipt.detail
    assert receipt.released
    assert rig.worker.park("chat", TOKENS, MINE).result().ok
    with pytest.raises(GeometryError, match="'int4' is not known"):
        rig.worker.park("chat", TOKENS, MINE, fidelity="int4")


def test_a_pool_of_words_has_no_lossy_form(make_daemon: Callable[..., Embedded]) -> None:
    daemon, kv = make_daemon(), KvMemory(32)
    with (
        connect(daemon.socket_path) as client,
        client.attach(kv.model, kv.pool, shard=BYTES_SHARD) as worker,
        pytest.raises(GeometryError, match="cannot be kept at fidelity 'fp8'"),
    ):
        worker.park("chat", TOKENS, MINE, fidelity="fp8")
