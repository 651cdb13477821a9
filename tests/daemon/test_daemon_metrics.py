"""What a scrape shows is what the snapshot says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvtier.daemon.metrics import (
    REASONS,
    DiskMetrics,
    EtaMetrics,
    Histogram,
    NodeMetrics,
    ReturnMetrics,
    TierMetrics,
    make_registry,
)

NODE = NodeMetrics(
    node="n1",
    version="0.1.0",
    ready=True,
    tiers=(
        TierMetrics("host", True, 1 << 30, 1 << 20, 4096, 5, 0),
        TierMetrics("disk", False, 1 << 40, 1 << 21, 0, 9, 2),
    ),
    parks={"disk": 3, "host": 1},
    restores={"disk": 2},
    misses={"corrupt": 1},
    errors={"MalformedMessage": 4},
    backpressure_s=1.5,
    disk=DiskMetrics(
        written_bytes=12345, user_bytes=12000, scrub_bad=2, wear_limit_bytes=99, wear_left_bytes=9
    ),
    eta=EtaMetrics(
        outcomes={("host", "inside"): 8, ("disk", "late"): 1},
        errors=Histogram((0.1, 1.0), (6, 2, 1), 3.5),
        ways={"both": 2},
        prefills=5,
    ),
    returns={"1h": ReturnMetrics(4, 2.5, 3)},
    evicts_by_last_use=False,
    spilled_bytes=77,
    prefetched_bytes={"read": 30, "used": 20},
    peer_bytes={"kv": 300, "coded": 200, "wire": 230},
    workers=2,
    conversations=7,
    waiting_parks=1,
)


def scrape(node):
    """All samples of one scrape as {(name, labels): value}."""
    text = generate_latest(make_registry(lambda: node)).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("kvtier_node_info", {"node": "n1", "version": "0.1.0"}, 1),
        ("kvtier_ready", {}, 1),
        ("kvtier_parks_total", {"level": "disk"}, 3),
        ("kvtier_parks_total", {"level": "none"}, 0),
        ("kvtier_restores_total", {"source": "disk"}, 2),
        ("kvtier_eta_restores_total", {"source": "host", "outcome": "inside"}, 8),
        ("kvtier_eta_restores_total", {"source": "disk", "outcome": "late"}, 1),
        ("kvtier_eta_restores_total", {"source": "disk", "outcome": "early"}, 0),
        ("kvtier_eta_relative_error_bucket", {"le": "0.1"}, 6),
        ("kvtier_eta_relative_error_bucket", {"le": "1.0"}, 8),
        ("kvtier_eta_relative_error_bucket", {"le": "+Inf"}, 9),
        ("kvtier_eta_relative_error_sum", {}, 3.5),
        ("kvtier_plans_total", {"way": "both"}, 2),
        ("kvtier_plans_total", {"way": "load"}, 0),
        ("kvtier_prefills_total", {}, 5),
        ("kvtier_returns_waits_total", {"within": "1h"}, 4),
        ("kvtier_returns_expected_total", {"within": "1h"}, 2.5),
        ("kvtier_returns_came_total", {"within": "1h"}, 3),
        ("kvtier_evicts_by_last_use", {}, 0),
        ("kvtier_restores_total", {"source": "host"}, 0),
        ("kvtier_misses_total", {"reason": "corrupt"}, 1),
        ("kvtier_misses_total", {"reason": "deadline"}, 0),
        ("kvtier_errors_total", {"kind": "MalformedMessage"}, 4),
        ("kvtier_backpressure_seconds_total", {}, 1.5),
        ("kvtier_disk_written_bytes_total", {}, 12345),
        ("kvtier_disk_user_bytes_total", {}, 12000),
        ("kvtier_disk_scrub_bad_total", {}, 2),
        ("kvtier_disk_wear_limit_bytes", {}, 99),
        ("kvtier_disk_wear_left_bytes", {}, 9),
        ("kvtier_spilled_bytes_total", {}, 77),
        ("kvtier_prefetched_bytes_total", {"what": "read"}, 30),
        ("kvtier_prefetched_bytes_total", {"what": "used"}, 20),
        ("kvtier_prefetched_bytes_total", {"what": "wasted"}, 0),
        ("kvtier_peer_bytes_total", {"form": "coded"}, 200),
        ("kvtier_peer_bytes_total", {"form": "wire"}, 230),
        ("kvtier_workers", {}, 2),
        ("kvtier_conversations", {}, 7),
        ("kvtier_waiting_parks", {}, 1),
        ("kvtier_tier_ready", {"tier": "disk"}, 0),
        ("kvtier_tier_capacity_bytes", {"tier": "disk"}, 1 << 40),
        ("kvtier_tier_used_bytes", {"tier": "host"}, 1 << 20),
        ("kvtier_tier_limbo_bytes", {"tier": "host"}, 4096),
        ("kvtier_tier_objects", {"tier": "disk"}, 9),
        ("kvtier_tier_quarantined_objects", {"tier": "disk"}, 2),
    ],
)
def test_each_number_of_the_snapshot_is_a_sample(name, labels, value):
    assert scrape(NODE)[name, tuple(sorted(labels.items()))] == value


def test_reasons_have_a_series_before_anything_happened():
    empty = scrape(NodeMetrics("n", "v", False))
    for reason in REASONS:
        assert empty["kvtier_misses_total", (("reason", reason),)] == 0


def test_labels_from_outside_are_escaped():
    odd = replace(NODE, node='a"b\\c\nd', errors={'x"} 1\nkvtier_workers 99': 1})
    samples = scrape(odd)
    assert samples["kvtier_workers", ()] == 2
    assert ("kvtier_node_info", (("node", 'a"b\\c\nd'), ("version", "0.1.0"))) in samples


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_the_histogram_s_buckets_add_up(counts):
    histogram = Histogram((0.1, 0.5, 2.0), tuple(counts), 12.5)
    samples = scrape(replace(NODE, restore_s=histogram))
    for n, bound in enumerate(("0.1", "0.5", "2.0", "+Inf"), 1):
        assert samples["kvtier_restore_seconds_bucket", (("le", bound),)] == sum(counts[:n])
    assert samples["kvtier_restore_seconds_count", ()] == sum(counts)
    assert samples["kvtier_restore_seconds_sum", ()] == 12.5


def test_a_histogram_with_too_few_counts_is_a_bug():
    with pytest.raises(ValueError, match="shorter"):
        scrape(replace(NODE, restore_s=Histogram((0.1, 0.5), (1, 2))))


def test_a_registry_asks_for_nothing_before_a_scrape_and_for_fresh_numbers_at_each():
    asked = []

    def snapshot():
        asked.append(1)
        return replace(NODE, workers=len(asked))

    registry = make_registry(snapshot)
    assert asked == []
    assert registry.get_sample_value("kvtier_workers") == 1
    assert registry.get_sample_value("kvtier_workers") == 2


def test_two_nodes_of_one_process_do_not_meet():
    first, second = make_registry(lambda: NODE), make_registry(lambda: replace(NODE, workers=9))
    assert first.get_sample_value("kvtier_workers") == 2
    assert second.get_sample_value("kvtier_workers") == 9
