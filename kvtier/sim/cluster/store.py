"""Host memory and disk of one node, over runs, under the daemon's policies.

What it leaves out of the real node: a copy that is under way needs no lease, since what is used is never the
next to go; room is free as soon as its eviction is decided; what a park finds on disk alone comes back to
host memory.  The core-driven store has none of these simplifications.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtier.policy.interfaces import Policies, Segment
from kvtier.sim.cluster.held import Held
from kvtier.sim.cluster.links import Drive
from kvtier.sim.cluster.runs import Run
from kvtier.sim.cluster.scenario import Disk


@dataclass(frozen=True, slots=True)
class Found:
    """The stored front of a request: runs in host memory up to host_tokens, then on disk up to tokens.

    tip: the last run of it; on_disk: those that would be read, the front first.
    """

    tip: Run | None
    host_tokens: int
    tokens: int
    on_disk: tuple[Run, ...]


class RunStore:
    """One node's tiers."""

    def __init__(
        self, host_bytes: int, disk: Disk, drive: Drive, policies: Policies, *, write_through: bool
    ) -> None:
        self.policies = policies
        self.host = Held(host_bytes, policies.host)
        self.disk = Held(disk.capacity_bytes, policies.disk)
        self.drive = drive
        self._backlog_s = disk.write_backlog_s
        self._write_through = write_through
        self.written: dict[int, float] = {}
        self.dropped = 0
        # The last run on disk of a chain, by the chain's end: so that a use of the one is one of the other.
        self._disk_tips: dict[int, Run] = {}

    def find(self, front: Run | None, known: int) -> Found:
        """What of the known front is here. Host memory holds fronts: leaves go first."""
        missing = self.lacks(front)
        tip = missing[0].parent if missing else front
        host_tokens = min(tip.end, known) if tip is not None else 0
        on_disk: list[Run] = []
        for below in missing:
            if below not in self.disk:
                break
            on_disk.append(below)
            tip = below
        tokens = min(tip.end, known) if tip is not None else 0
        return Found(tip, host_tokens, tokens, tuple(on_disk))

    def use(self, found: Found, now_s: float) -> None:
        """The front was asked for."""
        if found.tip is None:
            return
        self.host.policy.used((found.on_disk[0].parent_key) if found.on_disk else found.tip.key, now_s)
        on_disk = found.on_disk[-1] if found.on_disk else self._disk_tips.get(found.tip.number)
        if on_disk is not None:
            self.disk.policy.used(on_disk.key, now_s)

    def bring(self, runs: tuple[Run, ...], upto: int, now_s: float) -> None:
        """Runs that are read from disk lie in host memory from then on, as long as there is room."""
        for run in runs:
            if run.start >= upto or not self._take_in(run, now_s):
                return

    def lacks(self, last: Run | None) -> list[Run]:
        """What of a chain host memory does not hold, the front first."""
        new: list[Run] = []
        run = last
        while run is not None and run not in self.host:
            new.append(run)
            run = run.parent
        return new[::-1]

    def park(self, last: Run | None, new: list[Run], now_s: float) -> tuple[int, float]:
        """Keep a whole chain, of which host memory lacks `new`.

        Answers the bytes that had to come from the GPU, and when it is as durable as was asked.
        """
        held = new[0].parent if new else last
        tip = self._disk_tips.pop(held.number, None) if held is not None else None
        nbytes, done_s = 0, now_s
        for run in new:
            if not self._take_in(run, now_s):
                break
            nbytes += run.nbytes
            if self._write_through and run not in self.disk:
                done_s = self._write(run, now_s)
            if run in self.disk:
                tip = run
        if tip is not None and last is not None:
            self._disk_tips[last.number] = tip
        return nbytes, done_s

    def segments(
        self, found: Found, reach: int, gpu_tokens: int, token_bytes: float, step_tokens: int
    ) -> tuple[Segment, ...]:
        """What a restore would load, for the policy; what the GPU has costs nothing.

        reach: up to which token a peer has what is not found here.  step_tokens: how far apart the places
        lie where a load may begin or end.
        """
        spans = ((found.host_tokens, "host"), (found.tokens, "disk"), (reach, "peer"))
        segments: list[Segment] = []
        start = 0
        for end, source in spans:
            # What is to be loaded begins behind what the GPU has.
            for stop in (min(gpu_tokens, end), end):
                if start < stop:
                    nbytes = int((stop - max(start, gpu_tokens)) * token_bytes) if stop > gpu_tokens else 0
                    segments.append(Segment(start, stop, source, nbytes, step_tokens=step_tokens))
                    start = stop
        return tuple(segments)

    def _take_in(self, run: Run, now_s: float) -> bool:
        """Hold a run whose parent is held. The policy may find that the run's own chain is worth least."""
        if run.nbytes > self.host.capacity_bytes:
            return False
        if not self.host.has_room(run.nbytes):
            for key in self.host.policy.victims(now_s):
                victim = self.host.find(key)
                if victim is None:
                    continue
                if victim is run.parent:
                    return False
                self._push_out(victim, now_s)
                if self.host.has_room(run.nbytes):
                    break
            else:
                return False
        self.host.add(run, now_s)
        return True

    def _push_out(self, run: Run, now_s: float) -> None:
        if run not in self.disk and self.disk.capacity_bytes:
            worth = self.policies.admission.demote(run.key, run.nbytes, now_s)
            if not worth or self.drive.backlog_s(now_s) > self._backlog_s:
                self.dropped += 1
            else:
                self._write(run, now_s)
        self.host.remove(run, now_s)

    def _write(self, run: Run, now_s: float) -> float:
        """Make room on disk and write; answers when it is durable."""
        if run.nbytes > self.disk.capacity_bytes:
            return now_s
        if not self.disk.has_room(run.nbytes):
            for key in self.disk.policy.victims(now_s):
                victim = self.disk.find(key)
                if victim is not None:
                    self.disk.remove(victim, now_s)
                if self.disk.has_room(run.nbytes):
                    break
            else:
                return now_s
        self.disk.add(run, now_s)
        self.written[run.tenant] = self.written.get(run.tenant, 0) + run.nbytes
        return self.drive.write(now_s, run.nbytes)
