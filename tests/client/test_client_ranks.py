"""A worker that is one of several ranks, against a scripted node of this release and of an older one."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import msgspec
import pytest

from kvtier import errors
from kvtier.client.aio import AsyncWorker
from kvtier.client.shards import Shards
from kvtier.messages import protocol
from kvtier.messages.calls import Attach, Attached, JoinPlan, MakePlan, Planned
from kvtier.model.spec import ModelSpec
from kvtier.objects import Shard
from kvtier.receipts import Plan, TokenRange

OTHER = Shard(0, 1, 2, 2)
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "hidden_size": 64, "intermediate_size": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
MLA = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
}


def newer(kit):
    """A node that makes one act of what ranks do; answers what workers attach with."""
    sent = []

    def attach(peer, message):
        sent.append(message)
        answer = Attached(
            id=message.id,
            worker="worker:1",
            arena_bytes=[1 << 20],
            generation_slots=64,
            gpu_socket=kit.node.gpu_path,
            mode="worker",
            joins_ranks=True,
        )
        peer.send(answer, kit.node.arena.fds)

    kit.node.answers[Attach] = attach
    return sent


def joining(peer, message):
    plan = Plan(message.plan_id, "chat", "acme", 40, (TokenRange(0, 40, "host"),))
    return Planned(id=message.id, plan=plan, front_key=b"f" * 32, front_tokens=32)


@contextlib.contextmanager
def rank_of(kit):
    ranks = Shards((kit.shard, OTHER))
    with kit.connect() as kv, kv.attach(kit.model, kit.pool, shard=kit.shard, ranks=ranks) as worker:
        yield worker


def test_attach_says_who_belongs_to_it(kit):
    sent = newer(kit)
    with rank_of(kit) as worker:
        assert worker.attached
        assert [message.ranks for message in sent] == [[kit.shard.name, OTHER.name]]


def test_one_rank_is_alone(kit):
    ranks = Shards((kit.shard,))
    with kit.connect() as kv, kv.attach(kit.model, kit.pool, shard=kit.shard, ranks=ranks) as worker:
        assert worker.attached


def test_a_rank_joins_another_ones_plan(kit):
    newer(kit)
    kit.node.answers[JoinPlan] = joining
    with rank_of(kit) as worker:
        plan = worker.join("n1.7")
        assert (plan.plan_id, plan.load_tokens, plan.front.tokens) == ("n1.7", 40, 32)
        with pytest.raises(errors.ConfigError):
            worker.join("")


def test_and_with_asyncio(kit):
    newer(kit)
    kit.node.answers[JoinPlan] = joining

    async def join(worker):
        return await AsyncWorker(worker).join("n1.7")

    with rank_of(kit) as worker:
        assert asyncio.run(join(worker)).load_tokens == 40


def test_without_a_daemon_a_rank_computes_everything(kit):
    newer(kit)
    with rank_of(kit) as worker:
        kit.node.stop()
        kit.until(lambda: not worker.attached, "the worker notices")
        plan = worker.join("n1.7")
        assert (plan.plan_id, plan.load_tokens, plan.reason) == ("", 0, "daemon_unavailable")


def test_an_older_node_is_refused_with_a_clear_word(kit):
    """It would make a promise for each rank alone."""
    with kit.connect() as kv:
        threads, fds = threading.active_count(), kit.open_fds()
        with pytest.raises(errors.VersionMismatch, match="several ranks"):
            kv.attach(kit.model, kit.pool, shard=kit.shard, ranks=Shards((kit.shard, OTHER)))
        kit.until(lambda: (threading.active_count(), kit.open_fds()) <= (threads, fds), "all is given back")


def test_a_shard_that_is_none_of_the_ranks(kit):
    with kit.connect() as kv, pytest.raises(errors.GeometryError, match="none of the slices"):
        kv.attach(kit.model, kit.pool, shard=kit.shard, ranks=Shards((OTHER, OTHER)))


class OldPlan(MakePlan, frozen=True, tag="make_plan"):
    """Of a release that has one field more."""

    more: int = 7


@pytest.mark.parametrize("most", [None, 12])
def test_fields_that_a_peer_does_not_know_are_passed_over(most):
    sent = OldPlan(worker="w", conversation="c", tenant="t", tokens=b"", most_tokens=most)
    body = protocol.encode(sent)[protocol.LENGTH.size :]
    read = protocol.decode(body)
    assert type(read) is MakePlan and read.most_tokens == most
    plain = msgspec.structs.asdict(MakePlan(worker="w", conversation="c", tenant="t", tokens=b""))
    assert plain["most_tokens"] is None


# --- slices -----------------------------------------------------------------------------------------------


def test_the_slices_of_a_group():
    ranks = Shards.of(ModelSpec.from_config(LLAMA), tp=2, pp=2)
    assert ranks.names == ["L0+2.H0+2", "L0+2.H2+2", "L2+2.H0+2", "L2+2.H2+2"]
    assert len(ranks) == 4 and ranks[3] == Shard(2, 2, 2, 2)


@pytest.mark.parametrize(
    ("config", "tp", "distinct"),
    [(LLAMA, 4, 4), (LLAMA, 8, 4), (MLA, 4, 1)],
    ids=["heads", "copies", "latent"],
)
def test_ranks_with_the_same_kv_have_equal_slices(config, tp, distinct):
    assert len(set(Shards.of(ModelSpec.from_config(config), tp=tp).names)) == distinct


@pytest.mark.parametrize("ranks", [(), ("L0+1.H0+2",)])
def test_what_names_no_slices(ranks):
    with pytest.raises(errors.GeometryError):
        Shards(ranks)
