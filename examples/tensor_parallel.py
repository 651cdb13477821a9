"""Two tensor-parallel ranks park one chat, end, start again, and restore it: one level, one plan, one length.

    python examples/tensor_parallel.py

Each rank is a process of its own with half of the heads, its own pool and its own page ids.  Its "prefill"
writes rows that say whose they are: of which token and which head.  What an engine's scheduler tells its
ranks goes over their standard input here.  The daemon runs inside the first process; where a node has one,
the ranks say `kvtier.connect()`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import numpy as np

import kvtier
from kvtier import Fingerprint, Shard, Shards
from kvtier.client.worker_inputs import WorkerPlan
from kvtier.gpu.describe import paged
from kvtier.gpu.pool import Pool

PAGE_TOKENS, BLOCK_TOKENS, PAGES, LAYERS, HEADS, DIM = 16, 64, 64, 2, 4, 32
TOKENS = list(range(1000, 1300))
RANKS = Shards((Shard(0, LAYERS, 0, 2), Shard(0, LAYERS, 2, 2)))
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


class Rank:
    """Pages of this rank's heads, and a worker attached with its fellow."""

    def __init__(self, socket_path: str, number: int) -> None:
        self.shard = RANKS[number]
        shape = (PAGES, PAGE_TOKENS, self.shard.heads, DIM)
        self.planes = [np.zeros(shape, np.float32) for _ in range(2 * LAYERS)]
        pairs = list(zip(self.planes[0::2], self.planes[1::2], strict=True))
        layout = paged(pairs, "page token head dim", block_tokens=BLOCK_TOKENS)
        model = Fingerprint.of_revision("org/model@1", CONFIG, kv_dtype="float32", layout=layout.layout_id)
        pool = Pool(layout, self.planes)
        self.worker = kvtier.connect(socket_path).attach(model, pool, shard=self.shard, ranks=RANKS)
        needed = -(-len(TOKENS) // PAGE_TOKENS)
        self.pages = random.Random(number).sample(range(PAGES), needed)
        self.plan: WorkerPlan | None = None

    def rows(self) -> Any:
        """[tokens, heads, 1]: what this rank's KV of the chat is."""
        heads = self.shard.first_head + np.arange(self.shard.heads)
        return (np.array(TOKENS)[:, None] * HEADS + heads)[:, :, None]

    def park(self) -> str:
        """Compute the chat, and park it; the pages are free long before the receipt."""
        for plane in self.planes:
            whole = np.zeros((len(self.pages) * PAGE_TOKENS, *plane.shape[2:]), np.float32)
            whole[: len(TOKENS)] = self.rows()
            plane[self.pages] = whole.reshape(-1, *plane.shape[1:])
        park = self.worker.park("chat", TOKENS, self.pages, level="disk")
        park.released.wait()
        receipt = park.result()
        return f"{receipt.level}, {receipt.tokens} tokens"

    def make_plan(self) -> str:
        """One rank plans for all, and has the others told the plan's id."""
        self.plan = self.worker.plan("chat", [*TOKENS, 7])
        return self.plan.plan_id

    def join(self, plan_id: str) -> str:
        """The others take part in it."""
        self.plan = self.worker.join(plan_id)
        return self.plan.plan_id

    def restore(self) -> int:
        """The number of tokens is the same on all ranks; this rank's rows of them have to be right."""
        assert self.plan is not None
        got = self.worker.restore(self.plan, self.pages, deadline_s=10.0)
        for plane in self.planes:
            rows = plane[self.pages].reshape(-1, *plane.shape[2:])[: got.tokens]
            assert (rows == self.rows()[: got.tokens]).all(), "these are not this rank's rows"
        return got.tokens

    def end(self) -> str:
        """Leave the node."""
        self.worker.close()
        return "ended"


class Engine:
    """Starts a process for each rank, and tells them what to do."""

    def __init__(self, socket_path: str) -> None:
        command = [sys.executable, __file__, socket_path]
        self.ranks = [
            subprocess.Popen(
                [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for number in range(len(RANKS))
        ]
        # A rank answers once it has attached.
        self.all("join", "no plan yet")

    def tell(self, number: int, *order: str) -> None:
        """Have one rank do something."""
        to = self.ranks[number].stdin
        assert to is not None
        print(json.dumps(order), file=to, flush=True)

    def hear(self, number: int) -> Any:
        """What came of it."""
        answers = self.ranks[number].stdout
        assert answers is not None
        return json.loads(answers.readline())

    def all(self, *order: str) -> list[Any]:
        """Have all ranks do something at the same time."""
        for number in range(len(RANKS)):
            self.tell(number, *order)
        return [self.hear(number) for number in range(len(RANKS))]

    def end(self) -> None:
        """All ranks detach, and their processes end."""
        self.all("end")
        for rank in self.ranks:
            rank.communicate()


def main() -> int:
    """0 when both ranks have back what they parked."""
    with kvtier.connect("embedded:") as client:
        engine = Engine(str(client.path))
        print("parked:", engine.all("park"))
        engine.end()
        print("the engine has ended, and starts again")
        engine = Engine(str(client.path))
        engine.tell(0, "make_plan")
        plan_id = engine.hear(0)
        engine.tell(1, "join", plan_id)
        assert engine.hear(1) == plan_id
        restored = engine.all("restore")
        print("restored:", restored, "tokens of", len(TOKENS))
        engine.end()
    return 0 if restored == [len(TOKENS)] * len(RANKS) else 1


def be_rank(socket_path: str, number: str) -> int:
    """Carry out what the engine says."""
    rank = Rank(socket_path, int(number))
    for line in sys.stdin:
        order, *options = json.loads(line)
        print(json.dumps(getattr(rank, order)(*options)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(be_rank(*sys.argv[1:]) if len(sys.argv) > 1 else main())
