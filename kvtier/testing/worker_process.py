"""A serving worker as a process of its own, that a test can order about, stop and kill.

The process reads one JSON object a line, {"do": name, ...}, and answers each with one.  Its copy engine stops
at the gate 'copy' of the folder that it is given.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvtier.breaker import Backoff
from kvtier.client.client import connect
from kvtier.client.handles import ParkHandle, RestoreHandle
from kvtier.client.worker_inputs import WorkerPlan
from kvtier.errors import KvtierError
from kvtier.testing.gates import Gate, gated_engine
from kvtier.testing.kv_memory import KvMemory, ranks_of, tokens_of

# A test's daemon is back in a moment.
FAST = Backoff(first_s=0.01, limit_s=0.1)
_ANSWER_S = 60.0


class ProcessLost(RuntimeError):
    """The process has ended, or does not answer."""


class _Station:
    """Inside the process: carries out what it is told."""

    def __init__(
        self, path: str, gates: str, pages: str, mode: str, call_timeout_s: str, rank: str, count: str
    ) -> None:
        ranks = ranks_of(int(count))
        self.kv = KvMemory(int(pages), shared=mode == "shared", shard=ranks[int(rank)])
        self.client = connect(path, backoff=FAST, required=False)
        gate = Gate(Path(gates) / "copy")
        self.worker = self.client.attach(
            self.kv.model,
            self.kv.pool,
            shard=self.kv.shard,
            ranks=ranks,
            call_timeout_s=float(call_timeout_s),
            make_engine=lambda slots: gated_engine(slots, gate),
        )
        self.handles: list[ParkHandle | RestoreHandle] = []
        self.plan: WorkerPlan | None = None

    def put(self, seed: int, pages: list[int], count: int) -> None:
        self.kv.put(seed, pages, count)

    def poison(self, pages: list[int]) -> None:
        self.kv.poison(pages)

    def look(self, seed: int, pages: list[int], count: int) -> dict[str, int]:
        return {"front": self.kv.front(seed, pages, count), "strange": self.kv.strange(seed, pages, count)}

    def park(self, seed: int, pages: list[int], count: int, **options: Any) -> int:
        handle = self.worker.park(f"chat-{seed}", tokens_of(seed, count), pages, **options)
        self.handles.append(handle)
        return len(self.handles) - 1

    def restore(self, seed: int, pages: list[int], count: int, deadline_s: float) -> dict[str, Any]:
        plan = self.worker.plan(f"chat-{seed}", tokens_of(seed, count))
        self.handles.append(self.worker.restore_async(plan, pages, deadline_s=deadline_s))
        found = {
            "tokens": plan.load_tokens,
            "reason": plan.reason,
            "sources": [r.source for r in plan.ranges],
        }
        return {"handle": len(self.handles) - 1, **found}

    def planned(self, seed: int, count: int) -> dict[str, Any]:
        """Plan, and keep the plan for `go` instead of the one before it."""
        if self.plan is not None:
            self.worker.drop(self.plan)
        return self._keep(self.worker.plan(f"chat-{seed}", tokens_of(seed, count)))

    def join(self, plan_id: str) -> dict[str, Any]:
        """Take part in another rank's plan."""
        return self._keep(self.worker.join(plan_id))

    def _keep(self, plan: WorkerPlan) -> dict[str, Any]:
        self.plan = plan
        return {
            "plan_id": plan.plan_id,
            "tokens": plan.load_tokens,
            "reason": plan.reason,
            "sources": [r.source for r in plan.ranges],
        }

    def go(self, pages: list[int], deadline_s: float) -> int:
        """Carry out what was planned."""
        plan, self.plan = self.plan, None
        assert plan is not None, "nothing is planned"
        self.handles.append(self.worker.restore_async(plan, pages, deadline_s=deadline_s))
        return len(self.handles) - 1

    def released(self, handle: int) -> bool:
        found = self.handles[handle]
        return isinstance(found, ParkHandle) and found.released.is_set()

    def result(self, handle: int, timeout_s: float) -> dict[str, Any]:
        receipt = self.handles[handle].result(timeout_s)
        return {**asdict(receipt), "ok": receipt.ok}

    def attached(self) -> bool:
        return self.worker.attached

    def close(self) -> None:
        self.worker.close()
        self.client.close()


class OrderedProcess:
    """A module as a process that serves orders, see `serve`; ended by `kill` or at the end of a `with`."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._rest = b""
        try:
            self._hear(_ANSWER_S)
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def do(self, order: str, *, answer_s: float = _ANSWER_S, **options: Any) -> Any:
        """Have it do something, and wait for its answer.

        Raises ProcessLost, and RuntimeError for what went wrong there.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": order, **options}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ProcessLost(str(error)) from error
        return self._hear(answer_s)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone; again is no error."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()

    def _hear(self, timeout_s: float) -> Any:
        assert self._process.stdout is not None
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end_s - time.monotonic()))
            more = self._process.stdout.read1(65536) if ready else b""  # type: ignore[attr-defined]
            if not more:
                raise ProcessLost("it ended" if ready else f"no answer within {timeout_s} s")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["is"]


class WorkerProcess(OrderedProcess):
    """Started when made.

    path: of the node's socket.  gates: folder of the gate 'copy'.  mode: 'worker' or 'shared'.  rank: its
    number, and of how many tensor-parallel ranks.
    """

    def __init__(
        self,
        path: str,
        gates: Path,
        *,
        pages: int = 64,
        mode: str = "worker",
        call_timeout_s: float = 5.0,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        arguments = [path, str(gates), str(pages), mode, str(call_timeout_s), *map(str, rank)]
        super().__init__("kvtier.testing.worker_process", *arguments)

    def park(self, seed: int, pages: Sequence[int], count: int, **options: Any) -> int:
        """Put the right content into the pages and park it; answers a handle."""
        self.do("put", seed=seed, pages=list(pages), count=count)
        handle: int = self.do("park", seed=seed, pages=list(pages), count=count, **options)
        return handle

    def restore(
        self, seed: int, pages: Sequence[int], count: int, deadline_s: float = 20.0
    ) -> dict[str, Any]:
        """Poison the pages, plan and begin to restore: 'handle', planned 'tokens', 'reason', 'sources'."""
        self.do("poison", pages=list(pages))
        found: dict[str, Any] = self.do(
            "restore", seed=seed, pages=list(pages), count=count, deadline_s=deadline_s
        )
        return found

    def result(self, handle: int, timeout_s: float = 20.0) -> dict[str, Any]:
        """A receipt, with 'ok'."""
        receipt: dict[str, Any] = self.do("result", handle=handle, timeout_s=timeout_s)
        return receipt

    def look(self, seed: int, pages: Sequence[int], count: int) -> dict[str, int]:
        """See KvMemory.front and .strange."""
        found: dict[str, int] = self.do("look", seed=seed, pages=list(pages), count=count)
        return found


def _answer(station: object, order: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"is": getattr(station, order.pop("do"))(**order)}
    except KvtierError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def serve(station: object) -> int:
    """Have the station's methods carry out what comes, and answer, until standard input ends."""
    print(json.dumps({"is": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(station, json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(_Station(*sys.argv[1:])))
