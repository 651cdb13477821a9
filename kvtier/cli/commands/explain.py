"""`kvtier explain`."""

from __future__ import annotations

from typing import Any

import click

from kvtier.cli import exits, options
from kvtier.cli.commands.conversations import tenant_option
from kvtier.explanation import ExplainedRun, Explanation


@click.command()
@click.argument("conversation")
@tenant_option
@options.node_options
@options.json_option
@click.pass_context
def explain(ctx: click.Context, /, conversation: str, tenant: str, as_json: bool, **where: Any) -> None:
    """Tell why a conversation lies where it lies, and what it is worth there.

    Exit code 1 when it is not here; --json then writes "found": false.
    """
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        explanation = kv.explain(conversation, tenant=tenant)
    if as_json:
        output.print_json(explanation)
    elif explanation.found:
        _print(explanation)
    else:
        output.print_line(f"nothing to explain: {conversation!r} is not parked here")
    ctx.exit(exits.OK if explanation.found else exits.ANSWER_IS_NO)


def _print(explanation: Explanation) -> None:
    from kvtier.cli import output

    output.print_line(f"eviction by {explanation.policy}")
    columns = (
        "TOKENS",
        "TIERS",
        "SIZE",
        "LOAD",
        "COMPUTE",
        "5 MIN",
        "1 H",
        "1 DAY",
        "WORTH HOST",
        "WORTH DISK",
    )
    money = f"HOST, DISK {explanation.currency} AN HOUR"
    shown = (*columns, money) if explanation.currency else columns
    rows = [_row(run, priced=bool(explanation.currency)) for run in explanation.runs]
    output.print_table(shown, rows, numbers=shown[2:])
    for run in explanation.runs:
        output.print_line(f"{run.start} to {run.end}: {run.decision}; {run.why}")


def _row(run: ExplainedRun, *, priced: bool) -> tuple[str, ...]:
    from kvtier.cli import output

    chances = [f"{chance:.0%}" for chance in run.returns] or ["", "", ""]
    reckoned = bool(run.returns)
    cells = (
        f"{run.start} to {run.end}",
        ", ".join(run.tiers) or "missing",
        output.size(max(run.host_bytes, run.disk_bytes)),
        f"{run.load_s:.3g} s",
        f"{run.recompute_s:.3g} s" if reckoned else "",
        *chances,
        _worth(run.host_worth_s, run.host_worth) if reckoned else "",
        _worth(run.disk_worth_s, run.disk_worth) if reckoned else "",
    )
    return (*cells, f"{_amount(run.host_per_hour)}, {_amount(run.disk_per_hour)}") if priced else cells


def _worth(seconds: float, money: float | None) -> str:
    return f"{seconds:.3g} s" if money is None else f"{seconds:.3g} s = {money:.3g}"


def _amount(money: float | None) -> str:
    return "?" if money is None else f"{money:.3g}"
