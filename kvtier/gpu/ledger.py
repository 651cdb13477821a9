"""Which pages running copies name, so that nothing writes into pages that somebody else uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

Page: TypeAlias = tuple[int, int]
"""(space, page id), as in Binding.named_pages()."""


@dataclass(slots=True)
class PageLedger:
    """Claims of jobs on the pages of one pool: any number of readers, or one writer.

    A gather reads pages, a scatter writes them.  Not thread-safe; pure.
    """

    _writer: dict[Page, str] = field(default_factory=dict)
    _readers: Counter[Page] = field(default_factory=Counter)
    _claims: dict[str, tuple[frozenset[Page], bool]] = field(default_factory=dict)

    def conflicts(self, pages: Iterable[Page], *, writes: bool) -> frozenset[Page]:
        """Those of the pages that cannot be claimed now. Changes nothing."""
        return frozenset(p for p in pages if p in self._writer or (writes and self._readers[p] > 0))

    def claim(self, job: str, pages: frozenset[Page], *, writes: bool) -> frozenset[Page]:
        """Claim all of the pages, or none; answers the ones in the way. A job claims once."""
        if job in self._claims:
            raise ValueError(f"job {job} has claimed its pages already")
        taken = self.conflicts(pages, writes=writes)
        if taken:
            return taken
        self._claims[job] = (pages, writes)
        if writes:
            self._writer.update(dict.fromkeys(pages, job))
        else:
            self._readers.update(pages)
        return taken

    def release(self, job: str) -> None:
        """The job has no copy queued or running any more. Unknown jobs are no error."""
        pages, writes = self._claims.pop(job, (frozenset(), False))
        for page in pages:
            if writes:
                del self._writer[page]
            else:
                self._readers[page] -= 1
                if not self._readers[page]:
                    del self._readers[page]

    def busy(self, pages: Iterable[Page]) -> frozenset[Page]:
        """Those of the pages that a claim names: what cannot be proven quiet."""
        return frozenset(p for p in pages if p in self._writer or p in self._readers)
