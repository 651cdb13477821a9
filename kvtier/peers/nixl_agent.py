"""NIXL as an Agent: its UCX backend, over RDMA where the machine has it.

Of the package only the compiled bindings are loaded, by their file: importing it would set up logging for the
whole process, and may import torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

from kvtier.peers.lending import AgentFailed, Bytes

_PACKAGES = ("nixl_cu13", "nixl_cu12")
_DEVICES = Path("/sys/class/infiniband")
# The library's own thread looks at least so often whether something came; 0 would keep a processor busy.
_PROGRESS_US = 100_000
T = TypeVar("T")


def rdma_devices() -> bool:
    """Whether this machine has any."""
    return _DEVICES.is_dir() and any(_DEVICES.iterdir())


class NixlAgent:
    """An Agent; one in a process. Raises AgentFailed where it is not installed, or cannot start.

    name: see `lending.agent_name`.
    """

    name = "nixl"

    def __init__(self, name: str) -> None:
        self._api = api = _bindings()
        settings = api.nixlAgentConfig()
        settings.useProgThread, settings.useListenThread = True, False
        settings.pthrDelay = _PROGRESS_US
        settings.syncMode = api.NIXL_THREAD_SYNC_STRICT
        self._failures: tuple[type[Exception], ...] = tuple(
            kind
            for known, kind in vars(api).items()
            if known.startswith("nixl") and isinstance(kind, type) and issubclass(kind, Exception)
        )
        self._agent = self._try(lambda: api.nixlAgent(name, settings))
        self._backend = self._try(lambda: self._agent.createBackend("UCX", {}))

    def register(self, memory: Bytes) -> None:
        """See Agent."""
        api = self._api
        place = api.nixlRegDList(api.DRAM_SEG, [(memory.ctypes.data, memory.nbytes, 0, "")])
        self._try(lambda: self._agent.registerMem(place, [self._backend]))

    def metadata(self) -> bytes:
        """See Agent."""
        return bytes(self._try(lambda: self._agent.getLocalMD()))

    def load(self, metadata: bytes) -> str:
        """See Agent."""
        said: bytes = self._try(lambda: self._agent.loadRemoteMD(metadata))
        return said.decode("utf-8", "replace")

    def forget(self, remote: str) -> None:
        """See Agent."""
        self._try(lambda: self._agent.invalidateRemoteMD(remote))

    def begin(self, remote: str, address: int, into: Bytes) -> object:
        """See Agent."""
        api = self._api
        here = api.nixlXferDList(api.DRAM_SEG, [(into.ctypes.data, into.nbytes, 0)])
        there = api.nixlXferDList(api.DRAM_SEG, [(address, into.nbytes, 0)])
        read = self._try(
            lambda: self._agent.createXferReq(api.NIXL_READ, here, there, remote, "", [self._backend])
        )
        # What it became, also where this fails, is looked up in its state.
        with contextlib.suppress(*self._failures):
            self._agent.postXferReq(read, "")
        return read

    def ended(self, read: object) -> bool | None:
        """See Agent."""
        try:
            state = self._agent.getXferStatus(read)
        except self._api.nixlNotPostedError:
            return False
        except self._failures:
            # UCX had not ended all that belonged to such a read when NIXL said this: seen with 1.5.1.
            return None
        return True if state == self._api.NIXL_SUCCESS else None

    def lost(self, read: object) -> bool:
        """See Agent."""
        try:
            self._agent.getXferStatus(read)
        except self._failures:
            return True
        return False

    def release(self, read: object) -> None:
        """See Agent."""
        self._try(lambda: self._agent.releaseXferReq(read))

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except self._failures as error:
            raise AgentFailed(f"NIXL: {error}") from error


def _bindings() -> Any:
    for name in _PACKAGES:
        package = importlib.util.find_spec(name)
        folders = list(package.submodule_search_locations or ()) if package is not None else []
        spec = PathFinder.find_spec("_bindings", folders) if folders else None
        if spec is None or spec.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise AgentFailed(f"{name} cannot be loaded: {error}") from error
        return module
    raise AgentFailed("NIXL is not installed: pip install --no-deps nixl-cu13, or nixl-cu12")
