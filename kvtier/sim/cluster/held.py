"""What a tier of a node holds, in the order of its policy, and for whom."""

from __future__ import annotations

from kvtier.policy.interfaces import EvictionPolicy
from kvtier.sim.cluster.runs import Run


class Held:
    """One tier: runs by number, bytes, and byte-seconds by tenant. The policy is the daemon's."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        self.capacity_bytes = capacity_bytes
        self.policy = policy
        self.used_bytes = 0
        # That came in and went, in all.
        self.moved_bytes = 0
        self._runs: dict[int, Run] = {}
        # Tenant -> [bytes held, since when, byte-seconds up to then].
        self._shares: dict[int, list[float]] = {}

    def __contains__(self, run: Run) -> bool:
        return run.number in self._runs

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, key: bytes) -> Run | None:
        """The run of a policy's key."""
        return self._runs.get(int.from_bytes(key, "big"))

    def has_room(self, nbytes: int) -> bool:
        """Whether so much fits without an eviction."""
        return self.used_bytes + nbytes <= self.capacity_bytes

    def add(self, run: Run, now_s: float) -> None:
        """Hold it; there is room, and it is not here."""
        self._runs[run.number] = run
        self.used_bytes += run.nbytes
        self.moved_bytes += run.nbytes
        self._count(run.tenant, run.nbytes, now_s)
        self.policy.added(run.key, run.parent_key, run.nbytes, now_s)

    def remove(self, run: Run, now_s: float) -> None:
        """Hold it no longer."""
        del self._runs[run.number]
        self.used_bytes -= run.nbytes
        self.moved_bytes += run.nbytes
        self._count(run.tenant, -run.nbytes, now_s)
        self.policy.removed(run.key)

    def byte_seconds(self, now_s: float) -> dict[int, float]:
        """What each tenant held, times how long, up to now."""
        for tenant in self._shares:
            self._count(tenant, 0, now_s)
        return {tenant: share[2] for tenant, share in sorted(self._shares.items())}

    def _count(self, tenant: int, nbytes: int, now_s: float) -> None:
        share = self._shares.get(tenant)
        if share is None:
            self._shares[tenant] = [nbytes, now_s, 0.0]
            return
        share[2] += share[0] * (now_s - share[1])
        share[0] += nbytes
        share[1] = now_s
