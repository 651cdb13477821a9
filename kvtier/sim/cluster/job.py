"""A request on its way through the cluster."""

from __future__ import annotations

from kvtier.sim.cluster.runs import Run
from kvtier.sim.workload.turns import Turn


class Job:
    """row: its number.  front, known: the last run, and the tokens, of what it shares with earlier rows.
    last: the run that ends its own prompt and output.  resumes: it goes on from a row of its conversation;
    idle_s: since the end of that row.  arrived_s: which can be later than the load has it.

    Tokens of the front by where they came from: gpu, host, disk, peer.  past: where computing begins again
    after what was found; of that, computed_front tokens are computed while the rest comes, until loaded_s.
    """

    __slots__ = (
        "arrived_s",
        "computed_front",
        "disk_tokens",
        "expected_s",
        "front",
        "gpu_tokens",
        "host_tokens",
        "idle_s",
        "known",
        "last",
        "late",
        "loaded_s",
        "past",
        "peer_tokens",
        "ready_s",
        "resumes",
        "row",
        "turn",
    )

    def __init__(
        self, row: int, turn: Turn, front: Run | None, last: Run | None, known: int, *, resumes: bool
    ) -> None:
        self.row, self.turn = row, turn
        self.front, self.last, self.known, self.resumes = front, last, known, resumes
        self.idle_s = 0.0
        self.gpu_tokens = self.host_tokens = self.disk_tokens = self.peer_tokens = 0
        self.past = 0
        self.late = False
        self.expected_s = self.loaded_s = 0.0
        self.computed_front = 0
        self.arrived_s = self.ready_s = turn.t_s

    @property
    def usable(self) -> int:
        """Tokens of the front that can be spared: the last token of a prompt is always computed."""
        return min(self.known, max(self.turn.tokens_in - 1, 0))

    @property
    def found(self) -> int:
        """Tokens that were not computed."""
        return self.past - self.computed_front

    @property
    def pool_tokens(self) -> int:
        """Room that it takes in the engine's pool."""
        return self.turn.tokens_in + self.turn.tokens_out
