"""Ray Serve sends a chat's next turn to the replica beside its KV.

    python examples/serve_sticky.py

Needs ray[serve].  Two replicas stand for two machines: only the first one's has a daemon, in which chat-42 is
parked.  Where every machine has one, a replica says `kvtier.connect()` and `replica_metadata(self.kv)`.
"""

from __future__ import annotations

import tempfile
from collections import Counter

import numpy as np
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

import kvtier
from kvtier import Fingerprint, Shard
from kvtier.daemon.embedded import Embedded
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool
from kvtier.integrations.ray_serve import NODE, sticky

PAGE_TOKENS, TOKENS, TURNS = 16, 192, 20
CONFIG = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 64}


class Chat:
    """What a model's server would be."""

    def __init__(self) -> None:
        self.node = f"machine-{serve.get_replica_context().rank.rank}"

    def record_replica_metadata(self) -> dict[str, str]:
        """Tells the router where this replica runs."""
        return {NODE: self.node}

    def __call__(self) -> str:
        """A turn: answers who had it."""
        return self.node


def park(socket: str) -> None:
    """The first turn of chat-42, on the machine that has the daemon."""
    shape = (TOKENS // PAGE_TOKENS, PAGE_TOKENS, 2, 32)
    layer = [np.ones(shape, np.float16), np.ones(shape, np.float16)]
    pool = Pool(paged([layer], "page token head dim", block_tokens=64), layer)
    model = Fingerprint.of_revision("example/model@1f0c9a", CONFIG, kv_dtype="float16", layout="example/1")
    with kvtier.connect(socket) as client, client.attach(model, pool, shard=Shard(0, 1, 0, 2)) as worker:
        receipt = worker.park("chat-42", range(TOKENS), range(shape[0])).result()
        print(f"parked {receipt.tokens} tokens of chat-42 on machine-0 ({receipt.level})")


def ask(handle: DeploymentHandle, session: str) -> Counter[str]:
    """Several turns of one chat; how many each replica had."""
    chat = handle.options(session_id=session)
    return Counter(chat.remote().result() for _ in range(TURNS))


def main() -> int:
    """0 when all turns of chat-42 went to its machine."""
    daemon = Embedded({"node.name": "machine-0"})
    daemon.start()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _temp_dir=folder,
        )
        try:
            park(daemon.socket_path)
            deployment = serve.deployment(
                num_replicas=2,
                ray_actor_options={"num_cpus": 0.1},
                request_router_config=sticky(socket=daemon.socket_path, deadline_s=1.0),
            )(Chat)
            handle = serve.run(deployment.bind(), route_prefix=None)
            parked, unknown = ask(handle, "chat-42"), ask(handle, "chat-43")
            print(f"{TURNS} turns of chat-42, which is parked: {dict(parked)}")
            print(f"{TURNS} turns of chat-43, which is not: {dict(sorted(unknown.items()))}")
            serve.shutdown()
        finally:
            ray.shutdown()
            daemon.close()
    return 0 if parked == {"machine-0": TURNS} and sum(unknown.values()) == TURNS else 1


if __name__ == "__main__":
    raise SystemExit(main())
