"""The conversations that the demo holds, and their tokens. No torch here."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

Share = Literal["prefix", "conversation"]

VOCABULARY = 1536
TOKENIZER_FILE = "tokenizer.json"
STOP_TOKEN = "<|end|>"


@dataclass(frozen=True, slots=True)
class Conversation:
    """One person's messages, in order. name: of the file's `id`; share: how its KV is parked."""

    name: str
    title: str
    language: str
    share: Share
    messages: tuple[str, ...]


def load_conversations() -> tuple[Conversation, ...]:
    """All that are shipped, in the order of their files."""
    folder = resources.files(__package__).joinpath("conversations")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return tuple(_conversation(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files)


def system_prompt() -> str:
    """What every conversation begins with."""
    folder = resources.files(__package__).joinpath("conversations")
    return folder.joinpath("system.txt").read_text(encoding="utf-8")


def _conversation(data: dict[str, Any]) -> Conversation:
    messages = tuple(turn["text"].strip() for turn in data["turn"])
    return Conversation(data["id"], data["title"], data["language"], data["share"], messages)


class Tokenizer:
    """Byte-level BPE: any text has tokens, and they give the text back."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Implementation  # comes with transformers, which is an extra

        self._tokenizer = Implementation.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        text: str = self._tokenizer.decode(list(tokens))
        return text

    def first_message(self, text: str) -> list[int]:
        """Ids of the system prompt and the first message, as they are fed to the model."""
        return self.encode(f"{system_prompt()}\n\nVisitor: {text}\n\nDesk:")

    def next_message(self, text: str) -> list[int]:
        """Ids of a later message; the one before it ends with the model's own words."""
        return self.encode(f"\n\nVisitor: {text}\n\nDesk:")


def train_tokenizer(path: Path) -> int:
    """Make a tokenizer out of the shipped texts; answers its vocabulary's size."""
    from tokenizers import Tokenizer as Implementation
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Implementation(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[STOP_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message for conversation in load_conversations() for message in conversation.messages]
    tokenizer.train_from_iterator([system_prompt(), *texts], trainer)
    tokenizer.save(str(path))
    size: int = tokenizer.get_vocab_size()
    return size
