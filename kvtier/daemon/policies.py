"""The policies of a node as its configuration names them."""

from __future__ import annotations

from kvtier.config.load import Config
from kvtier.errors import ConfigError
from kvtier.policy.defaults import make_policies
from kvtier.policy.interfaces import Policies
from kvtier.policy.prices import Money, money_of


def configured_policies(config: Config) -> Policies:
    """New ones. Raises ConfigError, also for a file of prices that cannot be read or lacks one."""
    policy = config.policy
    return make_policies(policy.eviction, policy.restore, policy.queue_scale, configured_money(config))


def configured_money(config: Config) -> Money:
    """The prices that policy.prices names. Raises ConfigError."""
    path = config.policy.prices
    if not path:
        return Money()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("policy.prices", f"{path} cannot be read: {error}") from error
    return money_of(text, config.policy.device)
