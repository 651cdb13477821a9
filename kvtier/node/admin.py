"""What people and programs ask about: status, ls, show, models; hint, locate, forget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import nsmallest
from itertools import takewhile

from kvtier.errors import ProtocolError
from kvtier.messages.calls import (
    Conversations,
    Done,
    Explain,
    Explained,
    Forget,
    Forgotten,
    Hint,
    ListConversations,
    ListModels,
    Locate,
    Models,
    Retire,
    Show,
    Status,
    StatusIs,
)
from kvtier.messages.cluster import Buried, KnownConversation
from kvtier.node import usage
from kvtier.node.awaited import Awaited
from kvtier.node.blocks import Block, ConversationId, Stored
from kvtier.node.disk_requests import RemoveDone
from kvtier.node.disk_side import DiskSide
from kvtier.node.everywhere import Everywhere, merged
from kvtier.node.explain import explained
from kvtier.node.graves import Burials
from kvtier.node.parks import Parks
from kvtier.node.reports import conversation_info, model_infos, status_report
from kvtier.node.state import NodeState
from kvtier.policy.interfaces import Segment
from kvtier.receipts import ConversationInfo, ForgetReceipt, Reason

_LIST_MOST = 1000
# A client waits for a minute.
_ERASE_MOST_S = 30.0


class Admin:
    """Answers questions, and carries out wishes about conversations."""

    def __init__(
        self, state: NodeState, disk: DiskSide, parks: Parks, burials: Burials, everywhere: Everywhere
    ) -> None:
        self._state = state
        self._everywhere = everywhere
        self._burials = burials
        burials.erase_here = self._erase_here
        burials.settle_here = self._settle_here
        self._disk = disk
        self._parks = parks
        self._awaited = Awaited(_ERASE_MOST_S)

    def tick(self) -> None:
        """Who waits for an erasure that the disk does not answer is told so."""
        self._awaited.tick(self._state.now_s)

    def status(self, peer: str, message: Status) -> None:
        """Answer Status."""
        report = status_report(self._state, self._parks.waiting())
        self._state.send(peer, StatusIs(id=message.id, report=report))

    def list_conversations(self, peer: str, message: ListConversations) -> None:
        """Answer ListConversations: a page in order of (tenant, name)."""
        limit = min(max(message.limit, 1), _LIST_MOST)
        after = None if message.after is None else (message.after[0], message.after[1])
        # One more than is told says whether there are more.
        names = nsmallest(
            limit + 1,
            (
                name
                for name in self._state.conversations
                if (not message.tenant or name[0] == message.tenant) and (after is None or name > after)
            ),
        )

        def answer(known: Sequence[KnownConversation]) -> None:
            elsewhere = {(k.tenant, k.conversation): k for k in known}
            every = sorted({*names, *elsewhere})
            page = [self._info(name, elsewhere.get(name)) for name in every[:limit]]
            found = [info for info in page if info is not None]
            more = len(every) > limit or len(known) > limit
            self._state.send(peer, Conversations(id=message.id, conversations=found, more=more))

        self._everywhere.find(answer, tenant=message.tenant, after=after, limit=limit + 1)

    def _info(self, name: ConversationId, elsewhere: KnownConversation | None) -> ConversationInfo | None:
        """What is known of a conversation, here and at other nodes."""
        state = self._state
        known = state.conversations.get(name)
        here = conversation_info(state, known) if known is not None and known.heads else None
        if here is None and elsewhere is None:
            return None
        if not state.settings.ask_elsewhere_s:
            return here
        return merged(here, elsewhere, state.settings.node)

    def show(self, peer: str, message: Show) -> None:
        """Answer Show: the conversation, or nothing."""
        name = (message.tenant, message.conversation)

        def answer(known: Sequence[KnownConversation]) -> None:
            info = self._info(name, known[0] if known else None)
            found = [info] if info is not None else []
            self._state.send(peer, Conversations(id=message.id, conversations=found))

        self._everywhere.find(answer, tenant=message.tenant, conversation=message.conversation)

    def explain(self, peer: str, message: Explain) -> None:
        """Answer Explain."""
        explanation = explained(self._state, (message.tenant, message.conversation))
        self._state.send(peer, Explained(id=message.id, explanation=explanation))

    def models(self, peer: str, message: ListModels) -> None:
        """Answer ListModels."""
        self._state.send(peer, Models(id=message.id, models=model_infos(self._state)))

    def retire(self, peer: str, message: Retire) -> None:
        """Answer Retire. Raises ProtocolError for what names no model, several, or one that is served."""
        infos = [i for i in model_infos(self._state) if i.fingerprint.startswith(message.fingerprint)]
        if len(infos) != 1 or not message.fingerprint:
            found = f"{len(infos)} models have" if infos and message.fingerprint else "no model has"
            raise ProtocolError(f"{found} a fingerprint that begins so", fix="see kvtier models")
        if infos[0].workers:
            served = f"{infos[0].workers} workers serve {infos[0].model} with this fingerprint"
            raise ProtocolError(served, fix="end them first")
        self._state.retired[bytes.fromhex(infos[0].fingerprint)] = None
        self._state.send(peer, Models(id=message.id, models=[replace(infos[0], retired=True)]))

    def hint(self, peer: str, message: Hint) -> None:
        """Note when a conversation is expected; one that is not known is no error."""
        state = self._state
        known = state.conversations.get((message.tenant, message.conversation))
        if known is not None:
            if message.returns_in_s is not None:
                known.returns_at_s = state.now_s + message.returns_in_s
            if message.keep_for_s is not None:
                known.keep_until_s = state.now_s + message.keep_for_s
            known.version += 1
            state.name_changed(known.id)
            self._disk.save_record(known)
            usage.hinted(state, known, message)
        state.send(peer, Done(id=message.id))

    def located_here(self, message: Locate) -> list[tuple[str, int, float]]:
        """This node's place for Locate, when it holds the conversation: by its newest end."""
        state = self._state
        known = state.conversations.get((message.tenant, message.conversation))
        if known is None or not known.heads:
            return []
        chain = state.tree.chain(known.heads[-1].key)
        there = takewhile(lambda block: _is_there(state, block), chain)
        segments = [_segment(state, block) for block in there]
        choice = state.policies.restore.choose(segments, known.heads[-1].tokens)
        return [(state.settings.node, choice.tokens, choice.eta_high_s)]

    # --- forgetting -------------------------------------------------------------------------------------

    def forget(self, peer: str, message: Forget) -> None:
        """Erase a conversation, here and at all nodes; the answer goes out when that is durable."""
        receipt, erased = self._begin_forgetting(message)
        self._erase(peer, message, receipt, erased)

    def _erase_here(self, name: ConversationId, stone: str, done: RemoveDone) -> None:
        """Erase what another node forgot. stone: id of its tombstone."""
        _, erased = self._begin_forgetting(Forget(tenant=name[0], conversation=name[1]))
        self._remove(erased, name, done, stone)

    def _settle_here(self, name: ConversationId, stone: str, done: RemoveDone) -> None:
        """Have what was erased here before be gone from the disk for good. stone: as above."""
        self._disk.erase((), name, self._awaited.bounded(self._state.now_s, done), stone)

    def _begin_forgetting(self, message: Forget) -> tuple[ForgetReceipt, list[Stored]]:
        """End the conversation; answers what is to go, and what a receipt says of it."""
        state = self._state
        name = (message.tenant, message.conversation)
        self._parks.forget(name)
        known = state.conversations.get(name)
        erased, shared = self._split(name)
        found = known is not None or bool(erased) or name in state.ended
        state.end_conversation(name)
        state.policies.usage.forgotten(name)
        receipt = ForgetReceipt(
            message.conversation,
            message.tenant,
            found=found,
            erased_objects=len(erased),
            erased_bytes=sum(s.meta.nbytes for s in erased),
            kept_shared_objects=len(shared),
            kept_shared_bytes=sum(s.meta.nbytes for s in shared),
            erased_host_bytes=_host_bytes(state, erased),
            erased_disk_bytes=_disk_bytes(erased),
            kept_shared_host_bytes=_host_bytes(state, shared),
            kept_shared_disk_bytes=_disk_bytes(shared),
        )
        return receipt, erased

    def _split(self, name: ConversationId) -> tuple[list[Stored], list[Stored]]:
        """Objects that only this conversation names, and those that others name too.

        A park that failed leaves objects with the conversation's name, even where there is none.
        """
        erased: list[Stored] = []
        shared: list[Stored] = []
        for block in self._state.tree.unname(name):
            (shared if block.names else erased).extend(block.parts.values())
        return erased, shared

    def _erase(self, peer: str, message: Forget, receipt: ForgetReceipt, erased: list[Stored]) -> None:
        state = self._state
        reason: Reason = "disk_error" if state.disk.ready else "no_disk"
        burial = self._burials.bury((message.tenant, message.conversation))

        def done(ok: bool, detail: str) -> None:
            answer = receipt
            self._burials.erased_here(burial, ok)
            if not ok:
                # It is out of host memory, and comes true on disk as soon as that works again.
                answer = replace(receipt, erased_disk_bytes=0, durable=False, reason=reason, detail=detail)

            def tell(buried: Buried | None) -> None:
                state.send(peer, Forgotten(id=message.id, receipt=_everywhere(answer, burial, buried)))

            self._burials.when_buried(burial, tell)

        self._remove(erased, (message.tenant, message.conversation), done)

    def _remove(self, erased: list[Stored], name: ConversationId, done: RemoveDone, stone: str = "") -> None:
        state = self._state
        for stored in erased:
            if stored.slot is not None:
                # Leased or not: it is no longer to be found, and its room is free when its readers are done.
                state.host.withdraw(stored.slot)
                state.vacated(stored)
        bounded = self._awaited.bounded(state.now_s, done)
        self._disk.erase(erased, name, bounded, stone)
        for stored in erased:
            state.forget_object(stored.meta.object_id)


def _everywhere(receipt: ForgetReceipt, burial: str, buried: Buried | None) -> ForgetReceipt:
    """The receipt, with what is known of other nodes. burial: '' on a node that is alone."""
    if not burial:
        return receipt
    if buried is None or not buried.kept:
        detail = "other nodes may have it still: this one could not note that it is forgotten"
        return replace(receipt, durable=False, reason=receipt.reason or "disk_error", detail=detail)
    if not buried.absent:
        return receipt
    absent = f"erased at once when they are back: {', '.join(buried.absent)}"
    return replace(receipt, found=receipt.found, detail="; ".join(filter(None, (receipt.detail, absent))))


def _host_bytes(state: NodeState, objects: list[Stored]) -> int:
    return sum(s.meta.nbytes for s in objects if s.slot is not None)


def _disk_bytes(objects: list[Stored]) -> int:
    return sum(s.on_disk.nbytes for s in objects if s.on_disk is not None)


def _is_there(state: NodeState, block: Block) -> bool:
    return bool(block.parts) and all(state.source_of(s) is not None for s in block.parts.values())


def _segment(state: NodeState, block: Block) -> Segment:
    in_host = all(s.slot is not None for s in block.parts.values())
    nbytes = sum(s.meta.nbytes for s in block.parts.values())
    return Segment(block.start, block.end, "host" if in_host else "disk", nbytes)
