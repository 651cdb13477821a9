"""A node's side of the directory: announces what it holds, and asks who holds what.

One thread for each directory service sends it the streams of its shards; the announcer itself, which is pure,
belongs to the lock here.  A service that does not answer is not asked for a second, so that it costs a plan
its wait once and not each time.  One that takes no announcements for `cluster.lost_after_s` is lost: until it
answers again its shards are those of the next services in the list, which are told everything.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvtier.carriage import Carrier
from kvtier.config.cluster_schema import ClusterConfig
from kvtier.daemon.directory_service import directory_name, split
from kvtier.daemon.peer_book import PeerBook
from kvtier.directory import calls, saying
from kvtier.directory.announcements import Answer
from kvtier.directory.announcer import Announcer, Sender
from kvtier.directory.lookups import Hits, Question, questions
from kvtier.directory.merge import Conversation
from kvtier.directory.routing import digest_of, services_of, shard_of_conversation
from kvtier.errors import KvtierError
from kvtier.messages.cluster import (
    Branches,
    FindBranches,
    FindConversations,
    FindHolders,
    FindNodes,
    Holders,
    Holdings,
    Known,
    Load,
    NodesThere,
    NodeThere,
    Stone,
)
from kvtier.peers.client import ClientSettings, PeerClient
from kvtier.peers.handshake import Identity
from kvtier.peers.stream import StreamLost

_LOG = logging.getLogger(__name__)
# A message of a snapshot may have to wait for others' snapshots at a service that has just started.
_TELL_S = 10.0
_PAUSE_S = 1.0
_GATHER_S = 0.02
_MOST_SILENT_S = 2.0
# How often it is asked who else there is.
_WHO_S = 10.0


@dataclass(slots=True)
class _Service:
    """One directory service. Times by time.monotonic().

    down_until_s: when it may be asked again.  heard_s: when it answered last.  lost: see the module's text.
    """

    address: str
    client: PeerClient
    heard_s: float
    wake: threading.Event = field(default_factory=threading.Event)
    down_until_s: float = 0.0
    lost: bool = False
    thread: threading.Thread | None = None


class PeerDirectory:
    """See the module's text. Methods may be called from any thread, `say*` from the core's alone.

    snapshot: begins to have the core's thread say everything, in parts; RuntimeError: not now.  forget,
    over: what the directory's answers ask for.  heard: when every shard has answered for the first time.
    book: keeps who there is, for a directory that knows nothing yet.  carrier: see PeerDesk.
    """

    def __init__(
        self,
        config: ClusterConfig,
        own: Identity,
        tls: ssl.SSLContext | None,
        *,
        snapshot: Callable[[], None],
        forget: Callable[[Stone], None],
        over: Callable[[Sequence[str]], None],
        heard: Callable[[], None],
        book: PeerBook | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self._config = config
        self._own = own
        self._snapshot, self._forget, self._over, self._heard = snapshot, forget, over, heard
        # Shards that have not answered for what this node says of itself.
        self._strange = set(range(config.shards))
        # Whether the core's thread has been asked for a snapshot and has not given it.
        self._being_made = False
        self._lock = threading.Lock()
        self._announcer = Announcer(own.node, own.epoch, config.shards)
        self._book = book
        self._addresses: dict[str, str] = book.addresses() if book is not None else {}
        # Of other nodes, as they said last; and this one's, which goes with its next message.
        self._loads: dict[str, Load] = {}
        self._load: Load | None = None
        self._ended = threading.Event()
        settings = ClientSettings(streams=1, connect_s=1.0, tls=tls, carrier=carrier)
        self._services = [
            _Service(
                address, PeerClient(own, directory_name(address), split(address), settings), time.monotonic()
            )
            for address in dict.fromkeys(config.directory)
        ]
        by_address = {service.address: service for service in self._services}
        # By shard: who has it, if it is there, and who does otherwise.
        self._services_of = [
            [by_address[address] for address in services_of(config.directory, shard)]
            for shard in range(config.shards)
        ]
        self._digest = digest_of(config.directory)
        self._pool = ThreadPoolExecutor(len(self._services), "kvtier-ask")

    def start(self) -> None:
        """Begin to announce."""
        for service in self._services:
            self._begin(service)

    def cut(self) -> None:
        """End all connections: whoever asks is answered at once, with nothing."""
        with self._lock:
            self._ended.set()
        for service in self._services:
            service.wake.set()
            service.client.close()

    def close(self) -> None:
        """End all connections and threads. Nobody asks any more."""
        self.cut()
        for service in self._services:
            if service.thread is not None:
                service.thread.join()
        self._pool.shutdown()

    # --- announcing -------------------------------------------------------------------------------------

    def say(self, changed: Holdings) -> None:
        """Have what changed announced."""
        if changed.load is not None:
            self._load = changed.load
        if changed.blocks or changed.named:
            with self._lock:
                saying.say(self._announcer, changed)
            self._wake()

    def begin_everything(self) -> None:
        """Begin a snapshot of all that the node has for the streams that want one; `say_part` follows."""
        with self._lock:
            self._announcer.begin()

    def say_part(self, part: Holdings) -> None:
        """A part of it, as it is now. What `say` is told meanwhile is later than the parts before it."""
        with self._lock:
            saying.say_part(self._announcer, part)

    def end_everything(self, stones: Iterable[Stone]) -> None:
        """The streams have their snapshots."""
        with self._lock:
            self._announcer.end([saying.tombstone(stone) for stone in stones])
            self._being_made = False
        self._wake()

    def say_buried(self, stone: Stone) -> None:
        """This node has carried out a tombstone."""
        with self._lock:
            self._announcer.tombstone(saying.tombstone(stone))
        self._wake()

    def _wake(self) -> None:
        for service in self._services:
            service.wake.set()

    def _announce(self, service: _Service) -> None:
        """Until the end. What is unexpected is a fault of ours: it is seen, and another thread goes on."""
        try:
            self._announce_all(service)
        except BaseException:
            _LOG.exception("announcing to the directory at %s failed, and begins again", service.address)
            raise
        finally:
            while not self._ended.wait(_PAUSE_S):
                try:
                    self._begin(service)
                    break
                except RuntimeError as error:
                    _LOG.warning(
                        "nobody announces to the directory at %s for now: %s", service.address, error
                    )

    def _begin(self, service: _Service) -> None:
        """Raises RuntimeError where no thread can be started."""
        with self._lock:
            if self._ended.is_set():
                return
            thread = threading.Thread(
                target=self._announce, args=(service,), name="kvtier-announce", daemon=True
            )
            thread.start()
            service.thread = thread

    def _announce_all(self, service: _Service) -> None:
        silent_s = min(_MOST_SILENT_S, self._config.lost_after_s / 3)
        probe_s = time.monotonic() + silent_s
        who_s = 0.0
        while not self._ended.is_set():
            if service.wake.wait(max(0.0, probe_s - time.monotonic())):
                # What changes together goes together.
                self._ended.wait(_GATHER_S)
            service.wake.clear()
            if time.monotonic() >= probe_s:
                # Also while other shards have news: each may have been lost by itself.
                probe_s = time.monotonic() + silent_s
                with self._lock:
                    for shard in self._shards_of(service):
                        self._announcer.senders[shard].probe()
                if service.lost or time.monotonic() >= who_s:
                    who_s = time.monotonic() + _WHO_S
                    self._learn(self._ask(service, calls.GetNodes(), calls.Nodes))
            try:
                while self._tell_all(service):
                    pass
            except (StreamLost, KvtierError) as error:
                if not self._ended.is_set():
                    _LOG.warning("the directory at %s takes no announcements: %s", service.address, error)
                    self._is_silent(service)
                    self._ended.wait(_PAUSE_S)
                service.wake.set()

    def _tell_all(self, service: _Service) -> bool:
        """Send the next message of each shard; answers whether there was any."""
        said = False
        for shard in self._shards_of(service):
            sender = self._announcer.senders[shard]
            if sender.wants_snapshot and not sender.fenced:
                self._want_snapshot()
            with self._lock:
                message = sender.next()
            if message is None or self._ended.is_set():
                continue
            body = calls.pack(calls.Tell(message, self._config.listen, self._load, self._digest))
            answer = calls.unpack_answer(service.client.ask(body, _TELL_S), Answer)
            self._is_there(service)
            self._answered(shard, sender, answer)
            said = True
        return said

    def _at(self, shard: int) -> _Service:
        """Who has the shard now."""
        every = self._services_of[shard]
        return next((service for service in every if not service.lost), every[0])

    def _shards_of(self, service: _Service) -> list[int]:
        return [shard for shard in range(self._config.shards) if self._at(shard) is service]

    def _is_there(self, service: _Service) -> None:
        service.heard_s = time.monotonic()
        if service.lost:
            _LOG.warning("the directory at %s is back, and has its shards again", service.address)
            service.lost = False
            self._wake()

    def _is_silent(self, service: _Service) -> None:
        silent_s = time.monotonic() - service.heard_s
        if silent_s >= self._config.lost_after_s and not service.lost and len(self._services) > 1:
            _LOG.warning("the directory at %s is lost: others have its shards", service.address)
            service.lost = True
            self._wake()

    def _want_snapshot(self) -> None:
        """Ask for one, unless one that was asked for is still being made: it will do for all shards."""
        with self._lock:
            if self._being_made:
                return
            self._being_made = True
        try:
            self._snapshot()
        except RuntimeError as error:
            # It is asked for again with the next probe.
            _LOG.warning("not everything can be told to the directory for now: %s", error)
            with self._lock:
                self._being_made = False

    def _answered(self, shard: int, sender: Sender, answer: Answer) -> None:
        with self._lock:
            sender.answered(answer)
        if answer.fenced:
            _LOG.error("a later start of this node is known to the directory: nothing is announced any more")
        for tombstone in answer.forget:
            self._forget(saying.stone(tombstone))
        if answer.over:
            self._over(answer.over)
        with self._lock:
            known = bool(self._strange) and not sender.wants_snapshot
            if known:
                self._strange.discard(shard)
            heard = known and not self._strange
        if heard:
            self._heard()

    # --- asking -----------------------------------------------------------------------------------------

    def branches(self, message: FindBranches) -> Branches:
        """Where branches of a conversation end; nothing when the directory does not answer in time."""
        found = self.conversation(message.tenant, message.conversation, message.after)
        return Branches(job=message.job, ends=saying.branch_ends(found))

    def conversation(self, tenant: str, name: str, after: tuple[str, ...] = ()) -> list[Conversation]:
        """What all nodes say of a conversation that came after these tombstones: one, or none."""
        shard = shard_of_conversation(tenant, name, self._config.shards)
        page = self._ask(self._at(shard), calls.GetConversation(shard, tenant, name, after), calls.Page)
        if page is None:
            return []
        self._loads.update(page.loads)
        return page.conversations

    def known(self, message: FindConversations) -> Known:
        """A conversation, or a page of them, over all nodes."""
        if message.conversation:
            found = self.conversation(message.tenant, message.conversation)
        else:
            pages = self._pool.map(
                lambda s: self._ask(
                    s,
                    calls.GetAfter(self._shards_of(s), message.tenant, message.after, message.limit),
                    calls.Page,
                ),
                self._services,
            )
            found = [one for page in pages if page is not None for one in page.conversations]
            found.sort(key=lambda conversation: (conversation.tenant, conversation.name))
        page = tuple(saying.known(one) for one in found[: message.limit])
        loads = self._loads_of({node for one in page for node, _ in one.held}) if message.conversation else {}
        return Known(job=message.job, conversations=page, loads=loads)

    def holders(self, message: FindHolders) -> Holders:
        """How far which other node reaches in each chain, the best first."""
        asked: dict[str, list[tuple[int, Question]]] = {service.address: [] for service in self._services}
        for at, chain in enumerate(message.chains):
            for question in questions(saying.refs_of(chain), self._config.shards):
                asked[self._at(question.shard).address].append((at, question))
        answers: dict[int, list[tuple[Question, Hits]]] = {}
        parts = self._pool.map(lambda s: self._find(s, message.tenant, asked[s.address]), self._services)
        for part in parts:
            for at, question, hits in part:
                answers.setdefault(at, []).append((question, hits))
        found = saying.reaches(message, answers, self._own.node)
        loads = self._loads_of({reach.node for reach in found})
        return Holders(job=message.job, fronts=tuple(found), loads=loads)

    def _loads_of(self, nodes: Iterable[str]) -> dict[str, Load]:
        return {node: self._loads[node] for node in nodes if node in self._loads}

    def _find(
        self, service: _Service, tenant: str, mine: Sequence[tuple[int, Question]]
    ) -> list[tuple[int, Question, Hits]]:
        if not mine:
            return []
        call = calls.Find(tenant, [(question.shard, question.keys) for _, question in mine])
        found = self._ask(service, call, calls.Found)
        if found is None or len(found.hits) != len(mine):
            return []
        self._addresses.update(found.addresses)
        self._loads.update(found.loads)
        return [(at, question, hits) for (at, question), hits in zip(mine, found.hits, strict=True)]

    def nodes(self) -> dict[str, bool]:
        """Every other node that the directory has heard of, and whether it may be there."""
        found = self._known_nodes()
        known = dict.fromkeys(self._addresses, not found)
        for node in found:
            known[node.node] = known.get(node.node, False) or node.here
        known.pop(self._own.node, None)
        return known

    def nodes_there(self, message: FindNodes) -> NodesThere:
        """The other nodes that are there, each as it said last what it is."""
        newest: dict[str, NodeThere] = {}
        for node in self._known_nodes():
            known = newest.get(node.node)
            later = known is None or node.epoch > known.epoch
            if node.here and node.load is not None and node.node != self._own.node and later:
                newest[node.node] = NodeThere(node.node, node.epoch, node.load)
        return NodesThere(job=message.job, nodes=tuple(newest[name] for name in sorted(newest)))

    def _known_nodes(self) -> list[calls.Node]:
        """What every service says of each node."""
        answers = self._pool.map(
            lambda service: self._learn(self._ask(service, calls.GetNodes(), calls.Nodes)), self._services
        )
        return [node for nodes in answers for node in nodes]

    def _learn(self, answer: calls.Nodes | None) -> list[calls.Node]:
        """The nodes of an answer, whose addresses are kept."""
        nodes = answer.nodes if answer is not None else []
        addresses = {node.node: node.address for node in nodes}
        self._addresses.update(addresses)
        if self._book is not None:
            self._book.learn(addresses)
        return nodes

    def named(self) -> list[str]:
        """Names of the nodes that somebody has told of, since the book was begun."""
        return list(self._addresses)

    def address_of(self, node: str) -> str:
        """host:port of a node; '' when nobody said it."""
        return self._addresses.get(node, "")

    def _ask(self, service: _Service, call: calls.Call, kind: type[calls.T]) -> calls.T | None:
        if time.monotonic() < service.down_until_s:
            return None
        try:
            answer = calls.unpack_answer(service.client.ask(calls.pack(call), self._config.ask_s), kind)
            self._is_there(service)
            return answer
        except (StreamLost, KvtierError) as error:
            service.down_until_s = time.monotonic() + _PAUSE_S
            _LOG.warning("the directory at %s does not answer: %s", service.address, error)
            return None
