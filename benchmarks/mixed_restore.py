"""Compute the front while the rest is loaded, with a real model on the CPU, against either way alone.

    python -m benchmarks.mixed_restore [--rounds 9] [--tokens 2048]

A small random Llama (float32, transformers, one torch thread) parks a conversation in host memory.  To go
on with it, three ways are taken in turn, round by round: load all; compute all in one call; or both, where
a thread loads blocks from the back while the model computes chunks from the front, and they stop where they
meet.  The loading thread is held to a bandwidth, so that both ways take equally long (break-even), or
loading half, twice or four times as long.  A round's ratio is mixed over the better of the two other ways
in the same round.

Contention: the loading thread mostly waits for its bandwidth, so the model has a core of its own as long as
nothing else runs on the machine.  What is computed again is equal within a tolerance, not bit for bit: a
chunk is another shape of the same sums.  A tail of another conversation is the control that the comparison
must see.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtier.bench.lines import Line
from kvtier.policy.achieved_rate import AchievedRate
from kvtier.policy.devices import DEVICES
from kvtier.policy.load_cost import LoadLine
from kvtier.policy.meeting import Meeting
from kvtier.policy.recompute import ComputeSpec
from kvtier.policy.restore_plan import Question, RestorePlan, plan_restore
from kvtier.policy.runs import Run

BLOCK, TURN = 128, 16
# Bandwidth over the one at which loading and computing take equally long.
SPEEDS = (0.5, 1.0, 2.0, 4.0)
TOLERANCE = 1e-3

Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Result:
    """One restore and the turn after it. computed: tokens of the stored part that were computed."""

    seconds: float
    computed: int
    logits: torch.Tensor


class Engine:
    """The model, a parked conversation (and another one), and three ways to go on with it."""

    @torch.inference_mode()
    def __init__(self, tokens: int) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(1)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=512,
            max_position_embeddings=2 * tokens,
            initializer_range=0.08,
        )
        self.model = LlamaForCausalLM(config).eval()
        self.spec = ComputeSpec.from_config({**config.to_dict(), "torch_dtype": "float32"})
        self.ids = torch.randint(0, config.vocab_size, (1, tokens + TURN))
        self.tokens = tokens
        cache = self.cache()
        self.compute(cache, 0, tokens)
        self.parked = layers_of(cache)
        other = self.cache()
        self.model(self.ids[:, :tokens].flip(1), past_key_values=other, logits_to_keep=1)
        self.another = layers_of(other)
        self.expected = self.compute(cache, tokens, tokens + TURN)

    def cache(self) -> Any:
        """An empty cache of this model."""
        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def compute(self, cache: Any, begin: int, end: int) -> torch.Tensor:
        """Logits of the last token of [begin, end), whose KV goes to the cache."""
        output = self.model(self.ids[:, begin:end], past_key_values=cache, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1].clone()
        return logits

    def load_all(self, seconds: float, parked: Layers) -> Result:
        """Load every block at the bandwidth of so many seconds for all, then compute the turn."""
        begun = time.perf_counter()
        loaded = empty_like(parked)
        blocks = self.tokens // BLOCK
        for index in range(blocks):
            copy_block(parked, loaded, index, begun + seconds * (index + 1) / blocks)
        cache = self.cache()
        fill(cache, loaded)
        logits = self.compute(cache, self.tokens, self.tokens + TURN)
        return Result(time.perf_counter() - begun, 0, logits)

    def compute_all(self) -> Result:
        """Compute the conversation and the turn in one call."""
        begun = time.perf_counter()
        logits = self.compute(self.cache(), 0, self.tokens + TURN)
        return Result(time.perf_counter() - begun, self.tokens, logits)

    def both(self, seconds: float, parked: Layers, rate: AchievedRate) -> Result:
        """Compute chunks from the front while blocks are loaded from the back."""
        begun = time.perf_counter()
        loaded = empty_like(parked)
        blocks = self.tokens // BLOCK
        compute_s = [rate.seconds(index * BLOCK, BLOCK) for index in range(blocks)]
        meeting, lock = Meeting(compute_s, [seconds / blocks] * blocks), threading.Lock()

        def load() -> None:
            due_s = begun
            while True:
                with lock:
                    index = meeting.next_to_load(time.perf_counter())
                if index is None:
                    return
                due_s += seconds / blocks
                copy_block(parked, loaded, index, due_s)
                with lock:
                    meeting.block_loaded(time.perf_counter(), index)

        loader = threading.Thread(target=load)
        loader.start()
        cache = self.cache()
        while True:
            with lock:
                index = meeting.next_to_compute(time.perf_counter())
            if index is None:
                break
            self.compute(cache, index * BLOCK, (index + 1) * BLOCK)
            with lock:
                meeting.block_computed(time.perf_counter(), index)
        loader.join()
        front = meeting.computed * BLOCK
        fill(cache, [(k[:, :, front:], v[:, :, front:]) for k, v in loaded])
        logits = self.compute(cache, self.tokens, self.tokens + TURN)
        return Result(time.perf_counter() - begun, front, logits)


def layers_of(cache: Any) -> Layers:
    """Copies of the keys and values of all layers, [1, KV heads, tokens, head dim]."""
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def empty_like(layers: Layers) -> Layers:
    """Room for as much."""
    return [(torch.empty_like(k), torch.empty_like(v)) for k, v in layers]


def copy_block(source: Layers, target: Layers, index: int, due_s: float) -> None:
    """Copy one block of all layers, and be done no sooner than at `due_s`."""
    at = slice(index * BLOCK, (index + 1) * BLOCK)
    for (k, v), (to_k, to_v) in zip(source, target, strict=True):
        to_k[:, :, at] = k[:, :, at]
        to_v[:, :, at] = v[:, :, at]
    left_s = due_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def fill(cache: Any, tail: Layers) -> None:
    """Put keys and values behind those that the cache has."""
    for index, (k, v) in enumerate(tail):
        cache.update(k, v, index)


def plan(engine: Engine, rate: AchievedRate, load_s: float) -> RestorePlan:
    """What the policy expects of a mixed restore."""
    runs = (Run(0, engine.tokens, BLOCK, (("host", float(engine.tokens)),)),)
    line = LoadLine(0.0, engine.tokens / load_s)
    return plan_restore(runs, Question(engine.tokens + TURN, rate, {"host": line}, takes="both"))


def learned_rate(engine: Engine, rounds: int) -> AchievedRate:
    """What the policy learns from prefills of several lengths."""
    rate = AchievedRate(engine.spec, DEVICES["cpu"])
    for _ in range(rounds):
        for past, new in (
            (0, engine.tokens + TURN),
            (0, BLOCK),
            (engine.tokens // 2, BLOCK),
            (engine.tokens, TURN),
        ):
            cache = engine.cache()
            if past:
                fill(cache, [(k[:, :, :past], v[:, :, :past]) for k, v in engine.parked])
            begun = time.perf_counter()
            engine.compute(cache, past, past + new)
            rate.observed(past, new, time.perf_counter() - begun)
    return rate


def difference(engine: Engine, result: Result) -> float:
    """Largest difference of the turn's logits from the uninterrupted ones, over their range."""
    span = float(engine.expected.max() - engine.expected.min())
    return float((result.logits - engine.expected).abs().max()) / span


def measure(engine: Engine, rate: AchievedRate, speed: float, rounds: int) -> Iterator[Line]:
    """One bandwidth: the median of the rounds' ratios, and what the policy expected."""
    ratios, seconds, fronts, worst = [], [], [], 0.0
    for number in range(rounds + 1):
        compute = engine.compute_all()
        rate.observed(0, engine.tokens + TURN, compute.seconds)
        # Held against this round's computing, since the machine is not equally fast in all of them.
        load_s = compute.seconds / speed
        load = engine.load_all(load_s, engine.parked)
        both = engine.both(load_s, engine.parked, rate)
        worst = max(worst, *(difference(engine, result) for result in (load, compute, both)))
        # The first round warms up.
        if number:
            ratios.append(both.seconds / min(load.seconds, compute.seconds))
            seconds.append((load.seconds, compute.seconds, both.seconds))
            fronts.append(both.computed)
    expected = plan(engine, rate, statistics.median(row[1] for row in seconds) / speed)
    medians = [round(statistics.median(column), 4) for column in zip(*seconds, strict=True)]
    detail: dict[str, Any] = dict(zip(("load_s", "compute_s", "mixed_s"), medians, strict=True))
    detail |= {
        "ratios": [round(ratio, 3) for ratio in ratios],
        "computed_tokens": int(statistics.median(fronts)),
        "planned_tokens": expected.compute_front,
        "planned_s": round(expected.ttft_s, 4),
    }
    limit = 1 / 1.3 if speed == 1 else 1.1
    name = f"mixed over the better single way, loading at {speed:g} x break-even"
    yield Line(name, round(statistics.median(ratios), 3), "ratio", round(limit, 3), None, detail)
    yield Line(f"difference of logits at {speed:g} x", worst, "share of range", TOLERANCE)


def control(engine: Engine, rate: AchievedRate) -> Line:
    """The same with the tail of another conversation: far outside the tolerance, or nothing was compared."""
    wrong = engine.both(0.05, engine.another, rate)
    return Line("difference of logits with a wrong tail", difference(engine, wrong), "share of range")


def run(tokens: int, rounds: int, speeds: Sequence[float] = SPEEDS) -> Iterator[Line]:
    """All lines."""
    engine = Engine(tokens)
    rate = learned_rate(engine, 4)
    yield Line("achieved rate", round(rate.flops_per_s / 1e9, 1), "GFLOP/s")
    for speed in speeds:
        yield from measure(engine, rate, speed, rounds)
    yield control(engine, rate)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for line in run(options.tokens // BLOCK * BLOCK, options.rounds):
        print(line.json(), flush=True)


if __name__ == "__main__":
    main()
