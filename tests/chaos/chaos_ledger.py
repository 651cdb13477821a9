"""What the daemon has promised, conversation by conversation, and what it may not say any more."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from chaos_text import Text

# Texts that all conversations of a model may begin with: system prompts.
PROMPTS = (Text(()), Text(((1, 40),)), Text(((2, 96),)))
LONGEST = 320
TENANTS = ("acme", "umbrella")
_GONE_MOST = 5


@dataclass(frozen=True, slots=True)
class Promise:
    """The first `tokens` of the text come back at this node, whatever was killed in between."""

    node: str
    text: Text
    tokens: int


@dataclass(frozen=True, slots=True)
class Copies:
    """The same at any of these nodes whose memory was not lost since; asked_s: by time.monotonic()."""

    nodes: tuple[str, ...]
    text: Text
    tokens: int
    asked_s: float


@dataclass(frozen=True, slots=True)
class Gone:
    """A text that was forgotten: no more than `shared` of its tokens may come back.

    late: nodes that were away, and may not have heard of it yet.
    """

    text: Text
    shared: int
    late: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Chat:
    """One conversation. went: texts that may have been stored.  users: turns that are under way."""

    model: int
    tenant: str
    name: str
    prompt: Text
    texts: list[Text] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    went: list[Text] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)
    users: int = 0
    forgetting: bool = False
    over: bool = False


class Ledger:
    """All conversations of a run. From any thread. fickle: nodes whose promises do not count."""

    def __init__(self, models: int, chats: int, prefix: str, fickle: AbstractSet[str] = frozenset()) -> None:
        self._lock = threading.Lock()
        self._fickle = fickle
        self._serial = 0
        self._prefix = prefix
        self._per_model = chats
        self._seeds = 1000
        self.promised = self.forgotten = 0
        self.chats: list[Chat] = []
        for model in range(models):
            for _ in range(chats):
                self._add(model, random.Random(f"{prefix}{self._serial}"))

    @contextmanager
    def some(self, model: int, draw: random.Random, *, alone: bool = False) -> Iterator[Chat | None]:
        """A conversation of the model, held for a turn; None when there is none to be had."""
        with self._lock:
            free = [
                c
                for c in self.chats
                if c.model == model and not c.forgetting and not c.over and not (alone and c.users)
            ]
            chat = draw.choice(free) if free else None
            if chat is not None:
                chat.users += 1
                chat.forgetting = alone
        try:
            yield chat
        finally:
            if chat is not None:
                with self._lock:
                    chat.users -= 1
                    chat.forgetting = False

    def next_text(self, chat: Chat, draw: random.Random) -> Text:
        """What the next park of the conversation says: more of a branch, or another branch."""
        with self._lock:
            self._seeds += 1
            known = list(chat.texts)
            seed = self._seeds
        base = draw.choice(known[-2:]) if known else chat.prompt
        if known and draw.random() < 0.2:
            base = base.cut(draw.randint(chat.prompt.count, base.count))
        if base.count >= LONGEST - 1:
            base = base.cut(draw.randint(chat.prompt.count, LONGEST - 40))
        return base.grown(seed, min(draw.randint(1, 80), LONGEST - base.count))

    def parked(self, chat: Chat, text: Text) -> None:
        """Somebody tries to park it."""
        with self._lock:
            chat.texts.append(text)

    def keep(self, chat: Chat, promise: Promise) -> None:
        """The daemon said that it is on disk.

        What a node parks before it has heard that the name was forgotten elsewhere is forgotten too.
        """
        with self._lock:
            late = any(promise.node in gone.late for gone in chat.gone)
            if late or promise.node in self._fickle:
                return
            self.promised += 1
            said = promise.text.cut(promise.tokens)
            chat.promises = [
                old
                for old in chat.promises
                if old.node != promise.node or not old.text.cut(old.tokens).begins(said)
            ]
            chat.promises.append(promise)

    def keep_copies(self, chat: Chat, copies: Copies) -> None:
        """The daemon said that these nodes have it; another park may have gone on from it before that."""
        said = copies.text.cut(copies.tokens)
        with self._lock:
            late = any(set(copies.nodes) & set(gone.late) for gone in chat.gone)
            if not late and not self.longer(chat, said):
                stay = tuple(node for node in copies.nodes if node not in self._fickle)
                chat.copies.append(replace(copies, nodes=stay))

    @staticmethod
    def longer(chat: Chat, said: Text) -> list[Text]:
        """What may be stored that goes on from a text: the text's last tokens may be in a block of it."""
        return [text for text in chat.went if said.count < text.count and said.begins(text)]

    def went_on(self, chat: Chat, text: Text) -> None:
        """The text may be stored: what it goes on from may end in a block of it by now, and not in a tail."""
        with self._lock:
            chat.went.append(text)
            chat.copies = [old for old in chat.copies if not old.text.cut(old.tokens).begins(text)]

    def adopt(self, chat: Chat) -> None:
        """One that nobody has turns with: at the end it is forgotten like all."""
        with self._lock:
            self.chats.append(chat)

    def all_heard(self) -> None:
        """Every node has heard of everything by now."""
        with self._lock:
            for chat in self.chats:
                chat.gone = [replace(gone, late=()) for gone in chat.gone]

    def forget(self, chat: Chat, late: tuple[str, ...], draw: random.Random, *, certain: bool) -> None:
        """It is forgotten, or nobody knows. Its name goes on with other words, or not at all."""
        with self._lock:
            if certain:
                self.forgotten += 1
                chat.gone += [Gone(text, chat.prompt.count, late) for text in chat.texts[-_GONE_MOST:]]
            chat.texts.clear()
            chat.promises.clear()
            chat.copies.clear()
            chat.went.clear()
            if not certain or draw.random() < 0.6:
                chat.over = True
                self._add(chat.model, draw)

    def _add(self, model: int, draw: random.Random) -> None:
        self._serial += 1
        name = f"{self._prefix}-{self._serial}"
        self.chats.append(Chat(model, draw.choice(TENANTS), name, draw.choice(PROMPTS)))
