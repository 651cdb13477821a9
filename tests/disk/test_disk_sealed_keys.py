"""The keys of sealed blocks: kept before the index lists them, destroyed before a forget answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtier.checksum import checksum
from kvtier.disk.coder import KeyGone
from kvtier.disk.index import ConversationRecord
from kvtier.disk.keys import Keys
from kvtier.disk.vault import Vault
from kvtier.errors import CorruptObject, StaleSlot, TierUnavailable
from kvtier.testing.tier_kit import ROOT, default_meta, found, get

if TYPE_CHECKING:
    from tests.disk.conftest import Bench

NBYTES = 70_001
CODECS = ["raw", "planes-zstd"]


# -- keys


def test_forgotten_keys_are_gone_before_the_answer_and_an_old_copy_brings_nothing_back(
    sealed: Bench,
) -> None:
    for n in range(4):
        sealed.fill(n, sealed.numbers(n), CODECS[n % 2])
    copy = sealed.copy_data()
    generation = found(sealed.tier, default_meta(1, NBYTES).object_id).generation
    sealed.forget(1)
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    assert generation not in set(vault.generations())
    sealed.put_back(copy)
    assert sealed.there() == {0, 2, 3}
    assert sealed.there() == {0, 2, 3}


def test_a_forget_that_destroys_nothing_is_caught(sealed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "ended", lambda *_, **__: None)
    with pytest.raises(AssertionError):
        test_forgotten_keys_are_gone_before_the_answer_and_an_old_copy_brings_nothing_back(sealed)
    copy = sealed.directory.parent / "copy"
    sealed.put_back(copy)
    assert sealed.there() == {0, 1, 2, 3}, "the key is why"


def test_evicted_keys_wait_for_a_forget_or_the_close(sealed: Bench) -> None:
    for n in range(4):
        sealed.fill(n, sealed.numbers(n), "raw")
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    before = len(list(vault.generations()))
    sealed.tier.remove(default_meta(0, NBYTES).object_id)
    sealed.tier.commit([])
    assert len(list(vault.generations())) == before, "no flush of the key store for an eviction"
    sealed.forget(1)
    assert len(list(vault.generations())) == before - 2
    sealed.tier.remove(default_meta(2, NBYTES).object_id)
    sealed.reopen()
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    assert len(list(vault.generations())) == 2, "one block, and the mark of this opening"


def test_keys_without_a_block_are_destroyed_at_the_next_opening(sealed: Bench) -> None:
    sealed.fill(0, sealed.numbers(0), "raw")
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    stray = sealed.tier._ledger.next_generation + 5
    vault.keep([vault.new_key(stray, ROOT.tenant)])
    sealed.reopen()
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    assert stray not in set(vault.generations())
    assert sealed.there() == {0}


def test_a_key_that_is_gone_is_a_miss(sealed: Bench) -> None:
    sealed.fill(0, sealed.numbers(0), "raw")
    slot = sealed.fill(1, sealed.numbers(1), "raw")
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    vault.destroy([slot.generation])
    with pytest.raises(KeyGone):
        sealed.read(1)
    assert sealed.find(1) is None
    assert get(sealed.tier, sealed.fill(1, sealed.numbers(1), "raw")) == sealed.numbers(1)
    slot = found(sealed.tier, default_meta(0, NBYTES).object_id)
    vault.destroy([slot.generation])
    sealed.reopen()
    assert sealed.there() == {1}


def test_conversations_of_an_older_copy_are_dropped(sealed: Bench) -> None:
    sealed.tier.commit_with_records([], [ConversationRecord("t", "gone", 1, b"x")])
    copy = sealed.copy_data()
    sealed.tier.commit_with_records([], [ConversationRecord("t", "gone", 1, b"")], forget=True)
    sealed.put_back(copy)
    assert sealed.tier.record("t", "gone") is None


# -- a key store that fails


def break_vault(bench: Bench, patch: pytest.MonkeyPatch, call: str) -> None:
    def broken(*_: object) -> None:
        raise TierUnavailable("the key vault failed")

    patch.setattr(Vault, call, broken)


def test_what_cannot_be_keyed_is_not_committed(sealed: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sealed.tier.usage()
    with monkeypatch.context() as patch:
        break_vault(sealed, patch, "keep")
        with pytest.raises(TierUnavailable, match="vault"):
            sealed.fill(1, sealed.numbers(1), "raw")
    assert (sealed.find(1), sealed.tier.usage()) == (None, before)
    sealed.fill(1, sealed.numbers(1), "raw")
    assert sealed.there() == {1}


def test_a_forget_without_its_key_store_fails_and_the_next_one_makes_up_for_it(
    sealed: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = sealed.fill(1, sealed.numbers(1), "raw")
    with monkeypatch.context() as patch:
        break_vault(sealed, patch, "destroy")
        with pytest.raises(TierUnavailable, match="vault"):
            sealed.forget(1)
        monkeypatch.setattr("kvtier.disk.keys._DESTROYED_AT_ONCE", 1)
        sealed.fill(2, sealed.numbers(2), "raw")
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    assert slot.generation in set(vault.generations())
    sealed.forget()
    assert slot.generation not in set(vault.generations())
    assert sealed.there() == {2}


def test_blocks_of_a_tenant_whose_keys_were_destroyed_meanwhile_are_not_committed(sealed: Bench) -> None:
    data = sealed.numbers(1)
    vault = sealed.tier._store._keys.vault
    assert vault is not None
    slot = sealed.tier.reserve(default_meta(1, NBYTES), holder="w")
    sealed.tier.write(slot, data)
    vault.destroy_tenant(ROOT.tenant)
    with pytest.raises(StaleSlot, match="tenant"):
        sealed.tier.commit([(slot, checksum(data))])
    assert sealed.find(1) is None
    sealed.fill(1, data, "raw")
    sealed.fill(2, sealed.numbers(2), "raw")
    assert sealed.there() == {1, 2}
    vault.destroy_tenant(ROOT.tenant)
    with pytest.raises(CorruptObject):
        sealed.read(1)
    sealed.reopen()
    assert sealed.there() == set()
