"""What a log says of a machine, and whether a simulation with it foretells another day of that machine."""

import dataclasses
import io
import json
import tomllib

import msgpack
import numpy as np
import pytest

from kvtier.errors import KvtierError
from kvtier.policy.defaults import make_policies
from kvtier.sim.calibration import Speed
from kvtier.sim.cluster import core_node
from kvtier.sim.cluster.scenario import Scenario, Worker, changed, read_scenario
from kvtier.sim.machine import calibrated, machine_of, scenario_text
from kvtier.sim.stimuli import load_of_log


def machine(day):
    return machine_of(day.entries, make_policies, core_node.SECRET)


def errors(foretold_s, measured_s):
    foretold, measured = np.array(foretold_s), np.array(measured_s)
    assert len(foretold) == len(measured) == 150
    return np.percentile(np.abs(foretold - measured) / measured, (50, 90))


def test_a_machine_is_known_by_its_log(virtual_day):
    day = virtual_day(1, 0.2)
    found, worker = machine(day), day.scenario.worker
    assert found.flops_per_s == pytest.approx(worker.flops_per_s, rel=0.02)
    assert found.prefill_start_s == pytest.approx(worker.prefill_start_s, rel=0.05)
    assert found.host.bytes_per_s == pytest.approx(worker.link_bytes_per_s, rel=0.2)
    assert found.host.start_s == pytest.approx(day.scenario.host.start_s, rel=0.5)
    assert found.services.read.bytes_per_s == pytest.approx(2e9, rel=0.3)


def test_what_does_not_count_is_not_measured(virtual_day):
    day = virtual_day(1, 0.2)
    half_s = day.entries[len(day.entries) // 2]["at_s"]
    early, late = (
        machine_of(day.entries, make_policies, core_node.SECRET, counts)
        for counts in (lambda at_s: at_s < half_s, lambda at_s: at_s >= half_s)
    )
    # Links vary, so the halves are measured apart, and differ.
    assert early.services.read != late.services.read
    assert early.flops_per_s == pytest.approx(late.flops_per_s, rel=0.1)
    nothing = machine_of(day.entries, make_policies, core_node.SECRET, lambda _: False)
    assert nothing.flops_per_s == 0 and nothing.host is None


def test_a_day_is_foretold_with_what_another_day_says_of_the_machine(virtual_day, ttft_by_row):
    first, second = (virtual_day(seed, 0.5) for seed in (1, 2))
    load = load_of_log(io.BytesIO(b"".join(msgpack.packb(e) for e in second.entries)))
    # All speeds are wrong to begin with.
    unknown = changed(
        first.scenario,
        worker=changed(first.scenario.worker, flops_per_s=1e12, prefill_start_s=1.0, link_bytes_per_s=1e6),
        disk=changed(first.scenario.disk, read_bytes_per_s=1e6, write_bytes_per_s=1e6),
    )
    found = machine(first)
    median, p90 = errors(ttft_by_row(calibrated(unknown, found), load), second.ttft_s)
    assert median <= 0.05 and p90 <= 0.3


def test_a_machine_that_is_three_times_as_slow_foretells_other_times(virtual_day, ttft_by_row):
    day = virtual_day(2, 0.5)
    load = load_of_log(io.BytesIO(b"".join(msgpack.packb(e) for e in day.entries)))
    found = machine(day)
    slow = dataclasses.replace(found, flops_per_s=found.flops_per_s / 3, prefill_start_s=0.03)
    assert errors(ttft_by_row(calibrated(day.scenario, slow), load), day.ttft_s)[0] > 0.5


def test_what_was_not_seen_stays_as_the_scenario_has_it(virtual_day):
    day = virtual_day(1, 0.0)
    begun = [entry for entry in day.entries if "origin" in entry]
    found = machine_of(begun, make_policies, core_node.SECRET)
    assert found.host is None and not found.flops_per_s
    assert calibrated(Scenario(), found) == Scenario()
    with pytest.raises(KvtierError, match="start of a node"):
        machine_of(day.entries[1:], make_policies, core_node.SECRET)
    two = changed(Scenario(), worker=Worker(gpus=2))
    assert calibrated(two, dataclasses.replace(found, flops_per_s=8e14)).worker.flops_per_s == 4e14


def test_a_machine_as_text_is_a_scenario(virtual_day):
    found = machine(virtual_day(1, 0.2))
    text = scenario_text(found)
    assert read_scenario(text) == calibrated(Scenario(), found)
    assert set(tomllib.loads(text)) == {"worker", "host", "disk"}
    assert json.dumps(tomllib.loads(text))
    nothing = dataclasses.replace(found, host=None, flops_per_s=0.0)
    assert set(tomllib.loads(scenario_text(nothing))) == {"disk"}
    assert nothing.services.write != Speed(0.0, 1e12)
