"""The node weighs loading against computing by what the integration shows it: a config, and its prefills."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier import Client, Fingerprint
from kvtier.daemon import embedded
from kvtier.errors import GeometryError, ModelSpecError
from kvtier.integrations import chat_session
from kvtier.integrations.transformers import ChatSession, Reply, TransformersKV, attach, model_config
from kvtier.testing.node_bench import until

BLOCK = 16
DEVICE = "NVIDIA H100 80GB HBM3"
FIRST, SECOND = list(range(3, 63)), list(range(10, 15))
# The node believes the prefills of a device that it does not know from the eighth on.
PREFILLS = 12
IDENTITY = Fingerprint(b"f" * 32, "test")
# A model whose tokens cost enough that a slow prefill cannot be what every call costs.
LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


class Clock:
    """What the session reads instead of the clock: only the model takes time, so much for each token."""

    def __init__(self, token_s: float) -> None:
        self.now_s = 100.0
        self.token_s = token_s

    def perf_counter(self) -> float:
        return self.now_s

    def computed(self, model: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        self.now_s += self.token_s * kwargs["input_ids"].shape[1]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def clock(model: Any, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(0.25)
    model.register_forward_hook(made.computed, with_kwargs=True)
    monkeypatch.setattr(chat_session, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """Of a daemon that decides by cost."""
    settings = {
        "node.state_dir": str(tmp_path / "state"),
        "host.capacity_bytes": 16 << 20,
        "host.headroom_bytes": 0,
        "disk.enabled": False,
        "policy.restore": "cost",
    }
    with ExitStack() as stack:
        daemon = stack.enter_context(closing(embedded.start(**settings)))
        yield stack.enter_context(closing(kvtier.connect(daemon.socket_path)))


@contextmanager
def attached(client: Client, model: Any, **shown: Any) -> Iterator[TransformersKV]:
    with attach(client, model, fingerprint=IDENTITY, block_tokens=BLOCK, **shown) as kv:
        yield kv


def session(kv: TransformersKV | None, model: Any, name: str = "chat", **options: Any) -> ChatSession:
    options.setdefault("share", "conversation")
    return ChatSession(kv, model, name, encode=lambda text: list(text.encode()), decode=str, **options)


def learn_prefills(kv: TransformersKV, model: Any, client: Client) -> None:
    """As many chats of others as it takes."""
    for number in range(PREFILLS):
        session(kv, model, f"other-{number}", park_after_turn=False).send(FIRST[: 8 + 4 * number], 2)
    until(lambda: client.status().counters["eta.prefills"] >= PREFILLS, "the prefills are known")


def resumed(kv: TransformersKV, model: Any) -> tuple[Reply, int]:
    """(the second turn of a chat, after this process forgot it, and the tokens that were parked of it)."""
    chat = session(kv, model)
    first = chat.send(FIRST, 3)
    assert first.park is not None and first.park.result(30).ok
    reply = session(kv, model, tokens=chat.tokens).send(SECOND, 3)
    assert reply.prompt_tokens == len(chat.tokens) + len(SECOND)
    return reply, len(chat.tokens) - 1


# --- the sides of the scales --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_s", "config", "way"),
    [(1.0, LARGE, "load"), (1e-9, LARGE, "recompute"), (1e-9, None, "recompute")],
    ids=["slow", "fast", "fast-own-config"],
)
def test_slow_prefills_have_it_loaded_and_fast_ones_computed_again(
    token_s: float, config: dict[str, Any] | None, way: str, model: Any, clock: Clock, client: Client
) -> None:
    clock.token_s = token_s
    with attached(client, model, config=config) as kv:
        learn_prefills(kv, model, client)
        reply, parked = resumed(kv, model)
    assert reply.restore is not None
    found = (reply.restored_tokens, reply.restore.reason)
    assert found == ((parked, "") if way == "load" else (0, "recompute"))
    assert client.status().counters[f"plans.{way}"] == 1
    if way == "load":
        return
    # What was computed again is one chunk, as it is for who never had it.
    whole = [*FIRST, *session(None, model).send(FIRST, 3).tokens, *SECOND]
    assert reply.tokens == session(None, model).send(whole, 3).tokens


def test_without_a_config_all_is_loaded_however_fast_the_model(
    model: Any, clock: Clock, client: Client
) -> None:
    clock.token_s = 1e-9
    with attached(client, model, config={}) as kv:
        for number in range(PREFILLS):
            session(kv, model, f"other-{number}", park_after_turn=False).send(FIRST[: 8 + 4 * number], 2)
        reply, parked = resumed(kv, model)
    assert reply.restored_tokens == parked
    assert client.status().counters["eta.prefills"] == 0


@pytest.mark.parametrize(("shown", "weighed"), [({"device": DEVICE, "devices": 2}, True), ({}, False)])
def test_a_device_that_is_known_is_believed_before_any_prefill(
    shown: dict[str, Any], weighed: bool, model: Any, client: Client
) -> None:
    with attached(client, model, **shown) as kv:
        chat = session(None, model)
        chat.send(FIRST, 3)
        assert chat.cache is not None
        assert kv.park("chat", chat.tokens, chat.cache).result(30).ok
        plan = kv.worker.plan("chat", FIRST)
    assert (plan.recompute_ttft_s > 0) == weighed
    assert ("recomputing all" in plan.why) == weighed


def test_what_cannot_be_true_is_refused_when_attaching(model: Any, client: Client) -> None:
    with pytest.raises(GeometryError), attached(client, model, devices=0):
        pass
    with pytest.raises(ModelSpecError), attached(client, model, config={"model_type": "llama"}):
        pass


# --- what is told -------------------------------------------------------------------------------------------


def test_the_config_is_what_its_file_holds(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    shown, saved = model_config(model), json.loads((tmp_path / "config.json").read_text())
    for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert shown[key] == saved[key]
    assert json.loads(json.dumps(shown)) == shown


def test_each_turn_tells_one_prefill(
    model: Any, clock: Clock, memory_kv: Callable[..., TransformersKV]
) -> None:
    kv = memory_kv(model, BLOCK)
    worker: Any = kv.worker
    chat = session(kv, model)
    first = chat.send(FIRST, 4)
    later = session(kv, model, tokens=chat.tokens)
    reply = later.send(SECOND, 4)
    again = later.send(SECOND, 1)
    restored = len(FIRST) + 3
    fed = [(0, len(FIRST)), (restored, 1 + len(SECOND)), (restored + len(SECOND) + 4, 1 + len(SECOND))]
    assert worker.prefills == [(past, tokens, tokens * clock.token_s) for past, tokens in fed]
    assert [first.ttft_s, reply.ttft_s, again.ttft_s] == [tokens * clock.token_s for _, tokens in fed]


def test_a_restore_asks_for_a_front_within_its_deadline(
    model: Any, memory_kv: Callable[..., TransformersKV]
) -> None:
    kv = memory_kv(model, BLOCK)
    worker: Any = kv.worker
    kv.restore("chat", FIRST, deadline_s=0.75)
    session(kv, model, tokens=FIRST, deadline_s=4.0).send(SECOND, 1)
    assert worker.plans == [(0.75, "fronts"), (4.0, "fronts")]


def test_a_caller_with_a_queue_of_prefills_says_so(
    model: Any, memory_kv: Callable[..., TransformersKV]
) -> None:
    kv = memory_kv(model, BLOCK)
    worker: Any = kv.worker
    kv.restore("chat", FIRST)
    kv.restore("chat", FIRST, waiting=3, prefill_wait_s=0.5)
    assert worker.queues == [(0, 0.0), (3, 0.5)]


def test_a_prefill_that_fails_tells_nothing(model: Any, memory_kv: Callable[..., TransformersKV]) -> None:
    kv = memory_kv(model, BLOCK)
    worker: Any = kv.worker

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.register_forward_hook(fail)
    chat = session(kv, model)
    with pytest.raises(RuntimeError):
        chat.send(FIRST, 1)
    assert worker.prefills == []
    hook.remove()
    chat.send(FIRST, 1)
    assert [(past, tokens) for past, tokens, _ in worker.prefills] == [(0, len(FIRST))]
