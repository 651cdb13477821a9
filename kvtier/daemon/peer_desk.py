"""Everything of a node's service that is about other nodes: the core's instructions go out, answers come in.

Nothing here waits in the loop's thread: questions and reads run on threads of their own, each with a
deadline, and their ends are stimuli like all others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from kvtier.carriage import Bytes as Piece
from kvtier.carriage import Carrier, Passing
from kvtier.config.load import Config
from kvtier.config.secrets import TOKEN_MIN_BYTES, read_secret
from kvtier.daemon.directory_service import split, tls_files
from kvtier.daemon.peer_book import PeerBook
from kvtier.daemon.peer_codecs import codings
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.daemon.peer_graves import PeerGraves
from kvtier.daemon.peer_lender import PeerLender
from kvtier.errors import KvtierError
from kvtier.host.sysmem import Bytes
from kvtier.host.tier import HostTier
from kvtier.messages import protocol
from kvtier.messages.calls import Failed, Message
from kvtier.messages.cluster import (
    DIRECTORY,
    PEER,
    PEERS,
    AskHolder,
    AskKeep,
    Branches,
    Buried,
    Bury,
    Erase,
    Erased,
    FindBranches,
    FindConversations,
    FindHolders,
    FindNodes,
    Graves,
    Heard,
    Holders,
    Holdings,
    Kept,
    Known,
    NodesThere,
    Over,
    PeerRead,
    PeerReadDone,
    Stone,
    TheseAre,
    WhatIs,
)
from kvtier.messages.tiers import WireItem
from kvtier.node.core import NodeCore
from kvtier.node.events import Send
from kvtier.objects import ObjectId
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.fetch import Came, Wanted
from kvtier.peers.handshake import Identity
from kvtier.peers.lending import AgentFailed, Lending, Read, agent_name
from kvtier.peers.nixl_agent import NixlAgent, rdma_devices
from kvtier.peers.server import PeerServer, ServerSettings
from kvtier.peers.stream import StreamLost
from kvtier.peers.tls import client_side, server_side
from kvtier.tier import Slot

_LOG = logging.getLogger(__name__)
_READS, _ASKS = 8, 8
# At once: reads for copies, and questions that wait for a copy at another node.
_BEHIND, _KEEPS = 2, 16
# How long the directory may take to say what is to be forgotten before this node serves.
_HEARD_S = 1.0
# What another node may take to erase a conversation, its flush included.
_ERASE_S = 12.0

# How often it is said that the core could not use what others said.
_REFUSED_EVERY_S = 10.0

# Of a name of a host, and of a port.
_LABEL_BYTES, _PORT_DIGITS = 64, 5

# How long the end of this service waits for reads in other nodes' memory that were given up.
_LATE_S = 2.0

Tell = Callable[[str, Message], None]

# The answers to what could not be carried out.
_FAILED: dict[type[Message], Callable[[Any], Message]] = {
    FindBranches: lambda message: Branches(job=message.job),
    FindHolders: lambda message: Holders(job=message.job),
    FindConversations: lambda message: Known(job=message.job),
    FindNodes: lambda message: NodesThere(job=message.job),
    AskHolder: lambda message: TheseAre(job=message.job),
    AskKeep: lambda message: Kept(job=message.job, reason="busy"),
    PeerRead: lambda message: PeerReadDone(
        job=message.job, failed=tuple((index, "peer_lost") for index in range(len(message.slots)))
    ),
    Bury: lambda message: Buried(job=message.job, kept=False),
}


class PeerDesk:
    """Serves other nodes and asks them, from `start` to `close`.

    tell: hands the core a message from a peer of this name, in the loop's thread, soon.  look: has the
    loop's thread look at the core, and returns when it did.  carrier: what reaches nodes that TCP does not.
    """

    def __init__(
        self,
        config: Config,
        epoch: int,
        host: HostTier,
        tell: Tell,
        look: Callable[[Callable[[NodeCore], None]], object],
        carrier: Carrier | None = None,
    ) -> None:
        cluster = config.cluster
        self._config = config
        self._host = host
        self._tell = tell
        self._look = look
        token = read_secret("cluster.token_file", cluster.token_file, TOKEN_MIN_BYTES)
        self._own = Identity(config.node.name, epoch, token)
        self._tls = tls_files(cluster)
        self._call_tls = client_side(self._tls) if self._tls else None
        self._codecs = codings() if cluster.wire_codec == "auto" else {}
        self._carrier = carrier if cluster.fallback == "ray" else None
        self._graves = PeerGraves(config.node.state_dir)
        self._lender = PeerLender(host, tell, lambda erased: self._was_erased(erased.stone))
        self._directory = PeerDirectory(
            cluster,
            self._own,
            self._call_tls,
            snapshot=self._begin_to_say_everything,
            forget=self._forget,
            over=self._are_over,
            heard=lambda: tell(DIRECTORY, Heard()),
            book=PeerBook(config.node.state_dir, cluster.keep_tombstones_s),
            carrier=self._carrier,
        )
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, str], PeerClient] = {}
        self._erasing: set[str] = set()
        # Tombstones that the core has carried out: the directory hears of no others.
        self._proven: dict[str, Stone] = {}
        self._closing = False
        self._refused_s = 0.0
        self._reads = ThreadPoolExecutor(_READS, "kvtier-pull")
        # Nobody's request waits for these.
        self._behind = ThreadPoolExecutor(_BEHIND, "kvtier-pull-behind")
        self._keeps = ThreadPoolExecutor(_KEEPS, "kvtier-keep")
        self._asks = ThreadPoolExecutor(_ASKS, "kvtier-look")
        # Apart: each may wait for a node that hangs for as long as an erasure may take, and no plan for it.
        self._burials = ThreadPoolExecutor(_ASKS, "kvtier-bury")
        self._works = self._make_works()
        self._saying: threading.Thread | None = None
        self._server: PeerServer | None = None
        self._lending: Lending | None = None

    def graves(self) -> Graves:
        """What the core has to know before it learns what the disk holds."""
        return Graves(stones=self._graves.stones(), wait_s=_HEARD_S, past=self._graves.past())

    def start(self) -> None:
        """Listen and begin to announce. Raises ConfigError."""
        host, port = split(self._config.cluster.listen)
        cluster, tls = self._config.cluster, server_side(self._tls) if self._tls else None
        self._lending = self._begin_lending()
        settings = ServerSettings(
            host, port, streams=cluster.streams, tls=tls, codecs=self._codecs, lending=self._lending
        )
        self._server = PeerServer(self._own, self._lender, settings, self._lender.answer)
        self._directory.start()

    def close(self) -> None:
        """End everything: nothing of it touches host memory any more. In the loop's thread, after its end."""
        self._closing = True
        self._lender.close()
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()
        self._directory.cut()
        self._asks.shutdown(cancel_futures=True)
        self._burials.shutdown(cancel_futures=True)
        self._reads.shutdown(cancel_futures=True)
        self._behind.shutdown(cancel_futures=True)
        self._keeps.shutdown(cancel_futures=True)
        self._directory.close()
        if self._saying is not None:
            self._saying.join()
        if self._server is not None:
            self._server.close()
        if self._lending is not None:
            self._lending.close(_LATE_S)
        self._graves.close()

    def _begin_lending(self) -> Lending | None:
        mode = self._config.cluster.rdma
        if mode == "none" or self._tls or (mode == "auto" and not rdma_devices()):
            return None
        try:
            lending = Lending(NixlAgent(agent_name(self._own.node, self._own.epoch)), self._host.memory())
            lending.start()
        except (AgentFailed, RuntimeError) as error:
            _LOG.warning("other nodes' memory is not read, but TCP used: %s", error)
            return None
        return lending

    def carried(self, call: Passing) -> Piece | None:
        """What another node says to this one in calls, and this one to it. Any thread."""
        server = self._server if self._config.cluster.fallback == "ray" else None
        return server.tunnels.pass_on(call) if server is not None else None

    # --- the core's instructions ------------------------------------------------------------------------

    @staticmethod
    def takes(peer: str) -> bool:
        """Whether what the core sends to this peer is for the desk."""
        return peer in (DIRECTORY, PEERS) or peer.startswith(PEER)

    def carry_out(self, send: Send) -> None:
        """In the loop's thread."""
        message = send.message
        if send.peer.startswith(PEER):
            self._lender.answered(send.peer, message)
        elif isinstance(message, Holdings):
            self._directory.say(message)
        elif isinstance(message, Failed):
            self._refused(send.peer, message)
        else:
            pool, work = self._works[type(message)]
            if isinstance(message, PeerRead) and message.behind:
                pool = self._behind
            begun = threading.Lock()
            try:
                pool.submit(self._guarded, work, send, begun)
            except RuntimeError as error:
                # The pool may have it in its queue all the same.
                if begun.acquire(blocking=False):
                    _LOG.warning("%s cannot be carried out now: %s", type(message).__name__, error)
                    self._not_done(send)

    def _refused(self, said_by: str, why: Failed) -> None:
        """The core cannot use what it was told; nobody waits for this answer."""
        if time.monotonic() >= self._refused_s:
            self._refused_s = time.monotonic() + _REFUSED_EVERY_S
            _LOG.warning("what '%s' said is of no use: %s: %.200s", said_by, why.error, why.message)

    def _make_works(self) -> dict[type[Message], tuple[ThreadPoolExecutor, Callable[[Any], None]]]:
        """Who carries out what the core wishes, and how; each tells the core its end."""

        def answers(peer: str, ask: Callable[[Any], Message]) -> Callable[[Any], None]:
            return lambda message: self._tell(peer, ask(message))

        return {
            FindBranches: (self._asks, answers(DIRECTORY, self._directory.branches)),
            FindHolders: (self._asks, answers(DIRECTORY, self._directory.holders)),
            FindConversations: (self._asks, answers(DIRECTORY, self._directory.known)),
            FindNodes: (self._asks, answers(DIRECTORY, self._directory.nodes_there)),
            AskHolder: (self._asks, answers(PEERS, self._ask_holder)),
            AskKeep: (self._keeps, answers(PEERS, self._ask_keep)),
            PeerRead: (self._reads, self._read),
            Bury: (self._burials, answers(DIRECTORY, self._bury)),
            Erased: (self._asks, self._erased),
        }

    def _guarded(self, work: Callable[[Message], None], send: Send, begun: threading.Lock) -> None:
        """A pool swallows what its work raises: it is a fault of ours, and has to be seen, and answered.

        begun: held by who carries it out, or has said that nobody does.
        """
        if not begun.acquire(blocking=False):
            return
        try:
            work(send.message)
        except BaseException:
            _LOG.exception("%s was not carried out", type(send.message).__name__)
            if not isinstance(send.message, PeerRead):
                # What was begun of a read may write into its slots still: they stay its own.
                self._not_done(send)
            raise

    def _not_done(self, send: Send) -> None:
        """The core's instruction is answered as failed."""
        if isinstance(send.message, Erased):
            self._erased(msgspec.structs.replace(send.message, ok=False))
        else:
            self._tell(send.peer, _FAILED[type(send.message)](send.message))

    # --- other nodes ------------------------------------------------------------------------------------

    def _client(self, node: str, epoch: int) -> PeerClient | None:
        """The connections to a node; None when nobody knows where to call. epoch: the least that counts."""
        address = self._directory.address_of(node)
        if not address:
            # It has asked this node before this node ever asked for it.
            self._directory.nodes()
            address = self._directory.address_of(node)
        if not _is_address(address):
            return None
        with self._lock:
            client = self._clients.get((node, address))
            if client is None:
                streams = self._config.cluster.streams
                settings = ClientSettings(
                    streams=streams,
                    tls=self._call_tls,
                    codecs=self._codecs,
                    carrier=self._carrier,
                    lending=self._lending,
                )
                client = PeerClient(self._own, node, split(address), settings)
                self._clients[node, address] = client
            client.least_epoch = max(client.least_epoch, epoch)
            if self._closing:
                client.close()
        return client

    def _ask_holder(self, message: AskHolder) -> TheseAre:
        client = self._client(message.node, message.epoch)
        question = WhatIs(keys=message.keys, shard=message.shard)
        found = self._question(message.node, client, question, self._config.cluster.ask_s)
        answer = found if isinstance(found, TheseAre) else TheseAre()
        return msgspec.structs.replace(answer, job=message.job, way=client.way if client is not None else "")

    def _question(
        self, node: str, client: PeerClient | None, message: Message, timeout_s: float
    ) -> Message | None:
        """A node's answer, or None."""
        if client is None:
            return None
        try:
            return protocol.decode(client.ask(protocol.encode(message), timeout_s)[protocol.LENGTH.size :])
        except (StreamLost, KvtierError) as error:
            _LOG.warning("node '%s' does not answer: %s", node, error)
            return None

    def _ask_keep(self, message: AskKeep) -> Kept:
        """Long: the other node answers when it has read all of it, or has given it up."""
        client = self._client(message.node, message.epoch)
        found = self._question(message.node, client, message.keep, message.keep.timeout_s)
        answer = found if isinstance(found, Kept) else Kept(reason="peer_lost")
        return msgspec.structs.replace(answer, job=message.job)

    def _read(self, message: PeerRead) -> None:
        late: list[Read] = []
        self._tell(PEERS, self._read_by_deadline(message, late))
        if self._lending is not None and late:
            self._lending.when_ended(late, lambda: self._tell(PEERS, PeerReadDone(job=message.job)))

    def _read_by_deadline(self, message: PeerRead, late: list[Read]) -> PeerReadDone:
        began_s = time.monotonic()
        came_over = Came()
        outcomes: Sequence[str] = ["peer_lost"] * len(message.slots)
        wanted: list[Wanted] = []
        client: PeerClient | None = None
        try:
            client = self._client(message.node, message.epoch)
            if client is not None:
                objects = zip(message.object_keys, message.slots, message.item_bytes, strict=True)
                wanted = [
                    Wanted(ObjectId(*key), self._room(item), item.checksum, width)
                    for key, item, width in objects
                ]
                outcomes = client.fetch(wanted, message.timeout_s, came=came_over, late=late)
        except (KvtierError, RuntimeError) as error:
            # Of the latter kind: no thread could be started. Those that were have ended.
            _LOG.warning("node '%s' gives nothing: %s", message.node, error)
        failed = tuple((index, why) for index, why in enumerate(outcomes) if why)
        rooms = {id(read.into) for read in late}
        came = [item for item, why in zip(message.slots, outcomes, strict=True) if not why]
        return PeerReadDone(
            job=message.job,
            failed=failed,
            busy=tuple(index for index, one in enumerate(wanted) if id(one.into) in rooms),
            bytes=sum(item.nbytes for item in came),
            seconds=time.monotonic() - began_s,
            received_bytes=came_over.bytes,
            coded_bytes=came_over.coded_bytes,
            wire_bytes=came_over.wire_bytes,
            relayed_bytes=came_over.relayed_bytes,
            lent_bytes=came_over.lent_bytes,
            node=message.node,
            way=client.way if client is not None else "",
        )

    def _room(self, item: WireItem) -> Bytes:
        slot = Slot(item.slot_id, item.generation, (item.arena, item.offset), item.nbytes)
        return self._host.view(slot)

    # --- forgetting -------------------------------------------------------------------------------------

    def _bury(self, message: Bury) -> Buried:
        """Note it for good, then have every node erase it; those that are away learn it at their return."""
        nodes = self._directory.nodes()
        # Those that are known to be away are told when they are back, and not waited for.
        here = [node for node, is_here in nodes.items() if is_here]
        stone = msgspec.structs.replace(message.stone, nodes=tuple(sorted({*nodes, self._own.node})))
        if not self._graves.add(stone):
            return Buried(job=message.job, kept=False, absent=tuple(sorted(nodes)))
        with ThreadPoolExecutor(_ASKS, "kvtier-erase") as pool:
            answers = list(pool.map(lambda node: self._erase_at(node, stone), here))
        done = tuple(node for node, erased in zip(here, answers, strict=True) if erased)
        return Buried(job=message.job, done=done, absent=tuple(sorted(set(nodes) - set(done))))

    def _erase_at(self, node: str, stone: Stone) -> bool:
        found = self._question(node, self._client(node, 0), Erase(stone=stone), _ERASE_S)
        return isinstance(found, Erased) and found.ok

    def _forget(self, stone: Stone) -> None:
        """The directory says that this node has to; it says so until it did."""
        with self._lock:
            if stone.id in self._erasing:
                return
            self._erasing.add(stone.id)
        self._tell(DIRECTORY, Erase(stone=stone))

    def _erased(self, message: Erased) -> None:
        with self._lock:
            self._erasing.discard(message.stone.id)
        if message.ok:
            self._was_erased(message.stone)

    def _was_erased(self, stone: Stone) -> None:
        # Whoever forgot may have started just now, and know of fewer nodes than this one.
        nodes = {*stone.nodes, *self._directory.named()}
        if self._graves.add(msgspec.structs.replace(stone, nodes=tuple(sorted(nodes)))):
            with self._lock:
                self._proven[stone.id] = self._graves.of(stone)
            self._directory.say_buried(self._graves.of(stone))

    def _are_over(self, ids: Sequence[str]) -> None:
        self._graves.over(ids)
        with self._lock:
            for stone_id in ids:
                self._proven.pop(stone_id, None)
        self._tell(DIRECTORY, Over(ids=tuple(ids)))

    # --- the directory ----------------------------------------------------------------------------------

    def _begin_to_say_everything(self) -> None:
        """On a thread of its own: who announces has other shards to tell that this node is there.

        Raises RuntimeError where none can be started.
        """
        thread = threading.Thread(target=self._say_everything, name="kvtier-everything", daemon=True)
        thread.start()
        self._saying = thread

    def _say_everything(self) -> None:
        """In steps of the loop's thread, which has others to serve between them."""
        parts: Iterator[Holdings] | None = None

        def step(core: NodeCore) -> None:
            nonlocal parts
            if ended.is_set():
                # The loop stood still, and was asked for this step once more.
                return
            if parts is None:
                parts = core.cluster.announcing.everything()
                self._directory.begin_everything()
            part = next(parts, None)
            if part is not None:
                self._directory.say_part(part)
                return
            with self._lock:
                stones = list(self._proven.values())
            self._directory.end_everything(stones)
            ended.set()

        ended = threading.Event()
        while not (ended.is_set() or self._closing):
            self._look(step)


def _is_address(said: str) -> bool:
    """Whether what another node says of itself is a host:port that can be called."""
    host, _, port = said.rpartition(":")
    labels = host.removesuffix(".").split(".")
    named = host.isascii() and host.isprintable() and all(0 < len(label) < _LABEL_BYTES for label in labels)
    return named and port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS and int(port) < 1 << 16
