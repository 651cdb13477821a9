"""What a run is worth, in words' worth of numbers: for people who ask why."""

from __future__ import annotations

from kvtier.policy.prices import Money
from kvtier.policy.usage import Account
from kvtier.policy.worth import worth_of
from kvtier.policy.worth_runs import Book, Run

# Within which a return is asked for, s.
WITHIN_S = (300.0, 3600.0, 86400.0)


def account_of(
    book: Book,
    run: Run,
    nbytes: int,
    tokens: tuple[int, int],
    money: Money,
    hint_trust: float | None,
) -> Account:
    """Of tokens [start, end) of the run, in nbytes."""
    idle_s = run.idle_s(book.now_s)
    waits = run.waiting and run.curve is not None and book.now_s < run.keep_until_s
    returns, horizon_s, horizon_returns = (0.0, 0.0, 0.0), 0.0, 0.0
    if waits and run.curve is not None:
        curve = run.curve.whole
        age_s = run.curve_age_s(book.now_s)
        chances = curve.returns_within(WITHIN_S, age_s)
        returns = (float(chances[0]), float(chances[1]), float(chances[2]))
        best = worth_of(curve, age_s)
        horizon_s, horizon_returns = best.horizon_s, best.returns
    start, end = tokens
    host, disk = money.tier("host"), money.tier("disk")
    return Account(
        waiting=waits,
        serving=run.waiting and run.serving,
        idle_s=idle_s,
        returns=returns,
        horizon_s=horizon_s,
        horizon_returns=horizon_returns,
        recompute_s=(end - start) * book.token_s(run.model, (start + end) // 2),
        load_host_s=nbytes * book.load_s("host"),
        load_disk_s=nbytes * book.load_s("disk"),
        host_saving_s=nbytes * book.saving_s(run, "host"),
        disk_saving_s=nbytes * book.saving_s(run, "disk"),
        gpu_second=money.gpu_second(),
        host_per_hour=None if host is None else host.keeping(nbytes, 3600.0),
        disk_per_hour=None if disk is None else disk.keeping(nbytes, 3600.0),
        disk_write=None if disk is None else disk.writing(nbytes),
        hint_trust=hint_trust,
        retired=book.retired(run.model),
        currency=money.prices.currency if money.prices is not None else "",
    )
