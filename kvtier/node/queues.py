"""What is under way between tiers: what a restore that is asked for now would wait behind."""

from __future__ import annotations

from kvtier.node.copies import Copies
from kvtier.node.disk_side import DiskSide


class Queues:
    """Bytes that were asked for and have not arrived."""

    def __init__(self, copies: Copies, disk: DiskSide) -> None:
        self._copies = copies
        self._disk = disk

    def bytes(self) -> dict[str, int]:
        """By source of a restore. Whatever it comes from, it is copied behind all other copies in the end.

        What comes from the drive is also behind what is being written there.
        """
        copies = sum(job.running_bytes + job.to_come_bytes for job in self._copies.all())
        beyond = dict.fromkeys(("host", "peer"), copies)
        return beyond | {"disk": copies + self._disk.writing_bytes()}
