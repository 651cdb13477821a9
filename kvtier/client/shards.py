"""The ranks of one model that park and restore conversations together.

ranks = Shards.of(ModelSpec.from_config(folder), tp=4, pp=2)
worker = kv.attach(model, pool, shard=ranks[rank], ranks=ranks)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.errors import GeometryError
from kvtier.objects import Shard

if TYPE_CHECKING:
    from kvtier.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shards:
    """The slice of each rank, in order of rank; ranks that hold the same KV have equal slices."""

    ranks: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Raises GeometryError for what names no slices."""
        if not self.ranks or not all(isinstance(shard, Shard) for shard in self.ranks):
            raise GeometryError(f"{self.ranks!r} are not slices", fix="give one Shard for each rank")

    @classmethod
    def of(cls, spec: ModelSpec, *, tp: int = 1, pp: int = 1) -> Shards:
        """Of tp times pp ranks; the number of a rank is pp_rank * tp + tp_rank. Raises GeometryError."""
        return cls(tuple(spec.shard_for(t, tp, p, pp) for p in range(pp) for t in range(tp)))

    def __getitem__(self, rank: int) -> Shard:
        return self.ranks[rank]

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def names(self) -> list[str]:
        """Of the slices, one for each rank."""
        return [shard.name for shard in self.ranks]
