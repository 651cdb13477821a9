"""What the demo found: the figures, the verdict, the table. Pure but for the table's rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from kvtier.cli.demo.comparison import Compared
from kvtier.cli.demo.scenario import Recomputed, Source, TurnJob, TurnRecord, Usage, source_of

MIB = 1 << 20
ROWS: tuple[tuple[Source, str], ...] = (
    ("host", "host memory"),
    ("disk", "disk"),
    ("both", "host memory and disk"),
)


@dataclass(frozen=True, slots=True)
class SourceFigures:
    """Resumed turns of one source. Times are medians in seconds, of the same turns.

    restore_s: the restore alone; ttft_s: with it, and with computing the new message.
    """

    turns: int
    restored_tokens: int
    restored_bytes: int
    restore_s: float | None
    ttft_s: float | None
    recompute_s: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is told at the end.

    resumable: turns after the first of a conversation; resumed: those that got back all that was parked.
    compared: by share, (bit-identical turns, turns).  kv_bytes: of all conversations' last caches;
    largest_bytes: of the largest one, which is all that the model holds at a time.  place: of the KV that
    was copied, as status names it.
    """

    conversations: int
    turns: int
    resumable: int
    resumed: int
    restored_tokens: int
    sources: dict[Source, SourceFigures]
    recompute_s: float | None
    compared: dict[str, tuple[int, int]]
    kv_bytes: int
    largest_bytes: int
    tiers: dict[str, Usage]
    kills: int
    seconds: float
    problems: tuple[str, ...]
    place: str = ""

    @property
    def bit_identical(self) -> bool:
        """Whether every turn was compared and equals its reference."""
        same = sum(equal for equal, _ in self.compared.values())
        return same == self.turns and self.turns > 0

    def as_dict(self) -> dict[str, Any]:
        """For --json. ttft_s: medians; null where no turn was of that kind."""
        times = {
            name: self.sources[name].ttft_s if name in self.sources else None for name in ("host", "disk")
        }
        return {
            "conversations": self.conversations,
            "turns": self.turns,
            "resumable": self.resumable,
            "resumed": self.resumed,
            "bit_identical": self.bit_identical,
            "compared": {share: list(counts) for share, counts in self.compared.items()},
            "restored_tokens": self.restored_tokens,
            "ttft_s": {"recompute": self.recompute_s, **times},
            "by_source": {
                name: {
                    "turns": found.turns,
                    "restored_tokens": found.restored_tokens,
                    "restored_bytes": found.restored_bytes,
                    "restore_s": found.restore_s,
                    "ttft_s": found.ttft_s,
                    "recompute_s": found.recompute_s,
                }
                for name, found in self.sources.items()
            },
            "kv_bytes": self.kv_bytes,
            "largest_kv_bytes": self.largest_bytes,
            "tiers": {
                name: {"used_bytes": tier.used_bytes, "capacity_bytes": tier.capacity_bytes}
                for name, tier in self.tiers.items()
            },
            "device": self.place,
            "daemon_kills": self.kills,
            "seconds": round(self.seconds, 1),
            "problems": list(self.problems),
        }


@dataclass(frozen=True, slots=True)
class Findings:
    """What the demo's processes said. kills: of the whole daemon; seconds: from start to end.

    place: see Report.
    """

    jobs: Sequence[TurnJob]
    records: Sequence[TurnRecord]
    recomputed: Sequence[Recomputed]
    compared: Sequence[Compared]
    tiers: Mapping[str, Usage]
    kills: int
    seconds: float
    place: str = ""


def make_report(found: Findings) -> Report:
    """Sum it up."""
    jobs = {(job.conversation, job.round): job for job in found.jobs}
    computed = {(r.conversation, r.round): r.ttft_s for r in found.recomputed}
    resumable = [r for r in found.records if jobs[r.conversation, r.round].before]
    resumed = [r for r in resumable if r.restored_tokens == _parked_before(jobs[r.conversation, r.round])]
    shares: dict[str, tuple[int, int]] = {}
    for verdict in found.compared:
        share = jobs[verdict.conversation, verdict.round].share
        equal, count = shares.get(share, (0, 0))
        shares[share] = (equal + (not verdict.problem), count + 1)
    last = {record.conversation: record.cache_bytes for record in found.records}
    return Report(
        conversations=len(last),
        turns=len(found.records),
        resumable=len(resumable),
        resumed=len(resumed),
        restored_tokens=sum(r.restored_tokens for r in found.records),
        sources={
            source: _figures([r for r in resumed if source_of(r) == source], computed)
            for source, _ in ROWS
            if any(source_of(r) == source for r in resumed)
        },
        recompute_s=_median([computed[r.conversation, r.round] for r in resumed if _key(r) in computed]),
        compared=shares,
        kv_bytes=sum(last.values()),
        largest_bytes=max(last.values(), default=0),
        tiers=dict(found.tiers),
        kills=found.kills,
        seconds=found.seconds,
        problems=tuple(_problems(found, jobs)),
        place=found.place,
    )


def _parked_before(job: TurnJob) -> int:
    """The last token of a transcript was chosen, not fed: its KV does not exist yet."""
    return len(job.before) - 1


def _key(record: TurnRecord) -> tuple[str, int]:
    return record.conversation, record.round


def _figures(records: Sequence[TurnRecord], computed: Mapping[tuple[str, int], float]) -> SourceFigures:
    return SourceFigures(
        turns=len(records),
        restored_tokens=sum(r.restored_tokens for r in records),
        restored_bytes=sum(r.restored_bytes for r in records),
        restore_s=_median([r.restore_s for r in records]),
        ttft_s=_median([r.ttft_s for r in records]),
        recompute_s=_median([computed[_key(r)] for r in records if _key(r) in computed]),
    )


def _median(values: Sequence[float]) -> float | None:
    return round(median(values), 4) if values else None


def _problems(found: Findings, jobs: Mapping[tuple[str, int], TurnJob]) -> list[str]:
    """Everything that was promised and is not so, one line each."""
    lines = []
    for verdict in found.compared:
        if verdict.problem:
            lines.append(f"{verdict.conversation}, turn {verdict.round + 1}: {verdict.problem}")
    for record in found.records:
        place = f"{record.conversation}, turn {record.round + 1}"
        job = jobs[_key(record)]
        if record.park_level != "disk":
            lines.append(f"{place}: parked at level {record.park_level!r}, not 'disk': {record.park_reason}")
        if job.before and record.restored_tokens != _parked_before(job):
            lines.append(
                f"{place}: {record.restored_tokens} of {_parked_before(job)} tokens came back: "
                f"{record.reason or 'no reason given'}"
            )
    return lines


def make_table(report: Report) -> Table:
    """Resumed turns by the tier that they came from."""
    where = f", KV on {report.place}" if report.place else ""
    table = Table(title=f"Turns resumed by another process{where}", title_justify="left")
    table.add_column("from")
    columns = ("turns", "tokens", "MiB", "restore alone", "first token, restored", "first token, recomputed")
    for name in columns:
        table.add_column(name, justify="right")
    for source, label in ROWS:
        row = report.sources.get(source)
        if row is not None:
            table.add_row(
                label,
                str(row.turns),
                f"{row.restored_tokens:,}",
                f"{row.restored_bytes / MIB:,.0f}",
                _seconds(row.restore_s),
                _seconds(row.ttft_s),
                _seconds(row.recompute_s),
            )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def make_summary(report: Report) -> list[str]:
    """The lines below the table."""
    lines = [
        f"{report.conversations} conversations, {report.turns} turns; {report.resumed} of {report.resumable} "
        f"resumed with everything that was parked; the daemon was killed {_times(report.kills)} on the way",
        f"KV of all conversations {report.kv_bytes / MIB:,.0f} MiB; the model held one at a time, "
        f"at most {report.largest_bytes / MIB:,.0f} MiB",
    ]
    lines += [
        f"{name}: {tier.used_bytes / MIB:,.0f} MiB used of {tier.capacity_bytes / MIB:,.0f}"
        for name, tier in report.tiers.items()
        if tier.capacity_bytes
    ]
    references = {"conversation": "the uninterrupted run", "prefix": "a warm prefix hit"}
    lines += [
        f"share={share}: {equal} of {count} continuations bit for bit as in {references[share]}"
        for share, (equal, count) in sorted(report.compared.items())
    ]
    lines += [
        f"Restoring from {label} was not faster than recomputing at this model's size"
        for source, label in ROWS
        if _slower(report.sources.get(source))
    ]
    return lines + [f"PROBLEM {line}" for line in report.problems]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _slower(row: SourceFigures | None) -> bool:
    return row is not None and None not in (row.ttft_s, row.recompute_s) and row.ttft_s >= row.recompute_s  # type: ignore[operator]  # None was ruled out
