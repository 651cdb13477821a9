"""`kvtier record`: what a daemon was told, checked by replay, and as a trace for the simulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from kvtier.cli import options
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.config.schema import Config
    from kvtier.policy.interfaces import Policies

_PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("log", type=_PATH, required=False)
@options.config_option
@options.set_option
@click.option("--check/--no-check", default=True, help="Replay the log and compare every instruction.")
@click.option("--trace", type=click.File("w", lazy=True), help="Write its requests as kvtrace/1, no text.")
@click.option("--scenario", type=click.File("w", lazy=True), help="Write how fast it was as a scenario.")
@click.option("--against", type=_PATH, help="Simulate its services as fast as in this log of another run.")
@options.json_option
def record(
    log: Path | None,
    config_file: str | None,
    settings: tuple[str, ...],
    check: bool,
    trace: TextIO | None,
    scenario: TextIO | None,
    against: Path | None,
    as_json: bool,
) -> None:
    """Check a daemon's log of stimuli, and make a load of it for `kvtier simulate`.

    A daemon writes LOG where its setting log.stimulus_log says; that file is taken where none is named. The
    check gives the simulator's core what the daemon's was told, measurements included: every instruction has
    to be the same. It needs the node's settings, for its secret and its policies.
    """
    from kvtier.cli import output

    config = options.read_config(config_file, settings)
    path = log or _configured(config.log.stimulus_log)
    facts: list[tuple[str, str]] = [("log", str(path))]
    if check:
        facts += _checked(path, config)
    if against is not None:
        facts += _compared(path, against, config)
    if scenario is not None:
        facts += _measured(path, config, scenario)
    if trace is not None:
        facts.append(("requests", str(_written(path, trace))))
    if as_json:
        output.print_json(dict(facts))
    else:
        output.print_facts(facts)


def _checked(path: Path, config: Config) -> list[tuple[str, str]]:
    from kvtier.config.secrets import tenant_secret
    from kvtier.sim.stimuli import replay_log

    with open(path, "rb") as stream:
        done = replay_log(stream, _policies(config), tenant_secret(config))
    return [("starts", str(done.starts)), ("identical", f"{done.stimuli} of {done.stimuli} stimuli")]


def _compared(path: Path, against: Path, config: Config) -> list[tuple[str, str]]:
    from kvtier.config.secrets import tenant_secret
    from kvtier.sim.calibration import calibrate
    from kvtier.sim.open_loop import compare
    from kvtier.sim.stimuli import entries_of

    secret = tenant_secret(config)
    with open(path, "rb") as stream, open(against, "rb") as other:
        speeds = calibrate(entries_of(other), _policies(config), secret)
        decisions = compare(entries_of(stream), _policies(config), secret, speeds)
    differ = sum(not decision.same for decision in decisions)
    share = 100 * differ / len(decisions) if decisions else 0.0
    loaded = sum(sum(d.recorded.from_tiers.values()) for d in decisions if d.recorded is not None)
    misplaced = 100 * sum(d.misplaced_tokens for d in decisions) / loaded if loaded else 0.0
    return [
        ("decisions", str(len(decisions))),
        ("simulated otherwise", f"{differ} ({share:.1f} %)"),
        ("tokens in another tier", f"{misplaced:.1f} %"),
    ]


def _measured(path: Path, config: Config, scenario: TextIO) -> list[tuple[str, str]]:
    from kvtier.config.secrets import tenant_secret
    from kvtier.sim.machine import machine_of, scenario_text
    from kvtier.sim.stimuli import entries_of

    with open(path, "rb") as stream:
        machine = machine_of(entries_of(stream), _policies(config), tenant_secret(config))
    text = scenario_text(machine)
    scenario.write(text)
    return [("speeds", str(text.count(" = ")))]


def _written(path: Path, trace: TextIO) -> int:
    from kvtier.sim.stimuli import load_of_log
    from kvtier.sim.workload.write import kvtrace_lines

    with open(path, "rb") as stream:
        load = load_of_log(stream)
    for line in kvtrace_lines(load):
        trace.write(line)
    return load.total


def _policies(config: Config) -> Callable[[], Policies]:
    from kvtier.daemon.policies import configured_policies

    return lambda: configured_policies(config)


def _configured(path: str) -> Path:
    """The log that a daemon with these settings writes."""
    if path == "off":
        raise ConfigError(
            "log.stimulus_log",
            "is off, so this node records nothing",
            fix="set it to a file in the node's TOML and start the daemon again",
        )
    if not Path(path).is_file():
        raise ConfigError("log.stimulus_log", f"there is no file '{path}' yet", fix="start the daemon")
    return Path(path)
