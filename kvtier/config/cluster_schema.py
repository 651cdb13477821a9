"""The settings that concern other nodes, and Ray below them: the sections [ray] and [cluster]."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kvtier.config.section import MiB, Section


class RayConfig(Section, frozen=True):
    """The Ray cluster below the daemon."""

    address: Annotated[
        str,
        Meta(
            description="Cluster to join (host:port), a private one of kvtier's or as a guest; empty: begin "
            "a private one."
        ),
    ] = ""
    listen: Annotated[
        str,
        Meta(
            description="IP address of this machine at which a private cluster is heard by its other nodes; "
            "empty: loopback, for this node alone."
        ),
    ] = ""
    token_file: Annotated[
        str,
        Meta(
            description="File with the token of the Ray cluster (32 characters or more), the same on all its "
            "nodes; empty: a private cluster makes one, a guest has Ray's own settings."
        ),
    ] = ""
    gcs_storage: Annotated[
        str,
        Meta(
            description="Where a private cluster's head keeps its state: a folder for Ray's embedded store, "
            "or host:port of a Redis; empty: in memory, lost with the head."
        ),
    ] = ""
    temp_dir: Annotated[
        str,
        Meta(
            description="Ray's folder of sockets and logs; 43 bytes at most; empty: under node.runtime_dir."
        ),
    ] = ""
    object_store_bytes: Annotated[
        int,
        Meta(
            ge=80 * MiB,
            description="Ray's own object store; KV goes through it only between nodes that TCP does not "
            "connect, 64 MiB at once.",
        ),
    ] = 128 * MiB
    gcs_reconnect_s: Annotated[
        int, Meta(ge=60, description="How long actors live on without Ray's head (Ray's own default: 60 s).")
    ] = 3600
    health_check_period_s: Annotated[
        float, Meta(ge=0.1, le=60, description="How often Ray's head looks after each node.")
    ] = 0.5
    health_check_timeout_s: Annotated[
        float, Meta(ge=0.1, le=60, description="When a look counts as failed.")
    ] = 1.0
    health_check_failures: Annotated[
        int, Meta(ge=1, le=100, description="Failed looks in a row after which a node is dead.")
    ] = 3
    port_first: Annotated[
        int, Meta(ge=0, le=65535, description="First of the private cluster's ports; 0 takes free ones.")
    ] = 0
    port_count: Annotated[
        int, Meta(ge=32, le=10000, description="How many ports from port_first on it may use.")
    ] = 64


class ClusterConfig(Section, frozen=True):
    """Other nodes: what they find here, and where this one looks for them."""

    listen: Annotated[
        str,
        Meta(
            description="host:port at which other nodes reach this one, for KV and questions; empty: the "
            "node is alone."
        ),
    ] = ""
    token_file: Annotated[
        str,
        Meta(description="File with the secret (16 bytes or more) by which nodes know each other."),
    ] = ""
    directory: Annotated[
        tuple[str, ...],
        Meta(
            max_length=64,
            description="host:port of each directory service, the same list in the same order on all nodes.",
        ),
    ] = ()
    directory_listen: Annotated[
        str,
        Meta(
            description="Which entry of cluster.directory this node serves; empty: none. Its shards are made "
            "anew from the nodes' announcements after every start."
        ),
    ] = ""
    shards: Annotated[
        int,
        Meta(ge=1, le=1024, description="Parts of the directory, spread over its services; all nodes agree."),
    ] = 16
    streams: Annotated[
        int,
        Meta(
            ge=1, le=64, description="Connections that one read from a peer uses, and objects sent at once."
        ),
    ] = 4
    fallback: Annotated[
        Literal["ray", "none"],
        Meta(
            description="How this node speaks to others to which no TCP connection can be made: through Ray, "
            "slowly (ray), or not at all (none); with TLS not at all."
        ),
    ] = "none"
    wire_codec: Annotated[
        Literal["auto", "raw"],
        Meta(
            description="Whether KV is encoded on its way between nodes: where that brings it sooner and "
            "both have the packages of the extra disk (auto), or never (raw)."
        ),
    ] = "auto"
    rdma: Annotated[
        Literal["none", "auto", "force"],
        Meta(
            description="Whether KV is read straight out of other nodes' memory with NIXL, where both have "
            "its package: never (none), where both have an RDMA device too (auto), or also without one, for "
            "tests (force); with TLS never. Whoever reaches that network can read and write host memory."
        ),
    ] = "none"
    ask_s: Annotated[
        float,
        Meta(
            gt=0,
            le=10,
            description="Longest that a plan waits for the directory and for peers; then it goes on with "
            "what is here.",
        ),
    ] = 0.25
    lost_after_s: Annotated[
        float,
        Meta(ge=1, le=600, description="Silence after which the directory counts a node as lost."),
    ] = 6.0
    failure_domain: Annotated[
        str,
        Meta(
            max_length=256,
            description="What may fail at once with this node, such as a rack or a zone: copies of one "
            "conversation lie in different ones; empty: the machine's host name.",
        ),
    ] = ""
    move_bytes_per_s: Annotated[
        int,
        Meta(
            ge=0,
            description="What a node on its way out of service gives to others in a second, at most, of what "
            "its memory holds; 0: nothing.",
        ),
    ] = 256 * MiB
    rebalance_bytes_per_s: Annotated[
        int,
        Meta(
            ge=0,
            description="What a node whose last tier is full gives in a second, at most, to nodes with room, "
            "of conversations that it would drop next; 0: nothing.",
        ),
    ] = 32 * MiB
    tls_cert_file: Annotated[
        str,
        Meta(
            description="Certificate (PEM, with its chain) that this node shows to others, for the host name "
            "or address at which they reach it; empty: nodes speak in clear."
        ),
    ] = ""
    tls_key_file: Annotated[
        str, Meta(description="Key of that certificate (PEM, without a pass phrase).")
    ] = ""
    tls_ca_file: Annotated[
        str, Meta(description="Certificates (PEM) by one of which that of each other node has to be signed.")
    ] = ""
    keep_tombstones_s: Annotated[
        float,
        Meta(
            ge=60,
            description="Longest that the directory waits for an absent node to carry out what was "
            "forgotten.",
        ),
    ] = 90 * 86400.0

    @property
    def transport(self) -> str:
        """By which this node speaks to others; '' where it is alone."""
        if not self.listen:
            return ""
        return "tcp+tls" if self.tls_cert_file else "tcp"
