"""The node's state in words for people and programs. Reads only."""

from __future__ import annotations

from collections import Counter

from kvtier.geometry import Geometry
from kvtier.messages.tiers import DiskUsage, GpuUsage
from kvtier.node import held_cost
from kvtier.node.conversations import Conversation
from kvtier.node.eta import OUTCOMES, WAYS
from kvtier.node.state import NodeState
from kvtier.receipts import ConversationInfo, ModelInfo, StatusReport, TierInfo, WorkerInfo

# Below this share of a day's writes the status says so.
_WEAR_LOW = 0.05


def conversation_info(state: NodeState, conversation: Conversation) -> ConversationInfo:
    """One conversation: its newest branch, and where that lies."""
    head = conversation.heads[-1]
    host = disk = nbytes = 0
    chain = state.tree.chain(head.key)
    for block in chain:
        parts = list(block.parts.values())
        nbytes += sum(s.meta.nbytes for s in parts)
        host += block.tokens if parts and all(s.slot is not None for s in parts) else 0
        disk += block.tokens if parts and all(s.on_disk is not None for s in parts) else 0
    return ConversationInfo(
        conversation=conversation.name,
        tenant=conversation.tenant,
        version=conversation.version,
        tokens=head.tokens,
        branches=len(conversation.heads),
        model=state.models.get(head.fingerprint, ""),
        parked_at_s=head.parked_at_s,
        host_tokens=host,
        disk_tokens=disk,
        bytes=nbytes,
        returns_at_s=conversation.returns_at_s,
        keep_until_s=conversation.keep_until_s,
        share="conversation" if head.private else "prefix",
        cost_per_hour=held_cost.of_blocks(state, chain),
        saves_gpu_s=held_cost.saved_gpu_s(state, chain),
    )


def model_infos(state: NodeState) -> list[ModelInfo]:
    """Every fingerprint that is known, the one with most bytes first."""
    objects = state.tree.objects
    conversations = Counter(f for c in state.conversations.values() for f in {h.fingerprint for h in c.heads})
    infos = [
        ModelInfo(
            fingerprint=fingerprint.hex(),
            model=state.models.get(fingerprint, ""),
            workers=sum(w.connected and w.fingerprint == fingerprint for w in state.workers.values()),
            conversations=conversations[fingerprint],
            objects=objects.get(fingerprint, 0),
            host_bytes=state.host_bytes_of.get(fingerprint, 0),
            disk_bytes=state.disk_bytes_of.get(fingerprint, 0),
            retired=fingerprint in state.worthless or fingerprint in state.retired,
        )
        for fingerprint in sorted({*state.models, *objects})
    ]
    return sorted(infos, key=lambda i: (-(i.host_bytes + i.disk_bytes), i.fingerprint))


def status_report(state: NodeState, waiting_parks: int) -> StatusReport:
    """The node at this instant."""
    warnings = []
    if not state.gpu_peer:
        warnings.append("the GPU service is not connected: parks and restores are refused")
    if state.gpu_said.late:
        warnings.append(
            f"copies of {', '.join(state.gpu_said.late)} do not end: their streams may stand still"
        )
    if state.gpu_said.unmapping:
        warnings.append(
            f"the pools of {', '.join(state.gpu_said.unmapping)} cannot be unmapped: their device may hang"
        )
    if state.disk.said.state == "degraded":
        warnings.append(f"the disk tier is degraded: {state.disk.said.detail}")
    if state.disk.ready and state.disk.said.crowded:
        warnings.append("others fill the file system of the disk tier: parks stay in host memory")
    if state.disk.ready and not state.disk.said.direct_io:
        warnings.append("the disk tier works without O_DIRECT: its writes and reads are slow")
    if state.counters.damaged_records:
        warnings.append(
            f"{state.counters.damaged_records} damaged records of conversations were found on disk, "
            "and removed"
        )
    warnings += state.unlearned
    if state.log_ended:
        warnings.append(f"the stimulus log has ended, {state.log_lost} entries are lost: {state.log_ended}")
    said = state.disk.said
    if said.wear_limit_bytes and said.wear_left_bytes < said.wear_limit_bytes * _WEAR_LOW:
        warnings.append(
            f"the drive may be written {said.wear_left_bytes} of {said.wear_limit_bytes} bytes a day more: "
            "beyond that parks stay in host memory, and what has to leave it is dropped"
        )
    return StatusReport(
        node=state.settings.node,
        epoch=state.epoch,
        version=state.settings.software,
        ready=all(
            (
                state.gpu_peer,
                state.faulted_in_bytes,
                state.disk.ready or not state.settings.disk_expected,
            )
        ),
        uptime_s=0.0 if state.started_s is None else state.now_s - state.started_s,
        tiers=tuple(_tiers(state)),
        workers=tuple(
            WorkerInfo(w.name, w.model, w.shard, w.mode, w.pid, len(w.jobs), w.engine, w.place, w.gpu_bytes)
            for w in state.workers.values()
            if w.connected
        ),
        conversations=len(state.conversations),
        waiting_parks=waiting_parks,
        counters=_counters(state),
        warnings=tuple(warnings),
        metrics_url=state.metrics_url,
        transport=state.settings.transport,
        peers=tuple(sorted(state.ways.items())),
    )


def pool_bytes(geometry: Geometry, pages: int) -> int:
    """Bytes of an attached pool, as far as its pages tell."""
    return geometry.token_bytes * geometry.page_tokens * pages


def _tiers(state: NodeState) -> list[TierInfo]:
    workers = [w for w in state.workers.values() if w.connected]
    gpu = TierInfo(
        name="gpu",
        state="ready" if state.gpu_peer else "absent",
        capacity_bytes=sum(pool_bytes(w.geometry, w.pool_pages) for w in workers),
        used_bytes=0,
        limbo_bytes=0,
        objects=0,
        detail=_gpu_detail(len(workers), state.gpu_said),
    )
    usage = state.host.usage()
    share = state.faulted_in_bytes / usage.capacity_bytes
    pages = state.settings.host_pages
    host = TierInfo(
        name="host",
        # It serves from the first part on.
        state="ready" if state.faulted_in_bytes else "starting",
        capacity_bytes=usage.capacity_bytes,
        used_bytes=usage.used_bytes,
        limbo_bytes=usage.limbo_bytes,
        objects=usage.objects,
        quarantined=usage.quarantined,
        detail=", ".join(filter(None, ("" if share == 1.0 else f"{share:.0%} faulted in", pages))),
    )
    disk = state.disk
    return [
        gpu,
        host,
        TierInfo(
            name="disk",
            state=disk.said.state if disk.ready else "starting" if disk.peer else "absent",
            capacity_bytes=disk.capacity_bytes,
            used_bytes=disk.said.used_bytes,
            limbo_bytes=0,
            objects=disk.said.objects,
            quarantined=disk.said.quarantined,
            detail=_disk_detail(disk.said),
        ),
    ]


def _gpu_detail(pools: int, said: GpuUsage) -> str:
    """In MiB, which need no rounding to be short."""
    context = f", {said.context_bytes >> 20} MiB for the CUDA contexts of the GPU service"
    return f"{pools} pools of serving engines{context if said.context_bytes else ''}"


def _disk_detail(said: DiskUsage) -> str:
    parts = [said.detail] if said.detail else []
    if said.user_bytes:
        parts.append(f"{said.written_bytes / said.user_bytes:.2f} bytes written for each of KV")
    if said.wear_limit_bytes:
        parts.append(f"{said.wear_left_bytes / said.wear_limit_bytes:.0%} of the day's writes left")
    return ", ".join(parts)


def _counters(state: NodeState) -> dict[str, float]:
    c, said = state.counters, state.disk.said
    flat: dict[str, float] = {
        "backpressure_s": c.backpressure_s,
        "evicted_objects": c.evicted_objects,
        "spilled_bytes": c.spilled_bytes,
        "parked_bytes": c.parked_bytes,
        "restored_bytes": c.restored_bytes,
        "restored_tokens": c.restored_tokens,
        "pulled_bytes": c.pulled_bytes,
        "kept_bytes": c.kept_bytes,
        "prefetched_bytes": c.prefetched_bytes,
        "prefetch_used_bytes": c.prefetch_used_bytes,
        "prefetch_wasted_bytes": c.prefetch_wasted_bytes,
        "peer_received_bytes": c.peer_received_bytes,
        "peer_coded_bytes": c.peer_coded_bytes,
        "peer_wire_bytes": c.peer_wire_bytes,
        "peer_relayed_bytes": c.peer_relayed_bytes,
        "peer_lent_bytes": c.peer_lent_bytes,
        "damaged_records": c.damaged_records,
        "host_dirty_bytes": state.dirty_bytes,
        "disk_written_bytes": said.written_bytes,
        "disk_user_bytes": said.user_bytes,
        "disk_flushes": said.flushes,
        "disk_direct_io": float(said.direct_io),
        "disk_crowded": float(said.crowded),
        "disk_scrub_bytes": said.scrub_bytes,
        "disk_scrub_bad": said.scrub_bad,
        "disk_scrub_passes": said.scrub_passes,
        "disk_wear_limit_bytes": said.wear_limit_bytes,
        "disk_wear_left_bytes": said.wear_left_bytes,
    }
    flat |= {f"eta.{outcome}": c.eta.total(outcome) for outcome in OUTCOMES}
    judged = sum(c.eta.outcomes.values())
    flat["eta.relative_error"] = c.eta.errors_sum / judged if judged else 0.0
    flat["eta.prefills"] = c.eta.prefills
    flat |= {f"plans.{way}": c.eta.ways.get(way, 0) for way in WAYS}
    flat["evicts_by_last_use"] = float(state.policies.usage.by_last_use())
    for name, forecast in state.policies.usage.forecasts().items():
        flat[f"returns.{name}.waits"] = forecast.waits
        flat[f"returns.{name}.expected"] = forecast.expected
        flat[f"returns.{name}.came"] = forecast.came
    groups = {"parks": c.parks, "restores": c.restores, "misses": c.misses, "errors": c.errors}
    for name, group in groups.items():
        flat.update({f"{name}.{key}": value for key, value in group.items()})
    return flat
