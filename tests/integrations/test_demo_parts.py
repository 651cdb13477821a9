"""The demo: its texts, its comparison, and the whole run with a store in memory in the daemon's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.cli.demo import child, run, texts
from kvtier.cli.demo.comparison import difference
from kvtier.cli.demo.control import RayDaemon, daemon_settings
from kvtier.cli.demo.model import device_of
from kvtier.cli.demo.process import Job, Record, run_child
from kvtier.cli.demo.report import Report, make_summary, make_table
from kvtier.cli.demo.run import Demo
from kvtier.cli.demo.scenario import (
    BLOCK_TOKENS,
    DISK_BYTES,
    HOST_BYTES,
    MakeJob,
    RoundEnd,
    RoundJob,
    TurnJob,
    TurnRecord,
    Usage,
    order_of,
    source_of,
)
from kvtier.errors import ConfigError, KvtierError
from kvtier.gpu.cuda.lane import Settings
from kvtier.gpu.cuda.make import cuda_engine
from kvtier.gpu.cuda.ways import always
from kvtier.integrations.transformers import TransformersKV
from kvtier.testing.fake_device import FakeDevice
from kvtier.testing.fake_device_gpu import Range

Attach = Callable[..., TransformersKV]


def test_the_shipped_conversations_are_many_long_and_in_many_languages() -> None:
    found = texts.load_conversations()
    assert len(found) >= 12 and len({c.name for c in found}) == len(found)
    assert len({c.language.partition(",")[0] for c in found}) >= 9
    assert sum("," in c.language for c in found) >= 2  # with code in them
    assert {c.share for c in found} == {"prefix", "conversation"}
    for conversation in found:
        assert 3 <= len(conversation.messages) <= 4
        assert all(len(message.encode()) > 600 for message in conversation.messages), conversation.name


def test_the_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    assert texts.train_tokenizer(tmp_path / "tokenizer.json") == texts.VOCABULARY
    tokenizer = texts.Tokenizer(tmp_path / "tokenizer.json")
    for conversation in texts.load_conversations():
        for message in conversation.messages:
            assert tokenizer.decode(tokenizer.encode(message)) == message
    # All conversations begin with the same blocks.
    first, second = (tokenizer.first_message(c.messages[0]) for c in texts.load_conversations()[:2])
    assert len(first) > 8 * BLOCK_TOKENS and first[: 8 * BLOCK_TOKENS] == second[: 8 * BLOCK_TOKENS]


def test_rounds_alternate_in_direction() -> None:
    found = texts.load_conversations()
    assert order_of(found, 1) == order_of(found, 0)[::-1]
    short = replace(found[0], messages=found[0].messages[:2])
    assert short not in order_of([short, found[1]], 2)


def test_comparison_sees_single_bits() -> None:
    logits = np.array([[0.0, 1.5, np.nan], [2.0, -3.0, 1e-40]], np.float32)
    assert difference([1, 2], logits, [1, 2], logits.copy()) == ""
    for row, column in np.ndindex(*logits.shape):
        flipped = logits.copy()
        flipped.view(np.uint32)[row, column] ^= 1
        assert f"from new token {row} on" in difference([1, 2], flipped, [1, 2], logits)
    negative_zero = logits.copy()
    negative_zero[0, 0] = -0.0
    assert difference([1, 2], negative_zero, [1, 2], logits)
    assert "other tokens" in difference([1, 3], logits, [1, 2], logits)
    assert "2 new tokens" in difference([1, 2], logits, [1], logits[:1])


def test_where_restored_tokens_came_from() -> None:
    record = TurnRecord("c", 1, [], 0, {}, 0, 0.0, 0.0, "", "disk", "", 0)
    named = [
        ({"host": 3}, "host"),
        ({"disk": 3, "host": 0}, "disk"),
        ({"host": 1, "disk": 1}, "both"),
        ({}, "none"),
    ]
    for sources, name in named:
        assert source_of(TurnRecord(**_fields(record) | {"sources": sources})) == name


def _fields(record: TurnRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


class CountingControl:
    """A daemon that is only counted."""

    socket = "nowhere"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def kill(self) -> None:
        self.calls.append("kill")

    def stop(self) -> None:
        self.calls.append("stop")


def tiny_model() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=texts.VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        initializer_range=0.2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


class InMemory:
    """Runs the demo's jobs in this process, on one store. before_round: called with the round's number."""

    def __init__(self, kv: TransformersKV, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kv = kv
        self.model = model
        self.rounds = 0
        self.before_round: Callable[[int], None] = lambda number: None
        self._said: list[Record] = []
        monkeypatch.setattr(child, "say", self._said.append)
        monkeypatch.setattr("kvtier.cli.demo.model.load_model", lambda folder, threads, device: model)
        monkeypatch.setattr(run, "run_child", self.run_child)

    def run_child(
        self, job: Job, folder: Path, name: str, on_record: Callable[[Record], None]
    ) -> list[Record]:
        self._said.clear()
        if isinstance(job, MakeJob):
            Path(job.model).mkdir()
            texts.train_tokenizer(Path(job.model) / texts.TOKENIZER_FILE)
        elif isinstance(job, RoundJob):
            self.before_round(self.rounds)
            self.rounds += 1
            for turn in job.turns:
                child.say(child.serve_turn(self.kv, self.model, turn, job.logits))
            tiers = {"host": Usage(5, HOST_BYTES), "disk": Usage(7, DISK_BYTES)}
            child.say(RoundEnd(tiers, "cuda:0 a GPU"))
        else:
            child.reference(job)
        for record in self._said:
            on_record(record)
        return list(self._said)


def run_demo(work: Path, console: Console | None = None) -> tuple[Report, CountingControl]:
    """Four short conversations, two of each kind of sharing."""
    shipped = [
        c
        for c in texts.load_conversations()
        if c.name in ("levain", "kissaten", "overdue-sql", "saat-al-midan")
    ]
    shorter = [replace(c, messages=tuple(m[:200] for m in c.messages)) for c in shipped]
    chosen = tuple(replace(c, share="prefix" if i % 2 else "conversation") for i, c in enumerate(shorter))
    control = CountingControl()
    (work / "logits" / "served").mkdir(parents=True)
    (work / "logits" / "reference").mkdir()
    quiet = console or Console(quiet=True)
    return Demo(work, {}, control, quiet, chosen, "cpu").run(seed=1), control


def test_the_whole_run_is_bit_identical(
    memory_kv: Attach, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model()
    InMemory(memory_kv(model, BLOCK_TOKENS), model, monkeypatch)
    report, control = run_demo(tmp_path)
    assert report.problems == ()
    assert report.bit_identical and report.compared == {"conversation": (8, 8), "prefix": (8, 8)}
    assert (report.turns, report.resumable, report.resumed) == (16, 12, 12)
    assert control.calls == ["start", "kill", "start", "stop"] and report.kills == 1
    found = json.loads(json.dumps(report.as_dict()))
    assert found["bit_identical"] is True and found["turns"] == 16 and found["resumed"] == 12
    assert set(found["ttft_s"]) == {"recompute", "host", "disk"} and found["ttft_s"]["disk"] is None
    assert found["ttft_s"]["recompute"] > 0 and found["ttft_s"]["host"] > 0
    assert found["restored_tokens"] > 12 * 600
    assert make_table(report).row_count == 1 and "KV on cuda:0 a GPU" in str(make_table(report).title)
    assert found["device"] == "cuda:0 a GPU"
    assert any("8 of 8" in line for line in make_summary(report))


def test_a_flipped_bit_in_the_store_is_a_difference(
    memory_kv: Attach, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model()
    kv = memory_kv(model, BLOCK_TOKENS)
    worker: Any = kv.worker

    def flip(number: int) -> None:
        if number == 3:
            # One bit of the newest object: the tail of whoever spoke last.
            list(worker.blocks.values())[-1].planes[1].flat[7] ^= 0x40

    InMemory(kv, model, monkeypatch).before_round = flip
    worker.verify = False
    report, _ = run_demo(tmp_path)
    assert not report.bit_identical
    assert len(report.problems) == 1 and "logits differ" in report.problems[0]
    assert any(line.startswith("PROBLEM") for line in make_summary(report))


def test_what_did_not_come_back_is_a_problem(
    memory_kv: Attach, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model()
    kv = memory_kv(model, BLOCK_TOKENS)
    worker: Any = kv.worker

    def lose(number: int) -> None:
        if number == 2:
            worker.known.clear()

    InMemory(kv, model, monkeypatch).before_round = lose
    report, _ = run_demo(tmp_path)
    assert report.resumed < report.resumable
    assert any("tokens came back" in line for line in report.problems)


def test_arguments_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="between 1 and"):
        run.main(conversations=99)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not empty"):
        run.main(directory=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    job = MakeJob(str(tmp_path / "file" / "model"), 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KvtierError, match="NotADirectoryError"):
        run_child(job, tmp_path, "make", lambda record: None)


def test_a_folder_that_was_there_before_stays(tmp_path: Path) -> None:
    console = Console(quiet=True)
    with run.work_folder(tmp_path, keep=False, console=console) as work:
        (work / "state").mkdir()
        (work / "state" / "file").write_text("x")
        (work / "round-0.log").write_text("x")
    assert list(tmp_path.iterdir()) == []
    with run.work_folder(tmp_path / "new", keep=False, console=console) as work:
        assert (work / "logits" / "served").is_dir()
    assert not (tmp_path / "new").exists()
    with run.work_folder(tmp_path / "kept", keep=True, console=console):
        pass
    assert (tmp_path / "kept" / "logits").is_dir()


def test_killing_nothing_is_not_a_kill(tmp_path: Path) -> None:
    settings = daemon_settings(tmp_path / "work", tmp_path / "run")
    # A demo that computes again what it parked shows nothing.
    assert settings["policy.restore"] == "load"
    daemon = RayDaemon(settings)
    assert daemon.socket == str(tmp_path / "run" / "node.sock")
    with pytest.raises(KvtierError, match="no daemon to kill"):
        daemon.kill()


@pytest.mark.slow
def test_the_demo_with_a_daemon_in_each_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(as_json=True, conversations=2, daemon="embedded") == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["bit_identical"] is True and found["resumed"] == 6
    assert found["ttft_s"]["disk"] > 0 and found["tiers"]["disk"]["used_bytes"] > 0


# --- on a GPU, as far as a fake device shows it -----------------------------------------------------------


class AnywhereDevice(FakeDevice):
    """Takes all memory for its own: caches are wherever torch puts them."""

    def _need(self, ranges: list[Range], kinds: tuple[str, ...]) -> None:
        return


def test_a_gpu_is_found_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (device_of("auto"), device_of("cpu"), device_of("cuda:1")) == ("cuda:0", "cpu", "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of("auto") == "cpu"


@pytest.mark.parametrize("asked", ["nonsense", "cuda", "cuda:2", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_is_started(
    asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    work = tmp_path / "work"
    with pytest.raises(ConfigError, match=r"torch finds cpu, cuda:0, cuda:1") as refused:
        run.main(directory=work, device=asked)
    assert "device" in str(refused.value) and not work.exists()
    # Control: it is this check alone that stops it here.
    monkeypatch.setattr(run, "check_device", lambda device: None)
    monkeypatch.setattr(run, "daemon_settings", _reached)
    with pytest.raises(KvtierError, match="reached"):
        run.main(directory=work, device=asked)


def _reached(*given: object) -> None:
    raise KvtierError("reached")


def test_a_serving_process_copies_by_the_engine_of_the_model_s_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device, asked = AnywhereDevice(3), []
    place = cuda_engine(device, Settings(always("staged"), 2, 1 << 16))
    monkeypatch.setattr("kvtier.integrations.transformers.place_of", lambda location: place)
    tiny_model().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    said = list[Record]()
    monkeypatch.setattr(child, "say", said.append)

    def load(folder: Path, threads: int, device: str) -> Any:
        asked.append(device)
        return model

    monkeypatch.setattr("kvtier.cli.demo.model.load_model", load)
    first = TurnJob("one", 0, "conversation", [], list(range(5, 180)))
    jobs = [first]
    for _ in range(2):
        settings = daemon_settings(tmp_path, tmp_path / "run")
        job = RoundJob(
            model="", threads=1, device="auto", socket="", settings=settings, turns=jobs,
            logits=str(tmp_path), kill_self=False,
        )  # fmt: skip
        child.serve(job)
        turn = next(record for record in said if isinstance(record, TurnRecord))
        jobs = [TurnJob("one", 1, "conversation", [*first.message, *turn.reply], [7, 8, 9])]
    again = [record for record in said if isinstance(record, TurnRecord)][-1]
    assert (again.park_level, again.restored_tokens) == ("disk", len(jobs[0].before) - 1)
    assert [record.place for record in said if isinstance(record, RoundEnd)] == ["cpu fake"] * 2
    assert asked == ["auto"] * 2 and {"gather", "scatter"} <= set(device.launched)
