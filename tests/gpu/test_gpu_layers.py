"""Which layers of a restore were told to be in place, whatever order batches begin, end and fail in."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.errors import GeometryError, TierUnavailable
from kvtier.gpu.cpu_engine import CpuCopyEngine
from kvtier.gpu.engine import CopyBatch, CopyItem, Reached, StreamEvent
from kvtier.gpu.layers import LayerBatch, LayerEvents, LayerReady
from kvtier.gpu.layout import LayerGroup
from kvtier.gpu.places import CpuPlace, choose, location_of, place_of
from kvtier.gpu.pool import Pool
from kvtier.gpu.tensors import DeviceBytes
from kvtier.testing.pool_cases import BUILDERS, Slots

LAYERS = 4


class _Layout:
    """Two groups that share the layers out: 0 and 2, 1 and 3."""

    groups = (LayerGroup("full", (0, 2)), LayerGroup("sliding", (1, 3), 16))


class _Event:
    def __init__(self) -> None:
        self.reached = False

    def done(self) -> bool:
        return self.reached

    def wait(self, stream: int) -> None:
        pass

    def synchronize(self) -> None:
        self.reached = True


def item(group: int) -> CopyItem:
    return CopyItem(group, 0, 1, 0, 0, 1, (0, 0), 1, 1)


class Restore(RuleBasedStateMachine):
    """A node that begins batches, sends a failed one again, and seals with the last; an engine; a caller."""

    def __init__(self) -> None:
        super().__init__()
        self.layers_of = {0: (0, 2), 1: (1, 3)}
        self.all = LayerEvents(_Layout)  # type: ignore[arg-type]
        self.todo = [0, 1, 0, 1]
        self.running: list[tuple[LayerBatch, int, dict[int, _Event]]] = []
        self.written: dict[int, int] = dict.fromkeys(range(LAYERS), 0)
        self.told: dict[int, int] = {}
        self.failed = False
        self.over = False

    @precondition(lambda self: self.todo and not self.over)
    @rule()
    def begin(self) -> None:
        group = self.todo.pop(0)
        part = self.all.begin([item(group)], last=not self.todo)
        if part is None:
            assert self.told, "only what somebody relies on may refuse a batch"
            self.failed = True
            return
        for layer in self.layers_of[group]:
            self.written[layer] += 1
        self.running.append((part, group, {}))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), device=st.booleans())
    def tell(self, data: st.DataObject, device: bool) -> None:
        part, group, events = data.draw(st.sampled_from(self.running))
        left = [layer for layer in self.layers_of[group] if layer not in events]
        if left and device:
            events[left[0]] = _Event()
            part.on_layer(left[0], events[left[0]])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data: st.DataObject, ok: bool) -> None:
        entry = data.draw(st.sampled_from(self.running))
        self.running.remove(entry)
        part, group, events = entry
        for event in events.values():
            event.reached = True
        part.ended(ok)
        if not ok and not self.over:
            self.todo.append(group)
            self.failed = self.failed or bool(self.told)

    @precondition(lambda self: not self.over and not self.running and not self.todo)
    @rule()
    def receipt(self) -> None:
        self.over = True
        self.all.end(not self.failed)

    @rule(layer=st.integers(0, LAYERS - 1), how=st.sampled_from(["ready", "wait", "synchronize"]))
    def ask(self, layer: int, how: str) -> None:
        if how == "ready":
            there = self.all.ready(layer)
        elif how == "wait":
            there = LayerReady(layer, self.all).wait(3, 0)
        else:
            there = LayerReady(layer, self.all).synchronize(0)
        if there:
            assert not self.todo, "a batch with the layer was still to begin"
            if how != "wait":
                for _, group, events in self.running:
                    assert layer not in self.layers_of[group] or events[layer].reached
            self.told[layer] = self.written[layer]

    @invariant()
    def what_was_told_is_not_written_again(self) -> None:
        assert all(self.written[layer] == count for layer, count in self.told.items())

    @invariant()
    def after_a_failure_nothing_is_told(self) -> None:
        if self.failed:
            assert not any(self.all.ready(layer) for layer in range(LAYERS))


Restore.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestRestore = Restore.TestCase


class Pushed(Restore):
    """The same where the GPU service copies: who asked is nobody, all that is complete is pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.pushes: list[int] = []
        self.all = LayerEvents(_Layout, push=self.push)  # type: ignore[arg-type]

    def push(self, layer: int, events: Sequence[StreamEvent]) -> None:
        assert not self.failed and not self.todo
        assert not any(
            layer in self.layers_of[group] and layer not in there for _, group, there in self.running
        )
        self.pushes.append(layer)
        self.told[layer] = self.written[layer]

    @invariant()
    def a_layer_is_pushed_once(self) -> None:
        assert len(set(self.pushes)) == len(self.pushes)
        if self.over and not self.failed:
            assert sorted(self.pushes) == list(range(LAYERS))


Pushed.TestCase.settings = Restore.TestCase.settings
TestPushed = Pushed.TestCase


def test_control_a_forgetful_keeper_of_layers_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lets a batch begin after a layer was told: the machine sees the second write."""
    begin = LayerEvents.begin

    def careless(self: LayerEvents, items: list[CopyItem], last: bool) -> LayerBatch | None:
        self._told = self._failed = False
        return begin(self, items, last)

    monkeypatch.setattr(LayerEvents, "begin", careless)
    machine = Restore()
    machine.todo = [0]
    machine.begin()
    part = machine.running[0][0]
    for layer in (0, 2):
        part.on_layer(layer, Reached())
    machine.ask(0, "wait")
    machine.running.clear()
    part.ended(False)
    machine.todo = [0]
    machine.begin()
    with pytest.raises(AssertionError):
        machine.what_was_told_is_not_written_again()


def test_control_a_service_that_forgets_what_it_pushed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = LayerEvents.begin

    def careless(self: LayerEvents, items: list[CopyItem], last: bool) -> LayerBatch | None:
        self._told = self._failed = False
        return begin(self, items, last)

    monkeypatch.setattr(LayerEvents, "begin", careless)
    machine = Pushed()
    machine.todo = [0]
    machine.begin()
    part, _, events = machine.running[0]
    for layer in (0, 2):
        events[layer] = _Event()
        part.on_layer(layer, events[layer])
    assert {0, 2} <= set(machine.pushes)
    machine.running.pop()[0].ended(False)
    machine.todo = [0]
    machine.begin()
    with pytest.raises(AssertionError):
        machine.what_was_told_is_not_written_again()


def test_what_another_process_says_is_there_is_there_until_the_restore_fails() -> None:
    layers = LayerEvents(_Layout)  # type: ignore[arg-type]
    late = _Event()
    layers.arrived(0, late)
    assert not layers.ready(0) and layers.wait(0, 0, 0) and not layers.ready(1)
    late.reached = True
    assert layers.ready(0)
    for layer in (-1, LAYERS):
        with pytest.raises(GeometryError, match="no layer"):
            layers.arrived(layer, Reached())
    layers.end(False)
    layers.arrived(1, Reached())
    assert not layers.ready(0) and not layers.ready(1)


def test_after_the_receipt_no_event_of_another_process_is_asked() -> None:
    """They end with the mapping that they came with."""
    layers = LayerEvents(_Layout)  # type: ignore[arg-type]
    layers.arrived(0, _Event())
    layers.end(True)
    assert layers.ready(0)


def test_a_receipt_that_is_not_ok_ends_the_waiting() -> None:
    layers = LayerEvents(_Layout)  # type: ignore[arg-type]
    layers.end(False)
    assert not layers.wait(0, 0, None) and not layers.ready(0) and not layers.synchronize(1, None)


def test_a_receipt_that_is_ok_tells_of_all_layers() -> None:
    layers = LayerEvents(_Layout)  # type: ignore[arg-type]
    assert not layers.ready(0)
    layers.end(True)
    assert all(layers.ready(layer) for layer in range(LAYERS)) and len(layers) == LAYERS


# -- places


def test_the_place_of_host_memory() -> None:
    case = BUILDERS[0]("uint16", 4, 2, 8)
    place = choose(case.pool(), None)
    assert (place.location, place.engine, place.device, place.device_bytes) == ("cpu", "cpu", "", 0)
    assert location_of(case.pool()) == location_of(None) == "cpu"
    assert place.mark().done() and place.after(place.mark()).done()
    slots = Slots(64)
    engine = place(slots)
    assert isinstance(engine, CpuCopyEngine)
    engine.close()


@pytest.mark.parametrize("stream", [0, 7, type("S", (), {"cuda_stream": 3})(), type("S", (), {"ptr": 3})()])
def test_host_memory_knows_no_stream_of_a_gpu(stream: object) -> None:
    with pytest.raises(GeometryError, match="no stream of a GPU"):
        CpuPlace().mark(stream)


def test_host_memory_takes_only_events_that_are_done() -> None:
    place = CpuPlace()
    assert place.event(Reached()).done()
    for event in (_Event(), object()):
        with pytest.raises(GeometryError, match="no event of a GPU"):
            place.event(event)


def test_the_cpu_engine_refuses_what_it_would_have_to_wait_for() -> None:
    case, slots = BUILDERS[0]("uint16", 4, 2, 8), Slots(1 << 16)
    engine = CpuCopyEngine(slots, threads=1)
    nbytes = case.layout.geometry.groups[0].object_bytes(16)
    batch = CopyBatch(
        "j", 0, "gather", case.pool().bind(range(4)), (CopyItem(0, 0, 16, 0, 0, 1, (0, 0), nbytes),),
        after=_Event(),
    )  # fmt: skip
    with pytest.raises(GeometryError, match="wait for no stream"):
        engine.submit(batch, lambda result: None)
    engine.close()


@pytest.mark.parametrize("location", ["xpu:0", "cuda", "cuda:x"])
def test_a_device_without_an_engine_is_refused(location: str) -> None:
    with pytest.raises(GeometryError, match="no copy engine"):
        place_of(location)


def gpu_pool() -> Pool:
    """A pool on cuda:1; nothing looks into it."""
    case = BUILDERS[0]("uint16", 4, 2, 8)
    parts = [DeviceBytes(4096, buffer.nbytes, "cuda:1", None) for buffer in case.layout.buffers]
    return Pool(case.layout, parts)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is installed")
def test_a_gpu_s_pool_without_cupy_is_refused_with_the_fix() -> None:
    with pytest.raises(TierUnavailable, match=r"cupy .*pip install 'kvtier\[cuda13\]'"):
        choose(gpu_pool(), None)


def test_an_own_engine_for_a_gpu_s_pool_is_refused() -> None:
    pool = gpu_pool()
    assert location_of(pool) == "cuda:1"
    with pytest.raises(GeometryError, match="cannot order"):
        choose(pool, CpuCopyEngine)
