"""`python -m benchmarks.codecs`: what the disk tier's codecs and seal save and cost.

For each codec, on real KV and on random bytes: ratio (payload bytes over stored bytes), encode and decode in
GB/s of payload and of one thread's processor time, so that other work on the machine counts little, and the
speed of the link, be it a drive or a network, below which it pays.  With stored = payload / ratio and a link
of B bytes/s, a raw block takes payload / B.

    unpipelined   coding, then the link: pays while payload / B > stored / B + payload / codec speed,
                  so below (1 - 1 / ratio) * codec speed.  One block, one thread.
    pipelined     blocks coded while others are on the link, which is what a long restore does: pays while
                  payload / B > max(stored / B, payload / codec speed), so below the codec's speed.

Storing counts the encoder, loading the decoder; what is never smaller pays at no speed.  `sealed` is
AES-256-GCM under a new key, header and mask included, and pays in other coin.  `fp8` and `int8` are lossy:
fidelities of a park, coded between the pool and host memory by numpy, so they save host memory and every
link behind it.

Then the disk tier itself on this machine's drive: the same blocks written with one commit, and read again,
with each codec and with seals, raw and the other alternately; ratios of the seconds to raw's of that round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.real_kv import DIM, bf16_blocks
from kvtier.bench.lines import Line, alternate, rate_line, report
from kvtier.bench.memory import Bytes, faulted
from kvtier.checksum import checksum
from kvtier.disk.codecs import CODECS, RAW
from kvtier.disk.coder import Coder
from kvtier.disk.entry import room_for
from kvtier.disk.header import decode
from kvtier.disk.tier import DiskTier
from kvtier.disk.vault import Vault
from kvtier.geometry import LOSSY
from kvtier.gpu.quantise import Loss, Values
from kvtier.gpu.quantise import decode as decode_lossy
from kvtier.gpu.quantise import encode as encode_lossy
from kvtier.testing.tier_kit import default_meta

ITEM_BYTES = 2
_ROUNDS = 5
_MASTER_KEY = bytes(range(32))
_T = TypeVar("_T")
_STORE_ID = bytes(16)
# A codec, and whether the blocks are sealed.
_WAYS: tuple[tuple[str, bool], ...] = (
    (RAW, False),
    ("lz4", False),
    ("planes-lz4", False),
    ("planes-zstd", False),
    (RAW, True),
    ("planes-zstd", True),
)


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--tokens", type=int, default=2048, help="of real KV, 32 KiB each")
    parser.add_argument("--directory", type=Path, help="where to measure the drive; the default is /tmp's")
    options = parser.parse_args()
    report(_figures(bf16_blocks(options.tokens), options.directory), as_json=options.json)
    return 0


def _figures(kv: list[Bytes], directory: Path | None) -> Iterator[Line]:
    draw = np.random.default_rng(1)
    noise = [draw.integers(0, 256, block.nbytes, dtype=np.uint8) for block in kv[:2]]
    for name, blocks in (("real bf16 KV", kv), ("random bytes", noise)):
        for codec in CODECS:
            if codec != RAW:
                yield _codec(name, blocks, codec)
        yield _sealed(name, blocks)
    for codec in LOSSY:
        yield _lossy(kv, codec)
    yield from _disk(kv, directory)


# -- the codecs alone


def _codec(name: str, blocks: Sequence[Bytes], codec: str) -> Line:
    coder, nbytes = CODECS[codec], blocks[0].nbytes
    into, back = faulted(nbytes), faulted(nbytes)
    lengths = [coder.encode(block, ITEM_BYTES, into[: nbytes - 4096]) for block in blocks]
    ratio = sum(b.nbytes for b in blocks) / sum(nbytes if n is None else n for n in lengths)
    room = into[: nbytes - 4096]
    encode_s = _median_s(lambda block: coder.encode(block, ITEM_BYTES, room), blocks)
    if None in lengths:
        return _line(name, codec, ratio, nbytes / encode_s, None)
    stored = []
    for block in blocks:
        length = coder.encode(block, ITEM_BYTES, room)
        stored.append(room[:length].copy())
    decode_s = _median_s(lambda one: coder.decode(one, back), stored)
    return _line(name, codec, ratio, nbytes / encode_s, nbytes / decode_s)


def _lossy(blocks: Sequence[Bytes], codec: str) -> Line:
    """What a park at this fidelity does between pool and slot. relative_error: of all values together."""
    values = Values("bf16", DIM)
    nbytes = blocks[0].nbytes
    into, back = faulted(values.encoded_bytes(nbytes)), faulted(nbytes)
    loss, stored = Loss(), []
    for block in blocks:
        loss += encode_lossy(block, values, codec, into)
        stored.append(into.copy())
    encode_s = _median_s(lambda block: encode_lossy(block, values, codec, into), blocks)
    decode_s = _median_s(lambda one: decode_lossy(one, values, codec, back), stored)
    line = _line("real bf16 KV", codec, nbytes / into.nbytes, nbytes / encode_s, nbytes / decode_s)
    return replace(line, detail={"relative_error": round(loss.relative, 5), **line.detail})


def _sealed(name: str, blocks: Sequence[Bytes]) -> Line:
    """Raw blocks sealed and unsealed, with all that a write and a read do besides the drive."""
    nbytes = blocks[0].nbytes
    back = faulted(nbytes)
    with tempfile.TemporaryDirectory() as folder:
        vault = Vault(Path(folder) / "vault", _STORE_ID, _MASTER_KEY)
        coder = Coder(_STORE_ID, vault, 4 * nbytes)
        packed = []
        for number, block in enumerate(blocks):
            meta = replace(default_meta(number, nbytes), checksum=checksum(block))
            with coder.pack(meta, number, block, RAW, ITEM_BYTES) as one:
                room = np.zeros(coder.unpack_bytes(RAW, nbytes), dtype=np.uint8)
                room[:nbytes] = one.body
                packed.append((one.page, room))
                assert one.key is not None
                vault.keep([one.key])

        def seal(block: Bytes) -> None:
            meta = replace(default_meta(0, nbytes), checksum=0)
            with coder.pack(meta, 0, block, RAW, ITEM_BYTES):
                pass

        seal_s = _median_s(seal, blocks)
        unseal_s = _median_s(lambda one: coder.unpack(decode(one[0]), one[0], one[1], back), packed)
        vault.close()
    return _line(name, "sealed raw", 1.0, nbytes / seal_s, nbytes / unseal_s)


def _line(name: str, codec: str, ratio: float, encode: float, decode: float | None) -> Line:
    """Speeds in bytes/s; decode: None when it stays raw, and nothing is decoded."""
    saved = max(0.0, 1 - 1 / ratio)
    speeds = {"store": encode, "load": decode or 0.0}
    pays = {
        f"{side}_{how}": round(_gb(speed * share), 2)
        for side, speed in speeds.items()
        for how, share in (("unpipelined", saved), ("pipelined", 1.0 if saved else 0.0))
    }
    return Line(
        f"{codec}, {name}",
        round(ratio, 3),
        "ratio",
        detail={
            "encode_gb_s": round(_gb(encode), 2),
            "decode_gb_s": None if decode is None else round(_gb(decode), 2),
            "pays_below_gb_s": pays,
        },
    )


def _median_s(work: Callable[[_T], object], things: Sequence[_T]) -> float:
    """Seconds of one processor for one of the things: the median of the rounds' means."""
    rounds = []
    for _ in range(_ROUNDS + 1):
        begun = time.thread_time()
        for thing in things:
            work(thing)
        rounds.append((time.thread_time() - begun) / len(things))
    return statistics.median(rounds[1:])


def _gb(bytes_per_s: float) -> float:
    return bytes_per_s / 1e9


# -- the disk tier


class _Store:
    """A tier of its own for one way of storing, which writes the same blocks again and again and reads them.

    into: where they are read to.
    """

    def __init__(self, directory: Path, blocks: Sequence[Bytes], into: Bytes, way: tuple[str, bool]) -> None:
        self._codec, sealed = way
        self._blocks, self._into = blocks, into
        self._sums = [checksum(block) for block in blocks]
        directory.mkdir()
        folder = directory / "vault"
        room = sum(room_for(block.nbytes) for block in blocks)
        self.tier = DiskTier(
            directory / "store",
            room,
            segment_bytes=room,
            open_vault=(lambda store_id: Vault(folder, store_id, _MASTER_KEY)) if sealed else None,
        )

    def clear(self) -> None:
        """Make room for the next round."""
        for meta in list(self.tier.objects()):
            self.tier.remove(meta.object_id)
        self.tier.commit([])

    def write(self) -> None:
        """All blocks, one commit."""
        metas = [default_meta(n, block.nbytes) for n, block in enumerate(self._blocks)]
        slots = [self.tier.reserve(meta, holder="w") for meta in metas]
        pairs = list(zip(slots, self._blocks, strict=True))
        for future in self.tier.write_many(pairs, codec=self._codec, item_bytes=ITEM_BYTES):
            future.result()
        self.tier.commit(list(zip(slots, self._sums, strict=True)))

    def read(self) -> None:
        """All blocks, from the drive: O_DIRECT knows no cache."""
        reads, at = [], 0
        for meta in self.tier.objects():
            slot = self.tier.find(meta.object_id)
            assert slot is not None
            reads.append((slot, self._into[at : at + slot.nbytes]))
            at += slot.nbytes
        for future in self.tier.read_many(reads):
            future.result()


def _disk(kv: Sequence[Bytes], directory: Path | None) -> Iterator[Line]:
    nbytes = sum(block.nbytes for block in kv)
    memory, into = faulted(nbytes), faulted(nbytes)
    np.concatenate(kv, out=memory)
    blocks = np.split(memory, len(kv))
    folder = Path(tempfile.mkdtemp(prefix="kvtier-bench-", dir=directory))
    raw = _Store(folder / "raw", blocks, into, (RAW, False))
    try:
        for number, way in enumerate(_WAYS):
            own = _Store(folder / str(number), blocks, into, way)
            try:
                yield from _held_against(raw, own, f"{'sealed ' if way[1] else ''}{way[0]}", nbytes)
            finally:
                own.tier.close()
    finally:
        raw.tier.close()
        shutil.rmtree(folder)


def _held_against(raw: _Store, own: _Store, name: str, nbytes: int) -> Iterator[Line]:
    def clear() -> None:
        raw.clear()
        own.clear()

    yield _tier_line(f"disk tier write, {name}", nbytes, *alternate([raw.write], own.write, _ROUNDS, clear))
    raw.write()
    yield _tier_line(f"disk tier read, {name}", nbytes, *alternate([raw.read], own.read, _ROUNDS))
    clear()


def _tier_line(name: str, nbytes: int, raw_s: Sequence[float], own_s: Sequence[float]) -> Line:
    return rate_line(name, nbytes, raw_s, own_s, limit_is="raw")


if __name__ == "__main__":
    sys.exit(main())
