"""KV as a model makes it: a forward pass of a small Llama over the demo's conversations.

The weights are random with a range of 0.08, as in the demo: with the usual 0.02 attention is nearly uniform.
A trained model's KV has other exponents; how small it becomes is to be measured on it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from kvtier.bench.memory import Bytes

LAYERS, HEADS, DIM = 8, 8, 128
BLOCK_TOKENS = 256
_PASS_TOKENS = 1024
_HIDDEN, _MLP = 1024, 2816


def bf16_blocks(tokens: int) -> list[Bytes]:
    """Blocks of 256 tokens, 8 MiB each: [layer, K/V, token, head, dim], a quarter of Llama-3-8B's layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    vocabulary, ids = _text(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=_HIDDEN,
        intermediate_size=_MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    blocks = []
    for start in range(0, len(ids), _PASS_TOKENS):
        part = torch.tensor([ids[start : start + _PASS_TOKENS]])
        with torch.inference_mode():
            cache = model(input_ids=part, use_cache=True, logits_to_keep=1).past_key_values
        pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
        kv = torch.stack(pairs).view(torch.int16).numpy().transpose(0, 1, 3, 2, 4)
        for at in range(0, kv.shape[2] - kv.shape[2] % BLOCK_TOKENS, BLOCK_TOKENS):
            block = np.ascontiguousarray(kv[:, :, at : at + BLOCK_TOKENS])
            blocks.append(block.reshape(-1).view(np.uint8))
    return blocks


def _text(tokens: int) -> tuple[int, list[int]]:
    """The vocabulary's size, and the demo's messages as that many tokens."""
    from kvtier.cli.demo import texts

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / texts.TOKENIZER_FILE
        vocabulary = texts.train_tokenizer(path)
        tokenizer = texts.Tokenizer(path)
        ids: list[int] = []
        for conversation in texts.load_conversations():
            ids += tokenizer.first_message(conversation.messages[0])
            for message in conversation.messages[1:]:
                ids += tokenizer.next_message(message)
    return vocabulary, ids[:tokens]
