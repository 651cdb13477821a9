"""What decode-like work in one process loses while another process on the same GPU copies flat out.

Without MPS, and with it where its control daemon is installed and starts: one of our own, in a folder of its
own, ended again.  In a dry run there are no processes, and nothing is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.gpu.decode import MODES, Decode
from benchmarks.gpu.rig import Bench, conversations, pool_over, start
from kvtier.bench.lines import Line

READY_S = 90.0
MPS = "nvidia-cuda-mps-control"


def decoding(line: Connection) -> None:
    """The serving process: measures steps a second whenever it is asked to, until the line closes."""
    bench = Bench(False)
    decode = Decode(bench)
    step = decode.capture()
    decode.steps_per_s(step, 0.5)
    line.send("ready")
    with suppress(EOFError):
        while True:
            line.send(decode.steps_per_s(step, line.recv()))


def copying(line: Connection) -> None:
    """The neighbour: copies in the directions that it is told, one conversation each, until told others."""
    bench = Bench(False)
    sizes, nbytes = bench.sizes, bench.sizes.conversation_bytes
    blocks = 2 * (sizes.tokens // sizes.block_tokens)
    with (
        bench.arena(2 * nbytes, blocks) as arena,
        bench.memory(2 * nbytes) as memory,
        bench.engine(arena, 2 * nbytes) as engine,
    ):
        pair = conversations(pool_over(memory, sizes, False), sizes)
        line.send("ready")
        with suppress(EOFError):
            directions: tuple[Any, ...] = ()
            while True:
                if not directions or line.poll():
                    directions = line.recv()
                    line.send("changed")
                jobs = [start(engine, d, pair[n], sizes) for n, d in enumerate(directions)]
                for job in jobs:
                    job.wait()


class Neighbour:
    """A process on the GPU, with a line to it."""

    def __init__(self, work: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.line, theirs = spawn.Pipe()
        self.process: BaseProcess = spawn.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.hear()

    def hear(self) -> Any:
        """What it says next. Raises TimeoutError, EOFError."""
        if not self.line.poll(READY_S):
            raise TimeoutError("a process beside this one does not answer")
        return self.line.recv()

    def ask(self, what: Any) -> Any:
        """Say something, and wait for the answer."""
        self.line.send(what)
        return self.hear()

    def close(self) -> None:
        """End it."""
        self.line.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def neighbours(bench: Bench) -> list[Line]:
    """Both processes, by mode of copying, without and with MPS."""
    if bench.dry:
        return [Line("decode-like work beside a copying process, dry", 0.0, "%")]
    lines = _measure(bench, "without MPS")
    try:
        with _mps():
            lines += _measure(bench, "with MPS")
    except (OSError, subprocess.SubprocessError, EOFError, TimeoutError) as error:
        lines.append(Line("MPS was measured", 0.0, "bool", detail={"why_not": repr(error)[:200]}))
    return lines


def _measure(bench: Bench, kind: str) -> list[Line]:
    made: list[Neighbour] = []
    try:
        made += [Neighbour(decoding)]
        made += [Neighbour(copying)]
        decoder, copier = made
        lines = []
        for name, directions in MODES.items():
            losses = []
            for _ in range(2):
                copier.ask(())
                free = decoder.ask(bench.sizes.seconds / 2)
                copier.ask(directions)
                losses.append((1 - decoder.ask(bench.sizes.seconds / 2) / free) * 100)
            copier.ask(())
            lost = round(statistics.median(losses), 2)
            lines.append(
                Line(f"decode-like work loses while another process's {name} runs, {kind}", lost, "%", 5.0)
            )
        return lines
    finally:
        for each in made:
            each.close()


@contextmanager
def _mps() -> Iterator[None]:
    """A control daemon that processes started meanwhile use. Raises OSError where there is none."""
    tool = shutil.which(MPS)
    if tool is None:
        raise FileNotFoundError(f"{MPS} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        mine = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        before = {name: os.environ.get(name) for name in mine}
        for path in mine.values():
            os.mkdir(path)
        os.environ.update(mine)
        try:
            subprocess.run([tool, "-d"], check=True, timeout=20, capture_output=True)
            yield
        finally:
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run([tool], input=b"quit\n", timeout=20, capture_output=True, check=False)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
