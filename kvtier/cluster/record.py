"""What `up` started, written down so that `down` ends that and nothing else.

One JSON file in the state folder, mode 0600, replaced atomically and flushed.  It is written before
anything is started, and again as more becomes known, so that a crash at any instant leaves a record that
names all there is to end.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvtier.cluster.procs import Process, alive, boot_id, session_members
from kvtier.errors import KvtierError

RECORD = "up.json"
TOKEN = "ray-token"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """kind 'private': we started the head of a cluster; 'joined': one more node of such a cluster; both with
    Ray's processes here, which we end.  'guest': only our actors are ours.

    leader: the process that opened the session which holds all that runs here of a private cluster.
    processes: by name, those known by pid.  ready: `up` came to its end.  owner: a foreground `up`, else
    None.  config_text: the settings, as JSON.
    """

    kind: str
    boot: str
    state_dir: str
    runtime_dir: str
    temp_dir: str = ""
    made_temp_dir: bool = False
    address: str = ""
    node_id: str = ""
    session_dir: str = ""
    leader: Process | None = None
    owner: Process | None = None
    processes: tuple[tuple[str, Process], ...] = ()
    config_text: str = ""
    namespace: str = ""
    controller: str = ""
    ready: bool = False

    @property
    def vital(self) -> tuple[str, ...]:
        """Ray's own processes here, as Ray names them: without one of them the daemon is half."""
        return {"private": ("gcs_server", "raylet"), "joined": ("raylet",)}.get(self.kind, ())

    @property
    def marker(self) -> str:
        """Stands in the environment of each process of the private cluster, and of no other's."""
        return f"{TOKEN_VARIABLE}={self.token_path}"

    @property
    def token_path(self) -> str:
        """The file with the token of the private cluster."""
        return str(Path(self.state_dir) / TOKEN)

    def here(self) -> bool:
        """Whether it speaks of this boot; of another one all has ended."""
        return self.boot == boot_id()

    def running(self) -> list[Process]:
        """Processes of it that live now, of this machine."""
        if not self.here():
            return []
        found = {process for _, process in self.processes if alive(process)}
        if self.leader is not None:
            found.update(session_members(self.leader, self.marker))
        return sorted(found)


def save(record: Record) -> None:
    """Write it durably."""
    path = Path(record.state_dir) / RECORD
    write_private(path, json.dumps({"format": _FORMAT} | asdict(record), indent=1).encode())


def load(state_dir: str | Path) -> Record | None:
    """The record in this folder, or None. Raises KvtierError where it cannot be understood."""
    path = Path(state_dir) / RECORD
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        if fields.pop("format") != _FORMAT:
            raise KvtierError(
                f"{path} is of another kvtier release", fix="run `down` with that release, or remove the file"
            )
        fields["processes"] = tuple((name, Process(**process)) for name, process in fields["processes"])
        for name in ("leader", "owner"):
            fields[name] = Process(**fields[name]) if fields[name] else None
        return Record(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KvtierError(
            f"{path} is not a record of `up`: {error}",
            fix="look for processes named ray:: by hand, end them, and remove the file",
        ) from error


def with_process(record: Record, name: str, process: Process) -> Record:
    """The record with one more process; a name that was there before now means this one."""
    others = tuple(entry for entry in record.processes if entry[0] != name)
    return replace(record, processes=(*others, (name, process)))


def remove(record: Record) -> None:
    """Forget it, with the files of the private cluster. All its processes must have ended."""
    _remove_ray_files(record)
    Path(record.token_path).unlink(missing_ok=True)
    (Path(record.state_dir) / RECORD).unlink(missing_ok=True)
    sync_dir(Path(record.state_dir))


def write_private(path: Path, data: bytes) -> None:
    """Replace a file's content with mode 0600, durably and at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(handle)
    os.replace(beside, path)
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make names in this folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_ray_files(record: Record) -> None:
    temp_dir = Path(record.temp_dir)
    if not record.temp_dir or temp_dir.is_symlink():
        return
    if record.made_temp_dir:
        shutil.rmtree(temp_dir, ignore_errors=True)
        return
    # The folder was there before: only what this cluster put into it goes.
    if record.session_dir:
        session = Path(record.session_dir)
        shutil.rmtree(session, ignore_errors=True)
        latest = session.parent / "session_latest"
        if latest.is_symlink() and os.path.basename(os.readlink(latest)) == session.name:
            latest.unlink(missing_ok=True)
