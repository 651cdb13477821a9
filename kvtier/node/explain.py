"""Why a conversation lies where it lies. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice
from typing import TypeAlias

from kvtier.explanation import ExplainedRun, Explanation
from kvtier.node.blocks import Block, ConversationId
from kvtier.node.conversations import Conversation
from kvtier.node.state import NodeState
from kvtier.policy.interfaces import Segment
from kvtier.policy.usage import Account

_LRU = "lru: what was used longest ago goes first"
_COST = "cost: what is worth least for its room goes first"
# Runs that one answer holds.
_MOST_RUNS = 1000
# By tier: how many would go before something, of how many.
_Places: TypeAlias = dict[str, tuple[int, int]]


def explained(state: NodeState, name: ConversationId) -> Explanation:
    """The conversation's parts, by where they lie and what they wait for."""
    tenant, conversation = name
    known = state.conversations.get(name)
    parts = list(islice(_parts(state, known), _MOST_RUNS)) if known is not None else []
    runs = [_run(state, *part) for part in zip(parts, _places(state, parts), strict=True)]
    reckons = state.policies.usage.run_of(b"") is not None
    currency = next((currency for _, currency in runs if currency), "")
    return Explanation(
        conversation,
        tenant,
        found=known is not None,
        policy=_COST if reckons else _LRU,
        currency=currency,
        runs=tuple(run for run, _ in runs),
        detail="" if known is not None else "it is not parked on this node",
    )


def _parts(state: NodeState, known: Conversation) -> Iterator[list[Block]]:
    """Neighbouring blocks in equal state: the newest branch's, then those that only others have."""
    seen: set[bytes] = set()
    for head in reversed(known.ends):
        chain = [block for block in state.tree.chain(head.key) if block.key not in seen]
        seen.update(block.key for block in chain)
        usage = state.policies.usage
        for _, blocks in groupby(chain, key=lambda b: (_tiers(state, b), id(usage.run_of(b.key)))):
            yield list(blocks)


def _places(state: NodeState, parts: list[list[Block]]) -> list[_Places]:
    """Of each part."""
    if not parts:
        return []
    lasts = [blocks[-1].key for blocks in parts]
    ranks = (order.ranks(lasts, state.now_s) for order in (state.policies.host, state.policies.disk))
    return [{"host": host, "disk": disk} for host, disk in zip(*ranks, strict=True)]


def _tiers(state: NodeState, block: Block) -> tuple[str, ...]:
    """Tiers that have all of the block."""
    parts = list(block.parts.values())
    host = bool(parts) and all(s.slot is not None for s in parts)
    disk = bool(parts) and all(s.on_disk is not None for s in parts)
    return (*(("host",) if host else ()), *(("disk",) if disk else ()))


def _run(state: NodeState, blocks: list[Block], places: _Places) -> tuple[ExplainedRun, str]:
    """The run, and the currency of its money."""
    stored = [s for block in blocks for s in block.parts.values()]
    host_bytes = sum(s.meta.nbytes for s in stored if s.slot is not None)
    disk_bytes = sum(s.on_disk.nbytes for s in stored if s.on_disk is not None)
    nbytes = sum(s.meta.nbytes for s in stored)
    tiers, tokens, last = _tiers(state, blocks[0]), (blocks[0].start, blocks[-1].end), blocks[-1].key
    account = state.policies.usage.account(last, nbytes, tokens, state.now_s)
    run = ExplainedRun(
        *tokens,
        tiers,
        host_bytes,
        disk_bytes,
        load_s=_load_s(state, tiers, nbytes) if account is None else _load_of(account, tiers),
        decision=_decision(state, tiers, last, nbytes),
        why=_by_last_use(tiers, places) if account is None else _by_worth(account, tiers, places),
    )
    if account is None:
        return run, ""
    return _reckoned(run, account, places), account.currency


def _reckoned(run: ExplainedRun, account: Account, places: _Places) -> ExplainedRun:
    host_worth_s = account.horizon_returns * account.host_saving_s
    disk_worth_s = account.horizon_returns * account.disk_saving_s
    price = account.gpu_second
    return ExplainedRun(
        run.start,
        run.end,
        run.tiers,
        run.host_bytes,
        run.disk_bytes,
        run.load_s,
        run.decision,
        run.why,
        returns=account.returns,
        idle_s=account.idle_s,
        best_s=account.horizon_s,
        best_returns=account.horizon_returns,
        recompute_s=account.recompute_s,
        host_worth_s=host_worth_s,
        disk_worth_s=disk_worth_s,
        host_worth=None if price is None else price * host_worth_s,
        disk_worth=None if price is None else price * disk_worth_s,
        host_per_hour=account.host_per_hour,
        disk_per_hour=account.disk_per_hour,
        host_rank=places["host"],
        disk_rank=places["disk"],
    )


def _load_of(account: Account, tiers: tuple[str, ...]) -> float:
    if "host" in tiers:
        return account.load_host_s
    return account.load_disk_s if "disk" in tiers else 0.0


def _load_s(state: NodeState, tiers: tuple[str, ...], nbytes: int) -> float:
    if not tiers:
        return 0.0
    choice = state.policies.restore.choose((Segment(0, 1, tiers[0], nbytes),), 1)
    return choice.expected_s or (choice.eta_low_s + choice.eta_high_s) / 2


def _decision(state: NodeState, tiers: tuple[str, ...], key: bytes, nbytes: int) -> str:
    if tiers == ("host", "disk"):
        return "kept in host memory and on disk; it leaves host memory without a write"
    if tiers == ("host",):
        block = state.tree.get(key)
        if block is not None and block.kept and state.settings.disk_expected:
            return "kept in host memory, one of the copies asked for; written to disk before it leaves"
        if not state.disk.ready:
            return "kept in host memory; dropped when its room is needed, since there is no disk"
        demoted = state.policies.admission.demote(key, nbytes, state.now_s)
        return f"kept in host memory; {'written to disk' if demoted else 'dropped'} when its room is needed"
    return (
        "kept on disk, and read when it is asked for" if tiers else "a part of it is missing: computed again"
    )


def _by_last_use(tiers: tuple[str, ...], places: _Places) -> str:
    return "by last use: " + ", ".join(_said(tiers, places)) if tiers else ""


def _said(tiers: tuple[str, ...], places: _Places) -> Iterator[str]:
    for tier in tiers:
        before, count = places[tier]
        yield f"{'in host memory' if tier == 'host' else 'on disk'} {before} of {count} go before it"


def _by_worth(account: Account, tiers: tuple[str, ...], places: _Places) -> str:
    said = [_expected(account), *_said(tiers, places)]
    for tier, saving_s, per_hour in (
        ("host memory", account.host_saving_s, account.host_per_hour),
        ("disk", account.disk_saving_s, account.disk_per_hour),
    ):
        if account.gpu_second is not None and per_hour is not None:
            worth = account.horizon_returns * saving_s * account.gpu_second
            price = per_hour * account.horizon_s / 3600
            said.append(
                f"{'pays' if worth > 0 and worth >= price else 'does not pay'} for its room {_in(tier)}"
            )
    return "; ".join(said)


def _in(tier: str) -> str:
    return f"on {tier}" if tier == "disk" else f"in {tier}"


def _expected(account: Account) -> str:
    if account.retired:
        return "no worker serves its model any more: worth nothing"
    if not account.waiting:
        return "nobody is expected back for it: worth nothing"
    if account.serving:
        return "a request of it is being served"
    saves = f"a use saves {account.disk_saving_s:.3g} s of computing"
    hint = "" if account.hint_trust is None else f"; with a hint, of which {account.hint_trust:.0%} come true"
    return (
        f"idle {account.idle_s:.0f} s, best kept {account.horizon_s:.0f} s more, "
        f"by when {account.horizon_returns:.0%} are back{hint}; {saves}"
    )
