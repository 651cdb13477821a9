"""Workers of a rig, and what they have asked for; the geometries that its tests use."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtier.geometry import Geometry, GroupGeometry
from kvtier.messages import calls as m
from kvtier.receipts import ParkReceipt, RestoreReceipt
from kvtier.testing.rig_ops import Proc
from kvtier.testing.rig_world import Pages

UNIT = 4096
FULL = GroupGeometry("full", token_bytes=UNIT // 2)
SLIDING = GroupGeometry("sliding", token_bytes=UNIT // 4, window_tokens=6)
STATE = GroupGeometry("state", token_bytes=0, state_bytes=UNIT)
PLAIN = Geometry(block_tokens=4, page_tokens=2, groups=(FULL,))
HYBRID = Geometry(block_tokens=4, page_tokens=2, groups=(FULL, SLIDING, STATE))


@dataclass
class RigWorker:
    """An attached worker. name: '' until the node has answered."""

    proc: Proc
    geometry: Geometry
    fingerprint: bytes
    shard: str
    mode: m.Mode
    name: str = ""

    @property
    def peer(self) -> str:
        """Its control connection."""
        return self.proc.peer


@dataclass
class RigPark:
    """A park as its worker sees it."""

    worker: RigWorker
    message: m.Park
    pages: Pages
    job: str = ""
    released: bool = False
    receipts: list[ParkReceipt] = field(default_factory=list)
    failed: m.Failed | None = None

    @property
    def receipt(self) -> ParkReceipt:
        """The one receipt."""
        (receipt,) = self.receipts
        return receipt


@dataclass
class RigRestore:
    """A restore as its worker sees it."""

    worker: RigWorker
    message: m.Restore
    pages: Pages
    planned: m.Planned
    job: str = ""
    receipts: list[RestoreReceipt] = field(default_factory=list)
    failed: m.Failed | None = None

    @property
    def receipt(self) -> RestoreReceipt:
        """The one receipt."""
        (receipt,) = self.receipts
        return receipt
