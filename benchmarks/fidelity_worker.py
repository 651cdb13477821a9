"""A serving process of benchmarks/fidelity.py: restores as requests come, one prefill after the other.

Reads requests as JSON lines from standard input ({"turn", "conversation", "tokens", "outputs"}) and writes
one line for each; a line "ready" comes before.  The model is a random Llama on one thread.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier.integrations.dynamic_cache import cache_shape
from kvtier.integrations.transformers import Restored, TransformersKV, attach, model_config
from kvtier.model.fingerprint import Fingerprint

BLOCK_TOKENS = 64
CONFIG = {
    "hidden_size": 384,
    "intermediate_size": 1056,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}
_LANES = 4
_DEADLINE_S = 30.0


class Server:
    """Requests wait for their KV side by side, and then for the one thread that computes."""

    def __init__(self, kv: TransformersKV, model: Any, level: Any) -> None:
        self._kv, self._model, self._level = kv, model, level
        self._ready: queue.Queue[tuple[dict[str, Any], float, Restored] | None] = queue.Queue()
        self._lanes = ThreadPoolExecutor(_LANES)
        self._computing = threading.Thread(target=self._compute)
        self._computing.start()
        self._busy_until_s = 0.0
        self._expected_s = 0.1

    def take(self, request: dict[str, Any], arrived_s: float) -> None:
        """A request has come."""
        self._lanes.submit(self._restore, request, arrived_s)

    def close(self) -> None:
        """Serve what came, then end."""
        self._lanes.shutdown()
        self._ready.put(None)
        self._computing.join()

    def _restore(self, request: dict[str, Any], arrived_s: float) -> None:
        waiting = self._ready.qsize()
        found = self._kv.restore(
            request["conversation"],
            request["tokens"],
            deadline_s=_DEADLINE_S,
            waiting=waiting,
            prefill_wait_s=max(self._busy_until_s - arrived_s, 0.0) + waiting * self._expected_s,
        )
        self._ready.put((request, arrived_s, found))

    def _compute(self) -> None:
        while (item := self._ready.get()) is not None:
            print(json.dumps(self._serve(*item)), flush=True)

    def _serve(self, request: dict[str, Any], arrived_s: float, found: Restored) -> dict[str, Any]:
        begun_s = time.perf_counter()
        self._busy_until_s = begun_s + self._expected_s
        sequence, feed = list(request["tokens"]), request["tokens"][found.tokens :]
        chosen = self._forward(feed, found.cache)
        first_s = time.perf_counter()
        self._expected_s += 0.2 * (first_s - begun_s - self._expected_s)
        self._kv.worker.prefilled(len(feed), first_s - begun_s, past=found.tokens)
        outputs = [chosen]
        while len(outputs) < request["outputs"]:
            outputs.append(self._forward(outputs[-1:], found.cache))
        sequence += outputs
        self._kv.park(request["conversation"], sequence, found.cache, level=self._level)
        return {
            "turn": request["turn"],
            "ttft_s": first_s - arrived_s,
            "restored": found.tokens,
            "sources": found.receipt.sources,
            "computed": len(feed),
            "prefill_s": first_s - begun_s,
            # What is parked has to be gathered before the next prefill.
            "token_s": (time.perf_counter() - first_s) / max(len(outputs) - 1, 1),
            "outputs": outputs,
        }

    def _forward(self, feed: list[int], cache: Any) -> int:
        with torch.inference_mode():
            ids = torch.tensor([feed], dtype=torch.long)
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())


def make_model() -> Any:
    """The same weights each time."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def warm_up(model: Any) -> None:
    """First calls are slower."""
    with torch.inference_mode():
        for length in (64, 700, 64):
            model(input_ids=torch.ones((1, length), dtype=torch.long), logits_to_keep=1)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("socket")
    parser.add_argument("--level", default="host")
    options = parser.parse_args()
    model = make_model()
    warm_up(model)
    shape = cache_shape(model, BLOCK_TOKENS)
    config = model_config(model)
    identity = Fingerprint.of_revision(
        "fidelity@1", config, kv_dtype="float32", layout=shape.layout.layout_id
    )
    with kvtier.connect(options.socket) as client:
        kv = attach(client, model, fingerprint=identity, block_tokens=BLOCK_TOKENS, device="cpu")
        with kv:
            server = Server(kv, model, options.level)
            print("ready", flush=True)
            for line in sys.stdin:
                server.take(json.loads(line), time.perf_counter())
            server.close()


if __name__ == "__main__":
    main()
