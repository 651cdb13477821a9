"""Every setting of a node: its type, bounds, default and meaning. `config.py` fills it in.

What concerns other nodes, and Ray below them, stands in cluster_schema.py.
Durations end in _s (float seconds), sizes in _bytes (int); TOML and the command line may write "500ms"
and "8GiB" for them. The descriptions are the documentation: `kvtier config show` and docs/operations.md
repeat them.
"""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from kvtier import paths
from kvtier.config.cluster_schema import ClusterConfig, RayConfig
from kvtier.config.section import GiB, MiB, Section

# A socket's path has at most 107 bytes, and Ray adds up to 64 (session_<time>_<pid>/sockets/plasma_store).
SOCKET_PATH_MAX_BYTES = 107
RAY_TEMP_DIR_MAX_BYTES = SOCKET_PATH_MAX_BYTES - 64

Origin: TypeAlias = Literal["default", "file", "argument"]


class NodeConfig(Section, frozen=True):
    """Name and folders of this node."""

    name: Annotated[
        str,
        Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name in receipts, metrics and the directory."),
    ] = msgspec.field(default_factory=socket.gethostname)
    runtime_dir: Annotated[str, Meta(description="Folder of the sockets; made with mode 0700.")] = (
        msgspec.field(default_factory=lambda: str(paths.default_runtime_dir()))
    )
    state_dir: Annotated[str, Meta(description="Folder of secrets and of the records that `down` needs.")] = (
        msgspec.field(default_factory=lambda: str(paths.default_state_dir()))
    )
    grace_s: Annotated[
        float,
        Meta(
            ge=0, le=3600, description="Time that `down` gives running copies and writes before it ends them."
        ),
    ] = 10.0


class HostConfig(Section, frozen=True):
    """The arena in host memory."""

    capacity_bytes: Annotated[
        Annotated[int, Meta(ge=1 * MiB)] | Literal["auto"],
        Meta(description='Hard bound of the arena; "auto" is half of what memory limits leave.'),
    ] = "auto"
    headroom_bytes: Annotated[
        int,
        Meta(ge=0, description="Memory that the arena always leaves to the rest of the machine or cgroup."),
    ] = 2 * GiB
    spill_above: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="Share of the arena above which what only it holds is written to disk ahead of need; "
            "1 writes only when room is needed.",
        ),
    ] = 0.7
    prefault: Annotated[
        bool,
        Meta(description="Touch all pages at the start, in the background: a first touch costs ten copies."),
    ] = True
    huge_pages: Annotated[
        Literal["auto", "off"],
        Meta(
            description='Huge pages for the arena: "auto" asks for them where '
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled allows; the status says what was got."
        ),
    ] = "auto"
    numa: Annotated[
        Literal["auto", "off"], Meta(description='One sub-arena for each NUMA node ("auto"), or one for all.')
    ] = "auto"
    verify: Annotated[
        Literal["always", "arrival"],
        Meta(description="Check payload checksums on every copy to the GPU, or only on arrival from disk."),
    ] = "always"


class DiskConfig(Section, frozen=True):
    """The object store on NVMe."""

    enabled: Annotated[bool, Meta(description="Whether this node keeps KV on disk at all.")] = True
    directory: Annotated[
        str, Meta(description="Folder of the store, on a local drive; empty: `disk` under node.state_dir.")
    ] = ""
    capacity_bytes: Annotated[
        int, Meta(ge=16 * MiB, description="Hard bound of all that the store keeps on the drive.")
    ] = 64 * GiB
    segment_bytes: Annotated[
        int, Meta(ge=1 * MiB, le=64 * GiB, description="Size of one preallocated file of the store.")
    ] = 256 * MiB
    direct_io: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description='O_DIRECT: "auto" uses it where the file system can; "on" refuses to start without.'
        ),
    ] = "auto"
    scrub_bytes_per_s: Annotated[
        int,
        Meta(ge=0, description="Pace at which all that is stored is read again and checked; 0 never does."),
    ] = 16 * MiB
    written_bytes_per_day: Annotated[
        int,
        Meta(
            ge=0,
            description="Hard bound on what the drive is written in any 24 hours, headers and padding "
            "included; 0 sets none. Beyond it parks stay in host memory, and say why.",
        ),
    ] = 0
    codec: Annotated[
        Literal["raw", "lz4", "planes-lz4", "planes-zstd"],
        Meta(description="Lossless codec of blocks whose park and tenant name none."),
    ] = "raw"
    key_file: Annotated[
        str,
        Meta(
            description="File with the master key (32 bytes, or 64 hexadecimal digits) under which all that "
            "is stored is encrypted; empty: nothing is. Without it nothing of the store can be read."
        ),
    ] = ""
    keys_directory: Annotated[
        str,
        Meta(
            description="Folder of the wrapped keys of all blocks, away from disk.directory and its backups; "
            "empty: `keys` under node.state_dir."
        ),
    ] = ""


class TenantConfig(Section, frozen=True):
    """What one tenant has otherwise: the table [tenants.NAME]."""

    codec: Annotated[
        Literal["", "raw", "lz4", "planes-lz4", "planes-zstd"],
        Meta(description="Lossless codec of the tenant's blocks on disk; empty: disk.codec."),
    ] = ""


class GpuConfig(Section, frozen=True):
    """Copies between a worker's pool and the arena."""

    copy_threads: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Threads of the CPU copy engine for pools that the GPU service maps; for others the "
            "engine is the worker's own, with up to four.",
        ),
    ] = 2
    batch_bytes: Annotated[
        int,
        Meta(
            ge=64 << 10, le=1 * GiB, description="Bytes of one batch: what cannot be cancelled once it began."
        ),
    ] = 64 * MiB
    batches_in_flight: Annotated[
        int,
        Meta(
            ge=1,
            le=64,
            description="Batches that one park or restore has under way: while one ends, others copy. "
            "All of them bound how soon it can be cut off.",
        ),
    ] = 3


class PolicyConfig(Section, frozen=True):
    """What is kept and how it is brought back."""

    eviction: Annotated[
        Literal["lru", "cost"],
        Meta(
            description='What leaves a tier first: what was used longest ago ("lru"), or what is worth least '
            'for its room ("cost"), by learned return times and by what computing and loading take.'
        ),
    ] = "cost"
    prices: Annotated[
        str,
        Meta(
            description="File of prices (see deploy/prices.toml): `kvtier explain` then speaks of money, and "
            '"cost" writes to disk only what pays for its write; empty: nothing is known of money.'
        ),
    ] = ""
    device: Annotated[
        str,
        Meta(description="Which price of [gpu_hour] in policy.prices counts; empty where there is only one."),
    ] = ""
    retire_after_s: Annotated[
        float,
        Meta(
            ge=0,
            description="KV of a model is worth nothing once no worker has served its fingerprint for so "
            'long, while workers serve another of the same name; with eviction "cost".',
        ),
    ] = 3600.0
    prefetch_s: Annotated[
        float,
        Meta(
            ge=0,
            description='With eviction "cost": conversations that are expected back within so long are read '
            "from disk into host memory while nobody waits for the disk, if that pays; 0: none are.",
        ),
    ] = 3600.0
    restore: Annotated[
        Literal["load", "cost"],
        Meta(
            description='Restore plans: "load" brings back all that is stored; "cost" loads, recomputes or '
            "does both, whatever gives the first token sooner, for workers that show their model's config."
        ),
    ] = "cost"
    queue_scale: Annotated[
        float,
        Meta(
            ge=0,
            le=1000,
            description='With "cost": how much a second of the GPU counts for each request that waits in a '
            "worker's prefill queue; 0 looks at the asking request alone.",
        ),
    ] = 1.0
    keep_learned_s: Annotated[
        float,
        Meta(
            ge=1,
            le=3600,
            description="How often what was learned of costs and return times is written to node.state_dir; "
            "it is written at the end in any case.",
        ),
    ] = 60.0


class LeasesConfig(Section, frozen=True):
    """How long rights to slots last."""

    plan_s: Annotated[
        float,
        Meta(
            gt=0, le=3600, description="Longest time that a plan holds its blocks, whatever the caller asks."
        ),
    ] = 30.0
    copy_s: Annotated[
        float, Meta(gt=0, le=600, description="A copy that takes longer loses its slots; they go to limbo.")
    ] = 10.0


class AccessConfig(Section, frozen=True):
    """Who may talk to the node, and its secrets."""

    allowed_uids: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...],
        Meta(description="User ids that may connect without a token, besides the daemon's own."),
    ] = ()
    token_file: Annotated[
        str,
        Meta(description="File with the token (16 characters or more) for all other users; empty: none may."),
    ] = ""
    tenant_secret_file: Annotated[
        str,
        Meta(
            description="File with the secret (32 bytes or more) in all block keys; empty: one is made in "
            "node.state_dir. Another secret makes all parked KV a miss."
        ),
    ] = ""


class MetricsConfig(Section, frozen=True):
    """/metrics, /healthz and /readyz."""

    enabled: Annotated[bool, Meta(description="Whether the endpoints are served.")] = True
    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 takes any free one.")] = 0
    allow_remote: Annotated[
        bool, Meta(description="Allow an address beyond loopback: the endpoints ask for no credentials.")
    ] = False


class LogConfig(Section, frozen=True):
    """What is written down."""

    stimulus_log: Annotated[
        str,
        Meta(
            min_length=1,
            description='File that gets every stimulus of the node core, to replay it; or "off".',
        ),
    ] = "off"


class Config(Section, frozen=True):
    """All settings of a node. origins: dotted names that did not keep their default, and who set them."""

    node: NodeConfig = msgspec.field(default_factory=NodeConfig)
    host: HostConfig = HostConfig()
    disk: DiskConfig = DiskConfig()
    gpu: GpuConfig = GpuConfig()
    policy: PolicyConfig = PolicyConfig()
    leases: LeasesConfig = LeasesConfig()
    access: AccessConfig = AccessConfig()
    metrics: MetricsConfig = MetricsConfig()
    ray: RayConfig = RayConfig()
    cluster: ClusterConfig = ClusterConfig()
    log: LogConfig = LogConfig()
    tenants: dict[str, TenantConfig] = {}
    origins: dict[str, Origin] = {}

    @property
    def disk_directory(self) -> str:
        """Folder of the disk store, whether or not it was named."""
        return self.disk.directory or f"{self.node.state_dir}/disk"

    @property
    def keys_directory(self) -> str:
        """Folder of the wrapped keys, whether or not it was named."""
        return self.disk.keys_directory or f"{self.node.state_dir}/keys"

    @property
    def ray_temp_dir(self) -> str:
        """Ray's temporary folder; where node.runtime_dir is too long for it, one in the system's own."""
        if self.ray.temp_dir:
            return self.ray.temp_dir
        beside = f"{self.node.runtime_dir}/ray"
        if len(os.fsencode(beside)) <= RAY_TEMP_DIR_MAX_BYTES:
            return beside
        digest = hashlib.sha256(os.fsencode(self.node.runtime_dir)).hexdigest()
        return f"{tempfile.gettempdir()}/kvtier-ray-{digest[:12]}"
