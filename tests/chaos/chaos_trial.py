"""Whether a promise holds."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from chaos_damage import place_of
from chaos_ledger import Chat, Ledger, Promise
from chaos_load import Chair
from chaos_nodes import Broken
from chaos_text import Text

from kvtier.errors import DaemonNotFound
from kvtier.testing.kv_memory import BLOCK_TOKENS


class Trial:
    """A promise, looked for at a chair: by itself, or one that ends in a tail also by a longer text that
    comes back whole.

    A full block of that one may have taken the tail's place: then all full blocks of this one are there.
    The longer text may have reached the disk after its receipt said less.  At the node itself, all of it
    is there before anybody else is asked, but for such a tail, and for what was damaged.
    """

    def __init__(
        self, ledger: Ledger, chat: Chat, promise: Promise, chair: Chair, tokens: int, patience_s: float
    ) -> None:
        self.promise, self._chat, self._chair, self._tokens = promise, chat, chair, tokens
        self._patience_s = patience_s
        self._said = said = promise.text.cut(promise.tokens)
        self._tail = said.count % BLOCK_TOKENS
        self._texts = [
            text
            for text in ledger.longer(chat, said)
            if self._tail and text.count >= said.count - self._tail + BLOCK_TOKENS
        ]
        self._found: list[dict[str, Any]] = []
        # Whether it was held in a longer text.
        self.longer = False

    def holds(self) -> bool:
        """Whether it does now. Raises Broken."""
        said, own = self._said, self._chair.node.name == self.promise.node
        self._found = [self._restored(said)]
        damaged = self._chair.node.excuses.some
        if own and not damaged and said.count >= BLOCK_TOKENS and "peer" in self._found[0]["sources"]:
            raise self.lost()
        if self._found[0]["tokens"] >= self._tokens:
            return True
        for text in self._texts if self._found[0]["tokens"] >= said.count - self._tail else ():
            self._found.append(self._restored(text))
            if self._found[-1]["tokens"] == text.count:
                self.longer = True
                return True
        return False

    @property
    def place(self) -> Hashable:
        """Where what is missing begins."""
        return place_of(self._chat, self._said, self._found[0]["tokens"])

    def lost(self) -> Broken:
        """It does not hold."""
        chat, promise = self._chat, self.promise
        located: object
        try:
            located = self._chair.client.locate(chat.name, tenant=chat.tenant)
        except DaemonNotFound as error:
            located = error
        return Broken(
            f"LOST: node {promise.node} promised {promise.tokens} tokens of {chat.tenant}/{chat.name} "
            f"{promise.text.pieces}; at {self._chair.name} there is {self._found}; "
            f"located at {located}"
        )

    def _restored(self, text: Text) -> dict[str, Any]:
        return self._chair.restore(self._chat, text, self._patience_s)
