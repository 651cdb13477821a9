"""The demo's model: a small Llama with random weights, made on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.cli.demo import texts
from kvtier.errors import ConfigError

# 4 layers of 8 KV heads of 64 in float32: 16 KiB for each token, an eighth of Llama-3-8B's in bfloat16.
LAYERS = 4
HEADS = 8
HEAD_DIM = 64
HIDDEN = 256
MLP = 512
MAX_TOKENS = 16384
# With the usual 0.02 attention is nearly uniform, and wrong KV would hardly change a logit.
INITIALIZER_RANGE = 0.08


def make_model(folder: Path, seed: int) -> None:
    """Train the tokenizer and write model and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = texts.train_tokenizer(folder / texts.TOKENIZER_FILE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def device_of(asked: str) -> str:
    """The device for 'auto', which is the same in all processes of a machine; any other as it is.

    Raises ConfigError for one that is not there, and names those that are.
    """
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if asked == "auto":
        return there[min(1, len(there) - 1)]
    if asked not in there:
        raise ConfigError(
            "device",
            f"there is no {asked!r}; torch finds {', '.join(there)}",
            fix="name one of them, or auto",
        )
    return asked


def load_model(folder: Path, threads: int, device: str) -> Any:
    """The model, ready and warm. threads: of torch; bits depend on it, so all processes use the same.

    On a GPU algorithms that give the same bits each time are used, where there are any.
    """
    torch.set_num_threads(threads)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model = model.to(device_of(device))
    if model.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 256, dtype=torch.long, device=model.device))
    return model
