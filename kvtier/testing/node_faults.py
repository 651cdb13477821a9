"""Faults of the node's core, made on purpose: a fixed scenario catches each, and so does the machine."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.node.copies import Copies
from kvtier.node.disk_dues import DiskDues
from kvtier.node.disk_side import DiskSide


def count_a_job_as_quiet_when_it_is_over(patch: pytest.MonkeyPatch) -> None:
    """Slots are given back while a copy may still touch them."""

    def settle(self: Any, job: Any) -> bool:
        if job.over:
            job.running.clear()
            self._state.host.holder_ended(job.id)
            self._jobs.pop(job.id, None)
            job.worker.jobs.discard(job.id)
        return bool(job.over)

    patch.setattr(Copies, "settle", settle)


def believe_a_disk_that_comes_late(patch: pytest.MonkeyPatch) -> None:
    """What was forgotten before the disk announced it is taken for stored."""
    patch.setattr(DiskDues, "was_forgotten", lambda self, name, after: False)


def remove_before_writing_more_rows(patch: pytest.MonkeyPatch) -> None:
    """What is to be replaced on disk goes before the other is there."""
    write = DiskSide.write

    def careless(self: Any, objects: Any, *rest: Any, **wishes: Any) -> None:
        self.remove([s for s in objects if s.on_disk is not None])
        write(self, objects, *rest, **wishes)

    patch.setattr(DiskSide, "write", careless)
