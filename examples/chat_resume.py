"""Resume a chat with a Hugging Face model in a fresh process, without computing its KV again.

    python examples/chat_resume.py

A small Llama with random weights stands in for yours, and the daemon runs inside this process; where a node
has one, say `kvtier.connect()`.  What the model says is noise; what matters is how few tokens it has to
compute on the second turn, and that its words are the same as if nothing had happened.

A daemon that has heard of a few more prefills of a model this small would rather compute: nothing loads as
soon. With a model of yours it loads what is worth it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier.integrations.transformers import ChatSession, attach

FIRST = "Write a limerick about a lighthouse keeper who counts the ships twice. " * 8
SECOND = "Now one about the ships."


def make_model(folder: str) -> Any:
    """Save a model and load it back: the fingerprint of its weights comes from the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def encode(text: str) -> list[int]:
    """Bytes are tokens here; with a real model this is your tokenizer and its chat template."""
    return list(text.encode())


def decode(tokens: Sequence[int]) -> str:
    """The reverse of `encode`."""
    return bytes(tokens).decode(errors="replace")


def main() -> int:
    """Two turns, with everything of this process forgotten in between; 0 when they were as if not."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder)
        client = kvtier.connect("embedded:")
        with attach(client, model, block_tokens=64) as kv:
            chat = ChatSession(kv, model, "chat-42", encode=encode, decode=decode, share="conversation")
            first = chat.send(FIRST, max_new_tokens=20)
            assert first.park is not None
            receipt = first.park.result()
            print(f"turn 1: computed {first.prompt_tokens} tokens, parked {receipt.tokens} ({receipt.level})")

            # Another process would begin here, with the transcript and the conversation's name.
            later = ChatSession(
                kv, model, "chat-42", encode=encode, decode=decode, share="conversation", tokens=chat.tokens
            )
            second = later.send(SECOND, max_new_tokens=20)
            computed = second.prompt_tokens - second.restored_tokens
            print(f"turn 2: restored {second.restored_tokens} tokens, computed {computed}")
            print(f"first token after {second.ttft_s * 1000:.1f} ms")
        client.close()
    unbroken = ChatSession(None, model, "chat-42", encode=encode, decode=decode)
    unbroken.send(FIRST, max_new_tokens=20)
    same = second.tokens == unbroken.send(SECOND, max_new_tokens=20).tokens
    print("the same words as without the break" if same else "other words than without the break")
    return 0 if same and second.restored_tokens == len(chat.tokens) - 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
