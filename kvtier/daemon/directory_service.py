"""A part of the directory as a service: its shards, behind the nodes' own authenticated connections.

Nodes are the truth.  A service that starts again knows nothing; each node's next message is answered with the
wish for a snapshot.  A node that was not heard of for `cluster.lost_after_s` counts as lost until it is.

Nodes that do not reach another service turn to this one with its shards (see `routing.services_of`).  Those
are begun empty, are told of like the service's own, and end when nobody tells of them any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.carriage import Bytes, Passing
from kvtier.config.cluster_schema import ClusterConfig
from kvtier.config.load import Config
from kvtier.config.secrets import TOKEN_MIN_BYTES, read_secret
from kvtier.directory import calls
from kvtier.directory.routing import digest_of, services_of
from kvtier.directory.shard import Shard, ShardSettings
from kvtier.errors import ConfigError, MalformedMessage
from kvtier.messages.cluster import Load
from kvtier.peers.handshake import Identity
from kvtier.peers.server import PeerServer, ServerSettings
from kvtier.peers.tls import TlsFiles, server_side

_LOG = logging.getLogger(__name__)
# Nodes ask now and then at least; a connection that says nothing for so long is of one that is gone.
_IDLE_S = 60.0
_LOOK_S = 0.5
# So that an answer stays within what one frame may hold.
_PAGE_MOST = 2000


@dataclass(slots=True)
class _Heard:
    """What a node said last. at_s: by time.monotonic()."""

    epoch: int
    address: str
    at_s: float
    load: Load | None = None
    here: bool = True


class DirectoryService:
    """The shards that fall to `cluster.directory_listen`: see `shards_at`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._heard: dict[str, _Heard] = {}
        self._shards: dict[int, Shard] = {}
        # Of shards that are here in place of another service: when which node told of them last.
        self._in_place: dict[int, dict[str, float]] = {}
        self._digest = digest_of(config.cluster.directory)
        self._ended = threading.Event()
        self._server: PeerServer | None = None
        self._looking: threading.Thread | None = None

    # --- life -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen, and return. Raises ConfigError."""
        cluster = self._config.cluster
        address = cluster.directory_listen
        if not address:
            raise ConfigError(
                "cluster.directory_listen", "is empty", fix="name an entry of cluster.directory"
            )
        count = cluster.shards
        self._shards = {index: self._made(index) for index in shards_at(cluster.directory, address, count)}
        token = read_secret("cluster.token_file", cluster.token_file, TOKEN_MIN_BYTES)
        own = Identity(directory_name(address), time.time_ns() // 1_000_000, token)
        host, port = split(address)
        files = tls_files(cluster)
        settings = ServerSettings(host, port, idle_s=_IDLE_S, tls=server_side(files) if files else None)
        self._server = PeerServer(own, None, settings, self._answer)
        self._looking = threading.Thread(target=self._look, name="kvtier-directory", daemon=True)
        self._looking.start()

    def stop(self, grace_s: float) -> None:
        """End; again is no error."""
        self._ended.set()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._looking is not None:
            self._looking.join(grace_s)

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it ended within the time."""
        return self._ended.wait(timeout_s)

    def carried(self, call: Passing) -> Bytes | None:
        """See cluster.actors.Called. Any thread."""
        server = self._server if self._config.cluster.fallback == "ray" else None
        return server.tunnels.pass_on(call) if server is not None else None

    def health(self) -> dict[str, Any]:
        """Alive, and what it knows."""
        with self._lock:
            here = sum(heard.here for heard in self._heard.values())
            return {"alive": not self._ended.is_set(), "shards": len(self._shards), "nodes": here}

    # --- calls ------------------------------------------------------------------------------------------

    def _answer(self, body: bytes, peer: str) -> bytes:
        call = calls.unpack_call(body)
        with self._lock:
            if isinstance(call, calls.Tell):
                return calls.pack(self._tell(call, peer))
            if isinstance(call, calls.Find):
                return calls.pack(self._find(call))
            if isinstance(call, calls.GetNodes):
                return calls.pack(self._nodes())
            if isinstance(call, calls.GetAfter):
                return calls.pack(self._after(call))
            return calls.pack(self._one(call))

    def _tell(self, call: calls.Tell, peer: str) -> calls.Told:
        said = call.announcement
        if said.node != peer:
            raise MalformedMessage(f"node '{peer}' speaks for '{said.node}'")
        now_s, shard = time.monotonic(), self._shard(said.shard)
        try:
            answer = shard.apply(said, time.time())
        except ValueError as error:
            raise MalformedMessage(str(error)) from error
        if said.shard not in self._shards:
            _LOG.warning("shard %d is here in place of another service", said.shard)
            self._shards[said.shard] = shard
            self._in_place[said.shard] = {}
        if said.shard in self._in_place:
            self._in_place[said.shard][peer] = now_s
        heard = self._heard.get(peer)
        if (heard is None or heard.epoch != said.epoch) and call.services not in ("", self._digest):
            _LOG.warning("cluster.directory of node '%s' is another list than here", peer)
        if heard is None or said.epoch >= heard.epoch:
            self._heard[peer] = _Heard(said.epoch, call.address, now_s, call.load)
        return answer

    def _find(self, call: calls.Find) -> calls.Found:
        try:
            hits = [self._shard(shard).find(call.tenant, keys) for shard, keys in call.asked]
        except ValueError as error:
            raise MalformedMessage(str(error)) from error
        names = {node for one in hits for node, _ in one.nodes}
        addresses = {node: self._heard[node].address for node in names if node in self._heard}
        return calls.Found(hits, addresses, self._loads(names))

    def _one(self, call: calls.GetConversation) -> calls.Page:
        found = self._shard(call.shard).conversation(call.tenant, call.conversation, call.after)
        if found is None:
            return calls.Page([])
        return calls.Page([found], self._loads({node for b in found.branches for node in b.nodes}))

    def _loads(self, names: Iterable[str]) -> dict[str, Load]:
        heard = {name: self._heard[name].load for name in names if name in self._heard}
        return {name: load for name, load in heard.items() if load is not None}

    def _after(self, call: calls.GetAfter) -> calls.Page:
        at_most = min(call.at_most, _PAGE_MOST)
        found = [
            conversation
            for shard in call.shards
            for conversation in self._shard(shard).conversations_after(call.tenant, call.after, at_most)
        ]
        found.sort(key=lambda conversation: (conversation.tenant, conversation.name))
        return calls.Page(found[:at_most])

    def _nodes(self) -> calls.Nodes:
        return calls.Nodes(
            [calls.Node(node, h.epoch, h.address, h.here, h.load) for node, h in sorted(self._heard.items())]
        )

    def _shard(self, index: int) -> Shard:
        """One that nobody has told of is empty."""
        if not 0 <= index < self._config.cluster.shards:
            raise MalformedMessage(f"there is no shard {index} here: the nodes' settings differ")
        return self._shards.get(index) or self._made(index)

    def _made(self, index: int) -> Shard:
        cluster = self._config.cluster
        return Shard(ShardSettings(index, cluster.shards, cluster.keep_tombstones_s))

    def _look(self) -> None:
        """Give up nodes that were not heard of, and do a piece of the tidying."""
        while not self._ended.wait(_LOOK_S):
            with self._lock:
                late_s = time.monotonic() - self._config.cluster.lost_after_s
                for node, heard in self._heard.items():
                    if heard.here and heard.at_s < late_s:
                        _LOG.warning("node '%s' is not heard of any more", node)
                        heard.here = False
                        for shard in self._shards.values():
                            shard.lost(node, heard.epoch)
                self._end_places(late_s)
                for shard in self._shards.values():
                    shard.tidy(time.time())

    def _end_places(self, late_s: float) -> None:
        """Who tells of a shard elsewhere again is not known here by it; one that nobody tells of ends."""
        for index, told in list(self._in_place.items()):
            for node in [node for node, at_s in told.items() if at_s < late_s]:
                del told[node]
                self._shards[index].lost(node, self._heard[node].epoch)
            if not told:
                _LOG.info("shard %d has its own service again", index)
                del self._in_place[index], self._shards[index]


def shards_at(directory: Sequence[str], address: str, count: int) -> list[int]:
    """The shards of the service at this address, where all services are there."""
    return [index for index in range(count) if services_of(directory, index)[0] == address]


def directory_name(address: str) -> str:
    """What the service at an address is called when two ends find out who they are."""
    return f"directory@{address}"


def tls_files(cluster: ClusterConfig) -> TlsFiles | None:
    """Of TLS between nodes; None where they speak in clear."""
    if not cluster.tls_cert_file:
        return None
    return TlsFiles(cluster.tls_cert_file, cluster.tls_key_file, cluster.tls_ca_file)


def split(address: str) -> tuple[str, int]:
    """host:port, as `config/checks.py` let it pass."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
