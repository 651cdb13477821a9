"""What a token costs: bytes to keep it, seconds to compute it again."""

from __future__ import annotations

from typing import Protocol

from kvtier.model.config_json import load_config
from kvtier.model.spec import ModelSpec
from kvtier.policy.recompute import ComputeSpec
from kvtier.sim.cluster.models import MODELS
from kvtier.sim.cluster.scenario import Model, Worker


class ServingCost(Protocol):
    """Of one worker. token_bytes: KV of a token, over all its GPUs."""

    @property
    def token_bytes(self) -> float: ...

    def seconds(self, past: int, new: int) -> float:
        """Seconds in which a worker computes `new` tokens after `past` that it has."""


class FlopsCost:
    """Seconds are operations over an achieved rate, and a start. See kvtier.policy.recompute."""

    def __init__(self, model: Model, worker: Worker) -> None:
        config, _ = load_config(model.config or MODELS[model.name])
        self._spec = ComputeSpec.from_config(config)
        self._flops_per_s = worker.flops_per_s * worker.gpus
        self._start_s = worker.prefill_start_s
        kept = ModelSpec.from_config(config, kv_dtype=model.kv_dtype or None)
        self._token_bytes = float(kept.bytes_per_token)

    @property
    def token_bytes(self) -> float:
        """See ServingCost."""
        return self._token_bytes

    def seconds(self, past: int, new: int) -> float:
        """See ServingCost."""
        return self._start_s + self._spec.flops(past, new) / self._flops_per_s if new else 0.0
