"""`kvtier demo`, from the first folder to the verdict."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvtier.cli.demo.comparison import Compared, difference
from kvtier.cli.demo.control import DaemonControl, InProcessDaemon, RayDaemon, daemon_settings
from kvtier.cli.demo.process import Record, run_child
from kvtier.cli.demo.report import Findings, Report, make_report, make_summary, make_table
from kvtier.cli.demo.scenario import (
    KILL_BEFORE_ROUND,
    MakeJob,
    Recomputed,
    ReferenceJob,
    ReferenceRecord,
    RoundEnd,
    RoundJob,
    Transcripts,
    TurnJob,
    TurnRecord,
    Usage,
    order_of,
    rounds_of,
)
from kvtier.cli.demo.texts import TOKENIZER_FILE, Conversation, Tokenizer, load_conversations
from kvtier.errors import ConfigError

DaemonKind = Literal["ray", "embedded"]

# The other core is the daemon's: two threads that share it with copies wait for each other.
THREADS = 1
NEEDED_BYTES = 3 << 30
DEFAULT_SEED = 20


def main(
    *,
    as_json: bool = False,
    keep: bool = False,
    directory: str | Path | None = None,
    seed: int = DEFAULT_SEED,
    conversations: int | None = None,
    daemon: DaemonKind = "ray",
    device: str = "auto",
) -> int:
    """Run the demo; 0 when every bit was as promised, else 1.

    as_json: end with one JSON object on stdout, and tell the rest on stderr.  directory: where to work,
    which then must not exist or be empty; by default a temporary folder.  keep: leave it.  conversations:
    how many of the shipped ones, the first ones; by default all.  daemon: 'ray' starts what `kvtier up`
    starts; 'embedded' runs the daemon inside the serving processes.  device: what runs the model: 'cpu',
    'cuda:0', or 'auto' for a GPU where torch finds one.  Raises KvtierError.
    """
    shipped = load_conversations()
    count = len(shipped) if conversations is None else conversations
    if not 1 <= count <= len(shipped):
        raise ConfigError("conversations", f"{count} is not between 1 and {len(shipped)}")
    check_device(device)
    console = Console(stderr=as_json)
    with work_folder(directory, keep=keep, console=console) as work, runtime_folder() as runtime:
        settings = daemon_settings(work, runtime)
        control: DaemonControl = RayDaemon(settings) if daemon == "ray" else InProcessDaemon()
        report = Demo(work, settings, control, console, shipped[:count], device).run(seed)
    console.print(make_table(report))
    for line in make_summary(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(msgspec.json.encode(report.as_dict()).decode())
    return 0 if report.bit_identical and not report.problems else 1


def check_device(asked: str) -> None:
    """Raises ConfigError for a device that the model cannot run on, before anything is started."""
    if asked in ("auto", "cpu"):
        return
    # Only here: loading torch takes seconds, and this process needs it for nothing else.
    from kvtier.cli.demo.model import device_of

    device_of(asked)


@contextmanager
def work_folder(directory: str | Path | None, *, keep: bool, console: Console) -> Iterator[Path]:
    """A folder on a real drive for model, store and logits; gone afterwards unless kept.

    Raises ConfigError when it is in use or its drive is too full.
    """
    mine = directory is None or not Path(directory).exists()
    if directory is None:
        # /tmp is often memory, and the disk tier should meet a disk.
        base = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None
        work = Path(tempfile.mkdtemp(prefix="kvtier-demo-", dir=base))
    else:
        work = Path(directory).absolute()
        if work.exists() and any(work.iterdir()):
            raise ConfigError("directory", f"{work} is not empty", fix="name a new folder")
        work.mkdir(parents=True, exist_ok=True)
    try:
        free = shutil.disk_usage(work).free
        if free < NEEDED_BYTES:
            raise ConfigError(
                "directory",
                f"{work} has {free >> 20} MiB free, {NEEDED_BYTES >> 20} are needed",
                fix="name another folder with --directory",
            )
        (work / "logits" / "served").mkdir(parents=True)
        (work / "logits" / "reference").mkdir()
        yield work
    finally:
        if keep:
            console.print(f"Kept {work}", highlight=False)
        else:
            for made in [work] if mine else list(work.iterdir()):
                if made.is_dir():
                    shutil.rmtree(made, ignore_errors=True)
                else:
                    made.unlink(missing_ok=True)


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """A folder for sockets: a short path, since theirs may have 107 bytes only."""
    runtime = Path(tempfile.mkdtemp(prefix="kvtd-"))
    try:
        yield runtime
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


@dataclass(slots=True)
class Demo:
    """One run. Everything is told through the console; files are in `work`."""

    work: Path
    settings: dict[str, str | int]
    control: DaemonControl
    console: Console
    conversations: tuple[Conversation, ...]
    device: str
    jobs: list[TurnJob] = field(default_factory=list)
    records: list[TurnRecord] = field(default_factory=list)
    references: list[ReferenceRecord] = field(default_factory=list)
    recomputed: list[Recomputed] = field(default_factory=list)
    tiers: dict[str, Usage] = field(default_factory=dict)
    place: str = ""
    kills: int = 0

    def run(self, seed: int) -> Report:
        """Make the model, serve all rounds, run the references, compare."""
        began_s = time.monotonic()
        with self._progress() as progress:
            task = progress.add_task("making a model", total=None)
            run_child(MakeJob(str(self.work / "model"), seed), self.work, "make", self._hear)
            progress.update(task, total=1, completed=1)
            try:
                self._serve(progress)
            finally:
                self.control.stop()
            self._refer(progress)
        verdicts = [self._compare(record) for record in self.records]
        seconds = time.monotonic() - began_s
        return make_report(
            Findings(
                self.jobs,
                self.records,
                self.recomputed,
                verdicts,
                self.tiers,
                self.kills,
                seconds,
                self.place,
            )
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )

    def _serve(self, progress: Progress) -> None:
        tokenizer = Tokenizer(self.work / "model" / TOKENIZER_FILE)
        transcripts = Transcripts(self.conversations)
        self._start_daemon(progress, "starting the daemon")
        for number in range(rounds_of(self.conversations)):
            if number == KILL_BEFORE_ROUND:
                self.control.kill()
                self.kills += 1
                self._start_daemon(progress, "kill -9 of the daemon, starting it again")
            jobs = [
                _job(conversation, number, transcripts, tokenizer)
                for conversation in order_of(self.conversations, number)
            ]
            for job, record in zip(jobs, self._serve_round(progress, number, jobs), strict=True):
                transcripts.heard(job, record.reply)

    def _start_daemon(self, progress: Progress, label: str) -> None:
        task = progress.add_task(label, total=None)
        self.control.start()
        progress.update(task, total=1, completed=1)

    def _serve_round(self, progress: Progress, number: int, jobs: list[TurnJob]) -> list[TurnRecord]:
        task = progress.add_task(f"turn {number + 1}, in a new process", total=len(jobs))
        job = RoundJob(
            model=str(self.work / "model"),
            threads=THREADS,
            device=self.device,
            socket=self.control.socket,
            settings=self.settings,
            turns=jobs,
            logits=str(self.work / "logits" / "served"),
            kill_self=not self.control.socket and number + 1 == KILL_BEFORE_ROUND,
        )

        def hear(record: Record) -> None:
            self._hear(record)
            if isinstance(record, TurnRecord):
                progress.advance(task)

        self.jobs += jobs
        said = run_child(job, self.work, f"round-{number}", hear)
        return [record for record in said if isinstance(record, TurnRecord)]

    def _refer(self, progress: Progress) -> None:
        """The processes of the references never meet the daemon."""
        again = sum(1 for job in self.jobs if job.before)
        task = progress.add_task("references, without kvtier", total=len(self.jobs) + again)
        job = ReferenceJob(
            model=str(self.work / "model"),
            threads=THREADS,
            device=self.device,
            turns=self.jobs,
            records=self.records,
            logits=str(self.work / "logits" / "reference"),
        )

        def hear(record: Record) -> None:
            self._hear(record)
            progress.advance(task)

        run_child(job, self.work, "reference", hear)

    def _hear(self, record: Record) -> None:
        match record:
            case TurnRecord():
                self.records.append(record)
            case ReferenceRecord():
                self.references.append(record)
            case Recomputed():
                self.recomputed.append(record)
            case RoundEnd():
                self.tiers, self.place = record.tiers, record.place

    def _compare(self, record: TurnRecord) -> Compared:
        """A served turn with its reference; one that is missing is a difference."""
        place = (record.conversation, record.round)
        found = next((r for r in self.references if (r.conversation, r.round) == place), None)
        if found is None or found.error:
            return Compared(*place, found.error if found is not None else "it has no reference")
        name = f"{record.round}-{record.conversation}.npy"
        served = np.load(self.work / "logits" / "served" / name)
        expected = np.load(self.work / "logits" / "reference" / name)
        return Compared(*place, difference(record.reply, served, found.reply, expected))


def _job(conversation: Conversation, number: int, transcripts: Transcripts, tokenizer: Tokenizer) -> TurnJob:
    text = conversation.messages[number]
    message = tokenizer.next_message(text) if number else tokenizer.first_message(text)
    before = transcripts.tokens.get(conversation.name, [])
    return TurnJob(conversation.name, number, conversation.share, before, message)
