"""`kvtier doctor`: what the machine can do for the GPU tier, and what is wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from kvtier.cli import exits, options

if TYPE_CHECKING:
    from kvtier.gpu.cuda.inspect import Facts, Finding

MARKS = {"good": "ok", "note": "note", "bad": "BAD"}


@click.command()
@options.json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Tell what the machine can do for the GPU tier, and what is wrong, each with the fix.

    Needs no daemon and no GPU. Exits with 1 where something keeps the GPU tier from working.
    """
    from kvtier.gpu.cuda.inspect import gather, judge

    facts = gather()
    findings = judge(facts)
    _show(facts, findings, as_json)
    if any(finding.grade == "bad" for finding in findings):
        ctx.exit(exits.ANSWER_IS_NO)


def _show(facts: Facts, findings: list[Finding], as_json: bool) -> None:
    from kvtier.cli import output

    if as_json:
        output.print_json({"facts": asdict(facts), "findings": [asdict(finding) for finding in findings]})
        return
    rows = []
    for finding in findings:
        rows.append((MARKS[finding.grade], finding.about, finding.text))
        # A row of its own, so that neither is cut where a program reads, nor long where a person does.
        rows += [("", "fix", finding.fix)] if finding.fix else []
    output.print_table(("", "ABOUT", "FINDING"), rows)
