"""The integration against a whole daemon inside this process: sockets, arena, copies, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier import Fingerprint
from kvtier.daemon import embedded
from kvtier.integrations.transformers import ChatSession, Reply, TransformersKV, attach
from kvtier.testing.small_model import PATTERN, SIZES

BLOCK = 16
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES,
            sliding_window=24,
            layer_types=PATTERN,
        )
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(5)
    return MODELS[name]().to(dtype).eval()


@contextmanager
def attached(model: Any, folder: Path, **settings: Any) -> Iterator[TransformersKV]:
    """A daemon with its state in the folder, and the model attached to it."""
    overrides = {
        "node.state_dir": str(folder / "state"),
        "host.capacity_bytes": 16 << 20,
        "host.headroom_bytes": 0,
        "disk.capacity_bytes": 64 << 20,
        "disk.segment_bytes": 8 << 20,
        # These tests prove what is restored, and models this small compute sooner than anything loads.
        "policy.restore": "load",
        **settings,
    }
    with ExitStack() as stack:
        daemon = stack.enter_context(closing(embedded.start(**overrides)))
        client = stack.enter_context(closing(kvtier.connect(daemon.socket_path)))
        identity = Fingerprint(b"f" * 32, "test")
        yield stack.enter_context(attach(client, model, fingerprint=identity, block_tokens=BLOCK))


def session(kv: TransformersKV | None, model: Any, name: str = "chat", **options: Any) -> ChatSession:
    options.setdefault("share", "conversation")
    return ChatSession(
        kv, model, name, encode=lambda text: [ord(c) % 97 for c in text], decode=str, **options
    )


def same_bits(a: Reply, b: Reply) -> bool:
    assert a.logits is not None and b.logits is not None
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.logits.dtype]
    return a.tokens == b.tokens and torch.equal(a.logits.view(width), b.logits.view(width))


MESSAGES = ["a first message that is longer than two blocks and a window", "short", "x", "and one more " * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_turn_resumes_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(name, dtype)
    unbroken = session(None, model)
    tokens: list[int] = []
    with attached(model, tmp_path) as kv:
        for turn, message in enumerate(MESSAGES):
            expected = unbroken.send(message, 5, capture_logits=True)
            chat = session(kv, model, tokens=tokens)
            found = chat.send(message, 5, capture_logits=True)
            assert found.restored_tokens == (len(tokens) - 1 if turn else 0)
            assert same_bits(expected, found)
            assert found.park is not None and found.park.result(30).ok
            tokens = chat.tokens


def test_another_daemon_on_the_same_disk_restores(tmp_path: Path) -> None:
    model = build("gemma3")
    unbroken = session(None, model)
    with attached(model, tmp_path) as kv:
        chat = session(kv, model, level="disk")
        reply = chat.send(MESSAGES[0], 5)
        unbroken.send(MESSAGES[0], 5)
        assert reply.park is not None
        receipt = reply.park.result(30)
        assert (receipt.level, receipt.tokens) == ("disk", len(chat.tokens) - 1)
    with attached(model, tmp_path) as kv:
        later = session(kv, model, tokens=chat.tokens)
        found = later.send(MESSAGES[1], 5, capture_logits=True)
        assert found.restore is not None
        assert found.restore.sources.get("disk", 0) == found.restored_tokens == len(chat.tokens) - 1
        assert same_bits(unbroken.send(MESSAGES[1], 5, capture_logits=True), found)


def flip_one_parked_bit(kv: TransformersKV) -> None:
    """The highest exponent bit of one number in host memory; whichever it is, all tokens attend to it."""
    worker: Any = kv.worker
    memory = worker._attachment.arena.view((0, 0), 8 << 20)
    exponents = memory[3::4]
    at = int(exponents.nonzero()[0][0])
    exponents[at] ^= 0x40


@pytest.mark.parametrize("checked", [False, True], ids=["unchecked", "checked"])
def test_one_flipped_bit_is_seen(checked: bool, tmp_path: Path) -> None:
    model = build("llama")
    settings = {"disk.enabled": False, "host.verify": "always" if checked else "arrival"}
    unbroken = session(None, model)
    with attached(model, tmp_path, **settings) as kv:
        chat = session(kv, model)
        reply = chat.send(MESSAGES[0], 5)
        unbroken.send(MESSAGES[0], 5)
        assert reply.park is not None and reply.park.result(30).ok
        flip_one_parked_bit(kv)
        found = session(kv, model, tokens=chat.tokens).send(MESSAGES[1], 5, capture_logits=True)
        expected = unbroken.send(MESSAGES[1], 5, capture_logits=True)
        assert found.restore is not None and found.logits is not None and expected.logits is not None
        if checked:
            assert found.restored_tokens < len(chat.tokens) - 1 and found.restore.reason == "corrupt"
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
        else:
            assert found.restored_tokens == len(chat.tokens) - 1
            assert not same_bits(expected, found)


def test_a_shared_prompt_is_restored_for_a_conversation_that_is_new(tmp_path: Path) -> None:
    model = build("llama")
    with attached(model, tmp_path) as kv:
        first = session(kv, model, "first", share="prefix").send(MESSAGES[0] * 2, 3)
        assert first.park is not None and first.park.result(30).ok
        second = session(kv, model, "second", share="prefix").send(MESSAGES[0] * 2 + "other", 3)
        assert second.restored_tokens == len(MESSAGES[0] * 2) // BLOCK * BLOCK
        third = session(kv, model, "third", share="conversation").send(MESSAGES[0] * 2, 3)
        assert third.restored_tokens == 0


@pytest.mark.parametrize("codec", ["int8", "fp8"])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_parked_with_loss_goes_on_nearly_the_same(name: str, codec: str, tmp_path: Path) -> None:
    model = build(name)
    ids = [ord(c) % 97 for c in MESSAGES[0] * 2]
    with torch.no_grad(), attached(model, tmp_path) as kv:
        whole = model(input_ids=torch.tensor([ids]), use_cache=True)
        exact = model(input_ids=torch.tensor([[7]]), past_key_values=whole.past_key_values).logits[0, -1]
        again = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        receipt = kv.park("chat", ids, again, fidelity=codec).result(30)
        assert receipt.ok and receipt.tokens == len(ids)
        assert 0 < receipt.relative_error < {"int8": 0.01, "fp8": 0.04}[codec]
        assert kv.restore("chat", [*ids, 7]).tokens == 0
        restored = kv.restore("chat", [*ids, 7], fidelity=codec)
        assert restored.tokens == len(ids)
        found = model(input_ids=torch.tensor([[7]]), past_key_values=restored.cache).logits[0, -1]
        assert not torch.equal(exact, found)
        assert (exact - found).norm() < 4 * receipt.relative_error * exact.norm()
