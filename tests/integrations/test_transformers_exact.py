"""A restored continuation has the bits of the run that it is promised to equal, and of no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvtier.cli.demo.warm_prefix import WarmPrefixCache
from kvtier.integrations.transformers import ChatSession, Reply, TransformersKV
from kvtier.testing.small_model import PATTERN, SIZES

BLOCK = 16
WINDOW = 24
Attach = Callable[..., TransformersKV]


MODELS: dict[str, Callable[[], Any]] = {
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
    "mistral-sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gemma3-hybrid": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=PATTERN)
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    return MODELS[name]().to(dtype).eval()


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(
        3, SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def session(kv: TransformersKV | None, model: Any, name: str = "chat", **options: Any) -> ChatSession:
    return ChatSession(kv, model, name, encode=lambda text: list(text.encode()), decode=str, **options)


def same_bits(a: Reply, b: Reply) -> bool:
    assert a.logits is not None and b.logits is not None
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.logits.dtype]
    return a.tokens == b.tokens and torch.equal(a.logits.view(width), b.logits.view(width))


def uninterrupted(model: Any, messages: Sequence[Sequence[int]], new_tokens: int) -> list[Reply]:
    chat = session(None, model)
    return [chat.send(message, new_tokens, capture_logits=True) for message in messages]


def resumed(
    kv: TransformersKV, model: Any, messages: Sequence[Sequence[int]], new_tokens: int, share: str
) -> list[Reply]:
    """Each turn in a session of its own, which knows nothing but the transcript."""
    replies: list[Reply] = []
    tokens: list[int] = []
    for message in messages:
        chat = session(kv, model, tokens=tokens, share=share)
        replies.append(chat.send(message, new_tokens, capture_logits=True))
        tokens = chat.tokens
    return replies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_turn_continues_with_the_bits_of_the_uninterrupted_run(
    name: str, dtype: torch.dtype, memory_kv: Attach
) -> None:
    model = build(name, dtype)
    messages = [ids(count, seed) for seed, count in enumerate((5, 9, 20, 70, 1, 33))]
    expected = uninterrupted(model, messages, 4)
    found = resumed(memory_kv(model, BLOCK), model, messages, 4, "conversation")
    assert [same_bits(a, b) for a, b in zip(expected, found, strict=True)] == [True] * len(messages)
    restored = [reply.restored_tokens for reply in found]
    # After each turn all but the last chosen token are stored, however the blocks fall.
    ends = [reply.prompt_tokens + len(reply.tokens) - 1 for reply in found]
    assert restored == [0, *ends[:-1]]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-sliding", "gemma3-hybrid"])
def test_every_length_around_blocks_and_windows(name: str, memory_kv: Attach) -> None:
    model = build(name)
    edges = {1, 2, *(n + d for n in (BLOCK, WINDOW, 2 * BLOCK, 3 * BLOCK, 2 * WINDOW) for d in (-1, 0, 1, 2))}
    kv = memory_kv(model, BLOCK)
    for length in sorted(edges):
        prompt, message = ids(length, 1), ids(3, 2)
        chat = session(kv, model, f"chat-{length}", share="conversation")
        first = chat.send(prompt, 1)
        later = session(kv, model, f"chat-{length}", share="conversation", tokens=chat.tokens)
        found = later.send(message, 3, capture_logits=True)
        expected = chat.send(message, 3, capture_logits=True)
        assert first.restored_tokens == 0
        assert (length, found.restored_tokens, expected.cached_tokens) == (length, length, length)
        assert same_bits(expected, found), length


@pytest.mark.parametrize("name", MODELS)
def test_a_restored_cache_is_the_cache(name: str, memory_kv: Attach) -> None:
    model = build(name)
    kv = memory_kv(model, BLOCK)
    tokens = ids(61, 3)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]), past_key_values=cache)
    kv.park("chat", tokens, cache)
    restored = kv.restore("chat", [*tokens, 7])
    assert restored.tokens == 61 and restored.cache.get_seq_length() == 61
    for before, after in zip(cache.layers, restored.cache.layers, strict=True):
        assert type(before) is type(after)
        assert before.get_seq_length() == after.get_seq_length()
        assert before.get_mask_sizes(5) == after.get_mask_sizes(5)
        assert torch.equal(before.keys, after.keys) and torch.equal(before.values, after.values)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3-hybrid"])
def test_a_flipped_bit_changes_the_continuation_where_nothing_checks(name: str, memory_kv: Attach) -> None:
    model = build(name)
    messages = [ids(40, 1), ids(9, 2)]
    expected = uninterrupted(model, messages, 4)
    kv = memory_kv(model, BLOCK)
    worker: Any = kv.worker
    first = session(kv, model, share="conversation")
    first.send(messages[0], 4)
    # The highest exponent bit of a value in the newest stored block: rows that every next token attends to.
    block = list(worker.blocks.values())[-1]
    block.planes[1].flat[3] ^= 0x40

    worker.verify = False
    unchecked = session(kv, model, share="conversation", tokens=first.tokens, park_after_turn=False)
    wrong = unchecked.send(messages[1], 4, capture_logits=True)
    assert wrong.restored_tokens == 43 and not same_bits(expected[1], wrong)

    worker.verify = True
    checked = session(kv, model, share="conversation", tokens=first.tokens)
    recomputed = checked.send(messages[1], 4, capture_logits=True)
    assert recomputed.restored_tokens < 43
    assert recomputed.restore is not None and recomputed.restore.reason == "corrupt"
    assert recomputed.logits is not None and expected[1].logits is not None
    torch.testing.assert_close(recomputed.logits, expected[1].logits, rtol=1e-3, atol=1e-3)


def test_prefix_sharing_has_the_bits_of_a_warm_hit(memory_kv: Attach) -> None:
    model = build("llama-gqa")
    common, mine = ids(50, 1), [ids(30, 2), ids(8, 3)]
    kv, warm = memory_kv(model, BLOCK), WarmPrefixCache(model.config, BLOCK)

    other = session(kv, model, "other")
    other.send([*common, *ids(25, 9)], 3)
    assert other.cache is not None
    warm.store(other.tokens, other.cache)

    tokens: list[int] = []
    for turn, message in enumerate(([*common, *mine[0]], mine[1])):
        chat = session(kv, model, tokens=tokens)
        found = chat.send(message, 4, capture_logits=True)
        hit = session(None, model, tokens=tokens)
        hit.cache = warm.front([*tokens, *message], found.restored_tokens)
        expected = hit.send(message, 4, capture_logits=True)
        assert found.restored_tokens == (48 if turn == 0 else len(tokens) - 1)
        assert same_bits(expected, found)
        assert hit.cache is not None
        warm.store(hit.tokens, hit.cache)
        tokens = chat.tokens


def test_conversations_that_share_nothing_ignore_what_others_stored(memory_kv: Attach) -> None:
    model = build("llama-gqa")
    kv, message = memory_kv(model, BLOCK), ids(50, 1)
    session(kv, model, "other").send(message, 3)
    found = session(kv, model, "mine", share="conversation").send(message, 3, capture_logits=True)
    assert found.restored_tokens == 0
    assert same_bits(uninterrupted(model, [message], 3)[0], found)
