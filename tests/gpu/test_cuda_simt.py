"""The kernels themselves on a CPU: blocks and warps as threads, misaligned accesses as failures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from kvtier.checksum import PIECE_BYTES, checksum
from kvtier.gpu.describe import paged
from kvtier.gpu.engine import CopyItem
from kvtier.gpu.pool import Pool
from kvtier.testing.fake_device_host import Prepared, compiled
from kvtier.testing.pool_cases import BUILDERS, GEOMETRIES, Case

GATHER, SCATTER, CHECKSUM = 0, 1, 2


@pytest.fixture(scope="module")
def simt(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ("-fsanitize=alignment", "-fno-sanitize-recover=all")
    return compiled("simt_check.cpp", tmp_path_factory.mktemp("simt"), *flags)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[3]], ids=str)
def test_gather_scatter_and_checksum(
    simt: ctypes.CDLL, build: Callable[..., Case], geometry: tuple[str, int, int, int]
) -> None:
    """Whole blocks, tails and windows of every layout; more tiles than warps and fewer."""
    case = build(*geometry)
    case.fill(1)
    table = [7, 3, 1, 9, 30, 31, 32, 2]
    rows = [(0, 16, 0), (16, 13, 3), (0, 1, 0)]
    items = [
        CopyItem(
            group,
            start,
            tokens,
            first,
            0,
            1,
            (0, 0),
            case.layout.geometry.groups[group].object_bytes(tokens, first),
        )
        for group, (start, tokens, first) in product(range(len(case.layout.groups)), rows)
    ]
    wanted = [case.expected(i.group, table, i.start, i.tokens, i.first_valid) for i in items]
    ready = Prepared(case.pool().bind(table), items, 1 << 20)
    ready.launch(simt, GATHER, 2)
    assert ready.out[:-64].tobytes() == b"".join(wanted) and (ready.out[-64:] == 0xEE).all()
    assert ready.launch(simt, CHECKSUM, 2) == [checksum(data) for data in wanted]
    case.fill(2)
    ready.launch(simt, SCATTER, 1)
    assert [case.expected(i.group, table, i.start, i.tokens, i.first_valid) for i in items] == wanted


def test_control_a_launch_of_too_few_tiles_is_seen(simt: ctypes.CDLL) -> None:
    case: Case = BUILDERS[0]("uint16", 4, 8, 64)
    case.fill(1)
    item = CopyItem(0, 0, 16, 0, 0, 1, (0, 0), case.layout.geometry.groups[0].object_bytes(16))
    wanted = case.expected(0, [1, 2, 3, 4], 0, 16, 0)
    for missing in (0, 1):
        ready = Prepared(case.pool().bind([1, 2, 3, 4]), [item], 1 << 20)
        (load,) = ready.steps[0].loads
        base = ctypes.c_uint64(0)
        simt.kv_simt_launch(
            GATHER, ready.segments(ready.work.moves), 1, load.tiles - missing, base, 1, base, base
        )
        assert (ready.out[:-64].tobytes() == wanted) == (not missing)


@pytest.mark.parametrize("row", [2048, 1152, 100, 8, 3])
def test_long_objects(simt: ctypes.CDLL, row: int) -> None:
    """Several pieces with a rest of some kind, rows that 16-byte accesses fit and rows that they do not."""
    tokens, size = 2 * PIECE_BYTES // row + 5, 4
    count = -(-tokens // size)
    tensor = np.random.default_rng(1).integers(0, 256, (count + 3, size, row), dtype=np.uint8)
    layout = paged([(tensor,)], "page token dim", block_tokens=size * count)
    table = np.random.default_rng(2).permutation(count + 3)[:count]
    item = CopyItem(0, 0, tokens, 1, 0, 1, (0, 0), (tokens - 1) * row)
    wanted = tensor[table].reshape(-1, row)[1:tokens].tobytes()
    ready = Prepared(Pool(layout, [tensor]).bind(table), [item], 1 << 18)
    ready.launch(simt, GATHER, 1)
    assert ready.out[:-64].tobytes() == wanted
    assert ready.launch(simt, CHECKSUM, 2) == [checksum(wanted)]


@pytest.mark.parametrize("rest", [1, 240, 241, 1024, 1025, 4096 + 64, PIECE_BYTES])
def test_the_last_piece(simt: ctypes.CDLL, rest: int) -> None:
    """Where the whole blocks, the stripes after them and the last 64 bytes meet."""
    nbytes = PIECE_BYTES + rest
    tensor = np.random.default_rng(3).integers(0, 256, (2, 1, nbytes), dtype=np.uint8)
    layout = paged([(tensor,)], "page token dim", block_tokens=1)
    item = CopyItem(0, 0, 1, 0, 0, 1, (0, 0), nbytes)
    ready = Prepared(Pool(layout, [tensor]).bind([1]), [item], 1 << 20)
    assert ready.launch(simt, CHECKSUM, 3) == [checksum(tensor[1].tobytes())]
