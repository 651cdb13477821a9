"""The tier services as Ray actors: thin shells that start, watch and end one service each.

A shell lives and dies with its service: `serve()` answers when the service has ended, and the process goes
a moment later.  That answer, or Ray's notice that the actor died, is how the controller hears of it at once.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, ClassVar, Protocol, runtime_checkable

from kvtier.carriage import MOST_CONNECTIONS, Bytes, Carrier, Passing
from kvtier.cluster.members import read_config
from kvtier.cluster.reconciler import TierRole
from kvtier.cluster.services import load_service
from kvtier.daemon.collector import set_survivors_aside

# One copy engine's threads are set by its own settings; libraries that open a pool of threads per core
# would take the cores from the serving engine.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_WATCH_S = 60.0
# Long enough for the answer of serve() to leave the process, short against the second of a restart.
_LINGER_S = 0.1
# serve() holds a thread for good; a controller that was restarted calls it again; the rest is for the others.
_CONCURRENCY = 6


def concurrency(config_text: bytes) -> int:
    """Calls at once of an actor with this configuration: one more for each connection that it may carry."""
    cluster = read_config(config_text).cluster
    return _CONCURRENCY + (MOST_CONNECTIONS if cluster.fallback == "ray" else 0)


class Service(Protocol):
    """What a tier service offers; its constructor takes the Config."""

    def start(self) -> None:
        """Return once it runs on threads of its own. Raises KvtierError."""

    def stop(self, grace_s: float) -> None:
        """End it within this time; again is no error."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, at the latest after this time."""

    def health(self) -> dict[str, Any]:
        """Small and msgpackable; after an end that nobody asked for, `failure` says why."""


@runtime_checkable
class Drains(Protocol):
    """A service that can make its node ready to go; the host's."""

    def drain(self, within_s: float) -> dict[str, Any]:
        """Take no park from now on, and write what only memory holds, the most worth first, within this time.

        Returns at once; again answers how far it is: {'dirty_bytes': what only memory holds now,
        'flushed_bytes': written since the first call, 'moved_bytes': read by other nodes, 'done': it will
        write and give no more}.
        """


@runtime_checkable
class Called(Protocol):
    """A service that other nodes may reach in calls of its actor: the host's, the directory's."""

    def carried(self, call: Passing) -> Bytes | None:
        """See kvtier.carriage.Carrier."""


@runtime_checkable
class Calls(Protocol):
    """A service that reaches others so: the host's."""

    def carry_by(self, carrier: Carrier) -> None:
        """Use it where TCP does not lead; before the start."""


class TierActor:
    """One service. All methods may run at once on different threads; the constructor on the main thread."""

    role: ClassVar[TierRole]

    def __init__(self, service: str, config_text: bytes, epoch: int, grace_s: float) -> None:
        """service: 'module:Class'.  config_text: the Config as JSON.  grace_s: for a SIGTERM."""
        for name in _ONE_THREAD:
            os.environ[name] = "1"
        set_survivors_aside()
        self._path = service
        self._config_text = config_text
        self._epoch = epoch
        self._grace_s = grace_s
        self._service: Service | None = None
        self._changed = threading.Condition()
        self._turn = 0
        self._state = "starting"
        self._failure = ""
        self._on_sigterm()

    def serve(self) -> str:
        """Run the service; answers 'ended' and why after its end, 'superseded' once it is called again.

        The service starts with the first call. Raises what its start raises.
        """
        with self._changed:
            self._turn += 1
            turn = self._turn
            self._changed.notify_all()
        if turn == 1:
            self._start()
        with self._changed:
            self._changed.wait_for(lambda: self._state == "ended" or self._turn != turn)
            return f"ended {self._failure}".rstrip() if self._state == "ended" else "superseded"

    def health(self) -> dict[str, Any]:
        """Answers while serve() blocks. state: 'starting', 'ready' or 'ended'."""
        service = self._service
        ready = self._state == "ready" and service is not None
        return {
            "role": self.role,
            "epoch": self._epoch,
            "pid": os.getpid(),
            "state": self._state,
            "service": service.health() if ready and service is not None else {},
        }

    def drain(self, within_s: float) -> dict[str, Any] | None:
        """See `Drains`; None from a service that cannot."""
        service = self._service
        return service.drain(within_s) if isinstance(service, Drains) else None

    def carried(self, call: Passing) -> Bytes | None:
        """See `Called`; None, as if it had ended, from a service that cannot, or not yet."""
        service = self._service
        return service.carried(call) if isinstance(service, Called) else None

    def stop(self, grace_s: float) -> None:
        """End the service, and with it this actor."""
        service = self._service
        if service is None:
            self._end()
        else:
            service.stop(grace_s)

    def _start(self) -> None:
        try:
            service = load_service(self._path)(read_config(self._config_text))
            if isinstance(service, Calls):
                service.carry_by(self._carrier())
            service.start()
        except BaseException:
            self._end()
            raise
        self._service = service
        with self._changed:
            if self._state == "starting":
                self._state = "ready"
                self._changed.notify_all()
        threading.Thread(target=self._watch, args=(service,), name="kvtier-watch", daemon=True).start()

    def _carrier(self) -> Carrier:
        # Only here: this file is read where there is no Ray.
        from kvtier.cluster.grip import carrier

        return carrier()

    def _watch(self, service: Service) -> None:
        while not service.wait(_WATCH_S):
            pass
        self._failure = str(service.health().get("failure", ""))
        self._end()

    def _end(self) -> None:
        with self._changed:
            self._state = "ended"
            self._changed.notify_all()
        # Nobody but the controller would end the process, and it may be away.
        self._leave(_LINGER_S, 0)

    def _leave(self, after_s: float, status: int) -> None:
        timer = threading.Timer(after_s, os._exit, (status,))
        timer.daemon = True
        timer.start()

    def _on_sigterm(self) -> None:
        """Ray's own handler waits for serve(), which does not end by itself, so ours takes its place.

        The main thread is inside Ray and may never run a Python handler; the wakeup descriptor is written
        by the signal itself, whatever thread gets it.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(
            target=self._wait_sigterm, args=(reader,), name="kvtier-signals", daemon=True
        ).start()

    def _wait_sigterm(self, reader: int) -> None:
        while signal.SIGTERM not in os.read(reader, 64):
            pass
        self._leave(self._grace_s + 1.0, 1)
        self.stop(self._grace_s)


class HostActor(TierActor):
    """Holds the arena and the node's socket."""

    role = "host"


class DiskActor(TierActor):
    """Holds the store on disk."""

    role = "disk"


class GpuActor(TierActor):
    """Holds the schedule of copies."""

    role = "gpu"


class DirectoryActor(TierActor):
    """Holds shards of the directory, on nodes whose settings say so."""

    role = "directory"


ACTORS: dict[TierRole, type[TierActor]] = {
    "host": HostActor,
    "directory": DirectoryActor,
    "disk": DiskActor,
    "gpu": GpuActor,
}
