"""Ray Serve: a request router that sends each turn to the node where its conversation is at hand.

    @serve.deployment(request_router_config=sticky())
    class Chat:
        def __init__(self):
            self.kv = kvtier.connect()

        def record_replica_metadata(self):
            return replica_metadata(self.kv)

A request's session id is its conversation: the header x-session-id over HTTP, `options(session_id=...)` of a
handle.  The router asks the daemon beside it where the conversation is (`Client.locate`) and tries the best
node's replicas first, then the next one's.  Requests without a session, of conversations that nobody has, and
all while the daemon does not answer go to the less busy one of two replicas, as with Serve's own router.

Needs ray[serve] 2.60; Serve calls its router interface alpha.
"""

from __future__ import annotations

import asyncio
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from kvtier.arguments import DEFAULT_TENANT
from kvtier.client.client import Client, connect
from kvtier.errors import KvtierError

log = logging.getLogger(__name__)
# Key of the node's name in what a replica tells of itself.
NODE = "kvtier_node"
# A question takes about a millisecond; a request that waits longer is sent on without the answer.
DEADLINE_S = 0.05


def sticky(
    *,
    socket: str = "",
    token_file: str = "",
    tenant: str = DEFAULT_TENANT,
    deadline_s: float = DEADLINE_S,
) -> RequestRouterConfig:
    """Serve's configuration for a deployment whose requests follow their conversations.

    socket: of the daemon beside each proxy and handle; '' for where `kvtier up` makes it.  token_file: for
    processes that are not on the daemon's list.  tenant: of all the deployment's conversations.
    """
    return RequestRouterConfig(
        request_router_class=f"{__name__}.{StickyRouter.__name__}",
        request_router_kwargs={
            "socket": socket,
            "token_file": token_file,
            "tenant": tenant,
            "deadline_s": deadline_s,
        },
    )


def replica_metadata(client: Client) -> dict[str, str]:
    """What a replica's record_replica_metadata has to answer: the node whose daemon `client` speaks to.

    Raises DaemonNotFound.
    """
    return {NODE: client.status().node}


class StickyRouter(RequestRouter):  # type: ignore[misc]
    """See the module's text; made by Serve from what `sticky` configures.

    Each request gets the replica that was chosen for it: Serve's FIFO order would hand it to another one.
    """

    def initialize_state(self, *, socket: str, token_file: str, tenant: str, deadline_s: float) -> None:
        """Called by Serve, once, before the first request."""
        self._tenant = tenant
        self._deadline_s = deadline_s
        self._path = socket or None
        self._token_file = token_file or None
        self._client: Client | None = None
        self._told = False
        # Its own: a program that seeds the common one would have all of its routers draw alike.
        self._random = random.Random()
        # One thread, so that the loop never waits for a socket, nor two threads for one connection.
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="kvtier-router")

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups to try one after the other; within one, Serve takes the replica with the fewest requests."""
        groups: list[list[RunningReplica]] = []
        if pending_request is not None:
            # Without this Serve asks again at once when all replicas are full.
            pending_request.routing_context.should_backoff = True
            nodes = await self._located(pending_request.metadata.session_id)
            groups = [found for node in nodes if (found := _on(node, candidate_replicas))]
        two = self._random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        return [*groups, two] if two else groups

    async def _located(self, conversation: str) -> list[str]:
        """Names of nodes, the best first; none when that is not to be known in time."""
        if not conversation:
            return []
        asking = asyncio.get_running_loop().run_in_executor(self._asker, self._ask, conversation)
        try:
            return await asyncio.wait_for(asking, self._deadline_s)
        except (TimeoutError, KvtierError) as error:
            if not self._told:
                log.warning("requests go to any replica, kvtier does not say where: %s", error or "no answer")
            self._told = True
            return []

    def _ask(self, conversation: str) -> list[str]:
        """In the thread. Once the daemon did not answer, the client refuses at once until it is back."""
        if self._client is None:
            self._client = connect(
                self._path, token_file=self._token_file, timeout_s=self._deadline_s, required=False
            )
        return [node for node, _, _ in self._client.locate(conversation, tenant=self._tenant)]


def _on(node: str, replicas: list[RunningReplica]) -> list[RunningReplica]:
    """The replicas that said that they run on this node."""
    return [replica for replica in replicas if _metadata(replica).get(NODE) == node]


def _metadata(replica: RunningReplica) -> dict[str, Any]:
    found: dict[str, Any] = replica.replica_metadata
    return found
