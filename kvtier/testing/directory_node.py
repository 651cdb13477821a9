"""A node as the directory sees it: it says what it is given, and notes what it is told."""

from __future__ import annotations

from typing import Any

from kvtier.config.load import Config
from kvtier.daemon.peer_directory import PeerDirectory
from kvtier.messages.cluster import FindBranches, Held, Holdings, Named, Stone
from kvtier.peers.handshake import Identity

TOKEN = b"token of a test's cluster"


class Say:
    """See the module's text. told: tombstones, ids of those that are over, and 'heard', in their order."""

    def __init__(self, config: Config, node: str, epoch: int = 1) -> None:
        self.blocks: list[Held] = []
        self.named: list[Named] = []
        self.stones: list[Stone] = []
        self.told: list[Any] = []
        self.directory = PeerDirectory(
            config.cluster,
            Identity(node, epoch, TOKEN),
            None,
            snapshot=self._snapshot,
            forget=lambda stone: self.told.append(stone),
            over=lambda ids: self.told.append(tuple(ids)),
            heard=lambda: self.told.append("heard"),
        )
        self.directory.start()

    def _snapshot(self) -> None:
        self.directory.begin_everything()
        self.directory.say_part(Holdings(blocks=tuple(self.blocks), named=tuple(self.named)))
        self.directory.end_everything(self.stones)

    def names(self, name: str, version: int = 1) -> None:
        """It has a conversation of this name from now on."""
        named = Named("acme", name, version, ((name.encode().ljust(16), 10, 1.0, None, b""),))
        self.named.append(named)
        self.directory.say(Holdings(named=(named,)))

    def ends(self, name: str) -> int:
        """How many branches of a conversation the directory tells it of."""
        return len(self.directory.branches(FindBranches(job="", tenant="acme", conversation=name)).ends)
