"""A chat with a transformers model whose KV outlives the process: greedy decoding, batch size 1."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from transformers import DynamicCache

from kvtier.arguments import DEFAULT_TENANT
from kvtier.client.handles import ParkHandle
from kvtier.errors import TokensError
from kvtier.receipts import RestoreReceipt

if TYPE_CHECKING:
    from kvtier.integrations.transformers import TransformersKV

ParkLevel: TypeAlias = Literal["host", "disk"]
Share: TypeAlias = Literal["prefix", "conversation"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What one turn gave.

    tokens: the new ones, a stop token included.  prompt_tokens: length of the sequence that they continue;
    of it cached_tokens were in this process, restored_tokens came from kvtier, the rest was computed.
    ttft_s: from the call to the first new token, a restore included.  logits: [new tokens, vocab] in the
    model's dtype, on the CPU, from which each token was chosen; None where not asked for.  restore, park:
    what kvtier answered; None where it was not asked.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    restored_tokens: int
    ttft_s: float
    logits: torch.Tensor | None = None
    restore: RestoreReceipt | None = None
    park: ParkHandle | None = None


class ChatSession:
    """One conversation with one model.

    kv: from `attach`; None runs without kvtier.  encode, decode: text to token ids and back; a chat template
    belongs into encode.  stop_tokens: ids that end a turn.  tokens: the ids so far of a conversation that
    goes on in a new process: kvtier keeps KV under digests of tokens, the transcript is the caller's to
    keep.  park_after_turn: park in the background after each turn; else only when `park` is called.
    deadline_s: after which a restore gives way to computing.  Not for several threads at once.
    """

    def __init__(
        self,
        kv: TransformersKV | None,
        model: Any,
        conversation: str,
        *,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        stop_tokens: Collection[int] = (),
        tokens: Sequence[int] = (),
        tenant: str = DEFAULT_TENANT,
        level: ParkLevel = "host",
        share: Share = "prefix",
        park_after_turn: bool = True,
        deadline_s: float = 30.0,
    ) -> None:
        self.kv = kv
        self.model = model
        self.conversation = conversation
        self.tokens = [int(token) for token in tokens]
        self.cache: DynamicCache | None = None
        self._encode = encode
        self._decode = decode
        self._stop = frozenset(stop_tokens)
        self._tenant = tenant
        self._level: ParkLevel = level
        self._share: Share = share
        self._park_after_turn = park_after_turn
        self._deadline_s = deadline_s
        # Logits of a whole prompt can be larger than its KV.
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward_options = {"logits_to_keep": 1} if last_only else {}

    def send(
        self, message: str | Sequence[int], max_new_tokens: int, *, capture_logits: bool = False
    ) -> Reply:
        """Add a message, text or token ids, and decode greedily until a stop token or max_new_tokens.

        Where this process has no KV of the conversation, its stored front is restored, as far as the node
        finds that worth it, and the rest computed, in one chunk.  How long computing took is told to the
        node, which decides by that.  Raises TokensError when there is nothing to feed or nothing to decode;
        an error on the way leaves the session as it was, with its KV dropped.
        """
        began_s = time.perf_counter()
        new = self._encode(message) if isinstance(message, str) else message
        sequence = [*self.tokens, *(int(token) for token in new)]
        if not sequence or max_new_tokens < 1:
            raise TokensError(f"{len(sequence)} tokens to continue, {max_new_tokens} to decode")
        cached, cache, receipt = self._front(sequence)
        start = cache.get_seq_length()
        if start >= len(sequence):
            raise TokensError("the message has no tokens and nothing is left to feed")
        self.cache = None
        tokens, rows, ttft_s = self._decode_turn(sequence, cache, max_new_tokens, capture_logits, began_s)
        self.tokens, self.cache = [*sequence, *tokens], cache
        park = self.park() if self.kv is not None and self._park_after_turn else None
        return Reply(
            text=self._decode(tokens),
            tokens=tuple(tokens),
            prompt_tokens=len(sequence),
            cached_tokens=cached,
            restored_tokens=start - cached,
            ttft_s=ttft_s,
            logits=torch.stack(rows) if rows else None,
            restore=receipt,
            park=park,
        )

    def park(self, level: ParkLevel | None = None) -> ParkHandle:
        """Park the KV that this process holds; the handle's `result()` waits for the level.

        Raises TokensError when there is none, or the session has no kvtier.
        """
        if self.kv is None or self.cache is None:
            raise TokensError("there is no KV to park", fix="call send() first, and give the session a kv")
        return self.kv.park(
            self.conversation,
            self.tokens,
            self.cache,
            tenant=self._tenant,
            level=level or self._level,
            share=self._share,
        )

    def drop(self) -> None:
        """Let go of the KV in this process; the next turn restores it."""
        self.cache = None

    def _front(self, sequence: Sequence[int]) -> tuple[int, DynamicCache, RestoreReceipt | None]:
        """(tokens cached here, the cache to go on from, what the restore answered)."""
        if self.cache is not None:
            return self.cache.get_seq_length(), self.cache, None
        # A new conversation that promises to share nothing must not begin with what others computed.
        if self.kv is None or (self._share == "conversation" and not self.tokens):
            return 0, DynamicCache(config=self.model.config), None
        restored = self.kv.restore(
            self.conversation, sequence, tenant=self._tenant, deadline_s=self._deadline_s
        )
        return 0, restored.cache, restored.receipt

    def _decode_turn(
        self, sequence: Sequence[int], cache: DynamicCache, count: int, capture: bool, began_s: float
    ) -> tuple[list[int], list[torch.Tensor], float]:
        """(new tokens, their logits if captured, time to the first of them)."""
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        ttft_s = 0.0
        past = cache.get_seq_length()
        feed = sequence[past:]
        fed_s = time.perf_counter()
        while True:
            logits = self._forward(feed, cache)
            # Taking the token waits for the device: what follows knows how long it computed.
            tokens.append(int(logits.argmax()))
            if len(tokens) == 1:
                now_s = time.perf_counter()
                ttft_s = now_s - began_s
                if self.kv is not None:
                    self.kv.worker.prefilled(len(feed), now_s - fed_s, past=past)
            if capture:
                rows.append(logits.cpu())
            if len(tokens) == count or tokens[-1] in self._stop:
                return tokens, rows, ttft_s
            feed = tokens[-1:]

    def _forward(self, feed: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Logits [vocab] after the last of these tokens."""
        with torch.inference_mode():
            ids = torch.tensor([feed], dtype=torch.long, device=self.model.device)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._forward_options)
            logits: torch.Tensor = out.logits[0, -1].clone()
            return logits
