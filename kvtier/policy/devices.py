"""What devices can do on paper, and what a prefill usually reaches of it: the guess before any measurement.

Peaks: dense bf16 with fp32 accumulation, without sparsity, and memory bandwidth, from the vendors' data
sheets (NVIDIA A10, A100, H100, H200, L4, L40S, B200, RTX 4090 with its Ada white paper; AMD Instinct MI300X).

Links: what one direction of the card's PCIe slot carries in practice, about 85 % of 16 lanes' nominal rate.

Utilization: training runs report 38 to 43 % of the peak on H100 ("The Llama 3 Herd of Models", 2024, table 4)
and 46 % on TPU v4 (PaLM, 2022); a prefill of long prompts is much like a training step's forward half.

CPU: benchmarks/mixed_restore.py measures 18 to 30 GFLOP/s in float32 on one thread of a busy AMD EPYC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvtier.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do: FLOP/s, their share in a long prefill, bytes/s of its memory and of its link."""

    name: str
    peak_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    utilization: float = 0.4

    @property
    def usual_flops(self) -> float:
        """FLOP/s that a long prefill usually reaches."""
        return self.peak_flops * self.utilization


_GEN4, _GEN5 = 26e9, 53e9
DEVICES: Final[dict[str, Device]] = {
    device.name: device
    for device in (
        Device("a10", 125e12, 0.6e12, _GEN4),
        Device("a10g", 70e12, 0.6e12, _GEN4),
        Device("a100", 312e12, 2.0e12, _GEN4),
        Device("b200", 2250e12, 8.0e12, _GEN5),
        Device("h100", 989e12, 3.35e12, _GEN5),
        Device("h100-pcie", 756e12, 2.0e12, _GEN5),
        Device("h200", 989e12, 4.8e12, _GEN5),
        Device("l4", 121e12, 0.3e12, _GEN4),
        Device("l40s", 362e12, 0.864e12, _GEN4),
        Device("mi300x", 1307e12, 5.3e12, _GEN5, 0.35),
        Device("rtx4090", 165e12, 1.008e12, _GEN4),
        Device("cpu", 0.02e12, 10e9, 8e9, 1.0),
    )
}

# Where nobody says what computes: a guess in the middle, far from some of them.
UNKNOWN: Final = Device("unknown", 100e12, 1e12, _GEN4)


def device_named(name: str) -> Device:
    """The device of a short name ('h100'), or of what a driver says ('NVIDIA H100 80GB HBM3').

    Raises ConfigError for an unknown one, with the names that are known.
    """
    words = re.findall(r"[a-z]+[0-9]+[a-z]*|[a-z]+|[0-9]+", name.lower().replace("rtx 4090", "rtx4090"))
    found = [known for known in DEVICES if set(known.split("-")) <= set(words)]
    if not found:
        raise ConfigError("gpu", f"'{name}' is not known", fix=f"give one of {', '.join(DEVICES)}")
    # 'H100 PCIe' is both an h100 and an h100-pcie: the name that says most.
    return DEVICES[max(found, key=len)]
