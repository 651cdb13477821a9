"""Where a node's sockets and state live unless the configuration says otherwise. Standard library only."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

NODE_SOCKET = "node.sock"
GPU_SOCKET = "gpu.sock"


def default_runtime_dir() -> Path:
    """Folder of the node's sockets: /run/kvtier for root, else the user's runtime folder.

    Without a session (XDG_RUNTIME_DIR unset and no /run/user/<uid>) it is a folder with the uid in its
    name under the temporary folder. The daemon makes it with mode 0700 and checks who owns it.
    """
    uid = os.getuid()
    if uid == 0:
        return Path("/run/kvtier")
    for candidate in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        if candidate and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate) / "kvtier"
    return Path(tempfile.gettempdir()) / f"kvtier-{uid}"


def default_state_dir() -> Path:
    """Folder of what survives a restart: /var/lib/kvtier for root, else $XDG_STATE_HOME/kvtier."""
    if os.getuid() == 0:
        return Path("/var/lib/kvtier")
    base = os.environ.get("XDG_STATE_HOME", "")
    root = Path(base) if base.startswith("/") else Path(os.path.expanduser("~")) / ".local" / "state"
    return root / "kvtier"


def node_socket(runtime_dir: str | Path) -> Path:
    """The node's socket: what clients and workers connect to."""
    return Path(runtime_dir) / NODE_SOCKET


def gpu_socket(runtime_dir: str | Path) -> Path:
    """The GPU service's socket: workers open their copy channel there."""
    return Path(runtime_dir) / GPU_SOCKET
