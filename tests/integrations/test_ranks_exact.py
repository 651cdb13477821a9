"""A Llama's chat, whose KV two tensor-parallel ranks hold, goes on bit for bit after everything has died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtier.testing.service_processes import ServiceProcesses
from kvtier.testing.small_model import SIZES

RANKS, CHAT, TURN = 2, 70, 9
CONFIG = LlamaConfig(**SIZES | {"num_key_value_heads": 4})


class Engine:
    """The processes of all ranks; killed at the end of a `with`."""

    def __init__(self, path: str, config: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("llama_rank.py")), path, str(config)]
        self._ranks = [
            subprocess.Popen(
                [*command, str(rank), str(RANKS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )
            for rank in range(RANKS)
        ]

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self._ranks:
            rank.kill()
        with ExitStack() as stack:
            for rank in self._ranks:
                stack.enter_context(rank)

    def tell(self, rank: int, order: str, **options: Any) -> None:
        """Have a rank do something."""
        to = self._ranks[rank].stdin
        assert to is not None
        to.write(json.dumps({"do": order, **options}) + "\n")
        to.flush()

    def hear(self, rank: int) -> Any:
        """What came of it."""
        answers = self._ranks[rank].stdout
        assert answers is not None
        line = answers.readline()
        assert line, "the rank has ended"
        return json.loads(line)

    def ask(self, rank: int, order: str, **options: Any) -> Any:
        """Both."""
        self.tell(rank, order, **options)
        return self.hear(rank)


def split(cache: DynamicCache, folder: Path) -> list[str]:
    """Each rank's heads as a file."""
    kv = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in cache.layers])
    files = [str(folder / f"parked{rank}.npy") for rank in range(RANKS)]
    for file, part in zip(files, np.split(kv, RANKS, axis=2), strict=True):
        np.save(file, part)
    return files


def joined(model: Any, files: list[str]) -> DynamicCache:
    """The cache that these parts make."""
    kv = torch.from_numpy(np.concatenate([np.load(file) for file in files], axis=2))
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys[None].contiguous(), values[None].contiguous(), layer)
    return cache


@torch.no_grad()
def test_the_next_turn_has_the_bits_of_the_uninterrupted_run(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model: Any = LlamaForCausalLM(CONFIG).eval()
    tokens = torch.randint(0, 97, (1, CHAT + TURN))
    config = tmp_path / "config.json"
    config.write_text(CONFIG.to_json_string(use_diff=False))
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :CHAT], past_key_values=cache)
    files = split(cache, tmp_path)
    told = tokens[0].tolist()

    with ServiceProcesses(tmp_path / "node", {"policy.restore": "load"}) as services:
        with Engine(services.socket_path, config) as engine:
            for rank, file in enumerate(files):
                engine.tell(rank, "park", conversation="chat", tokens=told[:CHAT], file=file)
            for rank in range(RANKS):
                assert engine.hear(rank) == {"level": "disk", "tokens": CHAT, "reason": ""}
        services.kill_all()
        services.start_all()
        with Engine(services.socket_path, config) as engine:
            # Every rank has attached once it answers.
            assert engine.ask(1, "join", plan_id="of nobody") == ""
            plan_id = engine.ask(0, "make_plan", conversation="chat", tokens=told[:-1])
            assert engine.ask(1, "join", plan_id=plan_id) == plan_id
            files = [str(tmp_path / f"restored{rank}.npy") for rank in range(RANKS)]
            for rank, file in enumerate(files):
                engine.tell(rank, "restore", file=file)
            assert [engine.hear(rank) for rank in range(RANKS)] == [CHAT] * RANKS

    uninterrupted = model(input_ids=tokens[:, CHAT:], past_key_values=cache).logits
    restored = model(input_ids=tokens[:, CHAT:], past_key_values=joined(model, files)).logits
    assert torch.equal(uninterrupted.view(torch.int32), restored.view(torch.int32))
    # And not because the cache does not matter.
    halves = [files[0], files[0]]
    wrong = model(input_ids=tokens[:, CHAT:], past_key_values=joined(model, halves)).logits
    assert not torch.equal(uninterrupted.view(torch.int32), wrong.view(torch.int32))
