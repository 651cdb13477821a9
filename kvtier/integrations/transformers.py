"""Park and restore the KV cache of Hugging Face transformers models between chat turns.

    kv = attach(kvtier.connect(), model)
    handle = kv.park("chat-42", token_ids, cache, level="disk")
    cache, tokens, receipt = kv.restore("chat-42", token_ids)       # also in another process
    model(input_ids=token_ids[tokens:], past_key_values=cache)

What is promised, and against which run it has to be measured.  Computing KV again is not bit-identical: a
matrix product over 900 rows rounds otherwise than one over 100 rows, so bits depend on the chunks in which
tokens were fed.  A promise about bits is therefore one about runs that feed the same chunks:

- share="conversation": the continuation has the bits of the uninterrupted run, in which the process lived on
  and kept its cache.  After a turn the cache holds all tokens but the last one, which was chosen and not
  fed.  All of these are parked, the tail included, so the next turn feeds the same chunk (that last token and
  the new message) after the same KV, whether the cache was kept or restored.
- share="prefix": the continuation has the bits of a warm prefix hit, as an engine with its own prefix cache
  gives it: blocks that another conversation stored before have that one's bits, which it may have computed in
  other chunks.  The reference is a run which keeps, for each block, the tensors of whoever stored it first,
  begins each turn with as many tokens from there as the restore gave, and computes the rest in one chunk.

Both speak of what is restored, and how much that is the node decides: with `policy.restore = "cost"`, the
default, it may find computing sooner than loading, and all that was not restored is computed in one chunk, as
after a miss.  Who needs the bits of the uninterrupted run on every turn has it load all that is stored, with
`policy.restore = "load"`.

A restored cache never covers the whole sequence: the model needs at least one token to answer with logits, so
`restore` asks for all tokens but the last.  Fronts end where a block or a recorded tail ends, since only
there the keys match, and where the window of every sliding layer is stored.  A restored cache is therefore
never cut inside a block, but for the rows of a sliding layer from before its window.

Ranks of a tensor-parallel model hold some heads of each layer.  Each, a process, attaches with its slice:

    ranks = Shards.of(ModelSpec.from_config(folder), tp=2)
    kv = attach(kvtier.connect(), model, shard=ranks[rank], ranks=ranks)
    kv.park("chat-42", token_ids, cache)            # on each rank
    plan = kv.plan("chat-42", token_ids)            # on one, which tells the others plan.plan_id
    plan = kv.join(plan_id)                         # on each of the others
    cache, tokens, receipt = kv.load(plan)          # on each: tokens is the same
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from kvtier.arguments import DEFAULT_TENANT
from kvtier.client.handles import ParkHandle
from kvtier.client.shards import Shards
from kvtier.client.worker_inputs import WorkerPlan
from kvtier.errors import FingerprintError, TokensError
from kvtier.geometry import EXACT
from kvtier.gpu.places import place_of
from kvtier.integrations.chat_session import ChatSession, ParkLevel, Reply, Share
from kvtier.integrations.dynamic_cache import CacheShape, cache_shape
from kvtier.model.fingerprint import Fingerprint
from kvtier.objects import Shard
from kvtier.receipts import RestoreReceipt

if TYPE_CHECKING:
    from kvtier.client.client import Client
    from kvtier.client.worker import Worker

__all__ = ["ChatSession", "Reply", "Restored", "TransformersKV", "attach"]

DEFAULT_BLOCK_TOKENS = 256


class Restored(NamedTuple):
    """cache: holds exactly the first `tokens` of the ids that were asked for; 0 is an empty one."""

    cache: DynamicCache
    tokens: int
    receipt: RestoreReceipt


class TransformersKV:
    """Parks and restores the caches of one model. From `attach`. Calls are safe from any thread."""

    def __init__(self, worker: Worker, shape: CacheShape) -> None:
        self.worker = worker
        self.shape = shape

    def park(
        self,
        conversation: str,
        token_ids: Sequence[int],
        cache: DynamicCache,
        *,
        tenant: str = DEFAULT_TENANT,
        level: ParkLevel = "host",
        share: Share = "prefix",
        fidelity: str = EXACT,
        codec: str = "",
        returns_in_s: float | None = None,
        keep_for_s: float | None = None,
    ) -> ParkHandle:
        """Begin to park what the cache holds; its tensors are read until the handle says released.

        token_ids: the sequence from the first token on.  It may be longer than the cache, as it is by one
        after `generate`; what the cache does not hold is not parked.  The model may go on with the cache at
        once: it puts new tensors in the place of these and writes into none of them.  fidelity, codec: see
        `Worker.park`.  Raises GeometryError
        for caches that are not plain (static, quantized, offloaded, batched), TokensError.
        """
        tokens, binding = self.shape.export(cache, len(token_ids))
        return self.worker.park(
            conversation,
            token_ids[:tokens],
            binding,
            tenant=tenant,
            level=level,
            share=share,
            fidelity=fidelity,
            codec=codec,
            returns_in_s=returns_in_s,
            keep_for_s=keep_for_s,
        )

    def restore(
        self,
        conversation: str,
        token_ids: Sequence[int],
        *,
        tenant: str = DEFAULT_TENANT,
        fidelity: str = EXACT,
        deadline_s: float = 30.0,
        waiting: int = 0,
        prefill_wait_s: float = 0.0,
    ) -> Restored:
        """A cache with as long a front of token_ids as is stored, but never all of them.

        token_ids: the whole sequence to go on from, new message included.  Compute token_ids[tokens:] next.
        fidelity: that it was parked at.  waiting, prefill_wait_s: of the caller's own queue of prefills, see
        `Worker.plan`.
        A miss is an empty cache and the reason in the receipt; 'recompute' where the node expects computing
        to be sooner than loading.  Raises TokensError for an empty list.
        """
        if len(token_ids) == 1:
            return self._miss(RestoreReceipt(conversation, tenant, 0, 0, reason="no_match"))
        plan = self.plan(
            conversation,
            token_ids,
            tenant=tenant,
            fidelity=fidelity,
            deadline_s=deadline_s,
            waiting=waiting,
            prefill_wait_s=prefill_wait_s,
        )
        return self.load(plan, deadline_s=deadline_s)

    def plan(
        self,
        conversation: str,
        token_ids: Sequence[int],
        *,
        tenant: str = DEFAULT_TENANT,
        fidelity: str = EXACT,
        deadline_s: float = 30.0,
        waiting: int = 0,
        prefill_wait_s: float = 0.0,
    ) -> WorkerPlan:
        """What `restore` would load, for `load`; on one of several ranks, for all of them. See `restore`."""
        if len(token_ids) == 0:
            raise TokensError("there are no tokens to restore", fix="give the whole sequence")
        # Computing goes on behind a loaded front. It never fills one in: a cache grows at its end alone.
        return self.worker.plan(
            conversation,
            token_ids[:-1],
            tenant=tenant,
            fidelity=fidelity,
            deadline_s=deadline_s,
            takes="fronts",
            waiting=waiting,
            prefill_wait_s=prefill_wait_s,
        )

    def join(self, plan_id: str) -> WorkerPlan:
        """The plan that another rank made for all. plan_id: of it; '' where it loads nothing."""
        if plan_id:
            return self.worker.join(plan_id)
        return WorkerPlan("", "", "", 0, (), reason="no_match", detail="there is nothing to load")

    def load(self, plan: WorkerPlan, *, deadline_s: float = 30.0) -> Restored:
        """Carry out a plan of this rank, or one that it has joined: the cache of this rank's slice."""
        if plan.load_tokens == 0:
            return self._miss(
                RestoreReceipt(plan.conversation, plan.tenant, 0, 0, reason=plan.reason, detail=plan.detail)
            )
        staged = self.shape.stage(plan.load_tokens)
        receipt = self.worker.restore(plan, staged.binding, deadline_s=deadline_s)
        if not self.shape.restorable(staged, receipt.tokens):
            return self._miss(receipt)
        return Restored(self.shape.assemble(staged, receipt.tokens), receipt.tokens, receipt)

    def close(self) -> None:
        """Detach from the daemon; parks on their way get a few seconds to let go of their tensors."""
        self.worker.close()

    def __enter__(self) -> TransformersKV:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _miss(self, receipt: RestoreReceipt) -> Restored:
        return Restored(DynamicCache(config=self.shape.config), 0, receipt)


def attach(
    client: Client,
    model: Any,
    *,
    fingerprint: Fingerprint | None = None,
    shard: Shard | None = None,
    ranks: Shards | None = None,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
    config: Mapping[str, Any] | str | Path | None = None,
    device: str | None = None,
    devices: int = 1,
) -> TransformersKV:
    """Show a transformers model's cache to the node.

    fingerprint: of its weights; by default that of the local folder that it was loaded from.  shard: the
    slice that this process holds, by default all of it; ranks: those of all ranks that serve the model
    together.  block_tokens: what is keyed and moved as one; other workers of this model share blocks only of
    the same size.

    config: from which the node reads what computing a token costs, to weigh loading against computing; by
    default the model's own; {} shows none, and then all that is stored is loaded.  device: what computes, as
    its driver calls it ('NVIDIA H100 80GB HBM3', or 'cpu'), for a first guess of how fast; None lets the node
    learn it from the prefills that are told, by ChatSession or with `kv.worker.prefilled`.  devices: that
    compute together.

    Raises FingerprintError for a model that came from elsewhere, GeometryError for one whose cache is not
    full or sliding attention, ModelSpecError.
    """
    shape = cache_shape(model, block_tokens, shard)
    identity = fingerprint or model_fingerprint(model, shape)
    whole = shape.spec.whole_shard()
    worker = client.attach(
        identity,
        shape.layout,
        shard=shard or whole,
        ranks=ranks,
        config=model_config(model) if config is None else config,
        device=device or "",
        devices=devices,
        make_engine=place_of(_location(shape)),
    )
    return TransformersKV(worker, shape)


def _location(shape: CacheShape) -> str:
    """Where the model's cache is, as pools name it; 'cuda' alone is torch's current device."""
    if shape.device.type == "cpu":
        return "cpu"
    index = torch.cuda.current_device() if shape.device.index is None else shape.device.index
    return f"{shape.device.type}:{index}"


def model_config(model: Any) -> dict[str, Any]:
    """What a config.json of the model's text part holds."""
    text = model.config.get_text_config(decoder=True).to_json_string(use_diff=False)
    config: dict[str, Any] = json.loads(text)
    return config


def model_fingerprint(model: Any, shape: CacheShape) -> Fingerprint:
    """The fingerprint of a model that was loaded from a local folder. Raises FingerprintError."""
    folder = Path(model.name_or_path) if model.name_or_path else None
    if folder is None or not folder.is_dir():
        raise FingerprintError(
            f"the model was not loaded from a folder, but from {model.name_or_path!r}",
            fix="pass fingerprint=Fingerprint.of_revision('org/model@<commit>', config, ...)",
        )
    dtype = str(shape.dtype).removeprefix("torch.")
    return Fingerprint.of_directory(folder, kv_dtype=dtype, layout=shape.layout.layout_id)
