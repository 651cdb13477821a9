"""What settings must satisfy beyond their types: paths, folders, ports, and files of secrets."""

from __future__ import annotations

import ipaddress
import os
import re

from kvtier import paths
from kvtier.config.cluster_schema import ClusterConfig
from kvtier.config.schema import RAY_TEMP_DIR_MAX_BYTES, SOCKET_PATH_MAX_BYTES, Config
from kvtier.config.secrets import RAY_TOKEN_MIN_BYTES, SECRET_MIN_BYTES, TOKEN_MIN_BYTES, read_secret
from kvtier.errors import ConfigError


def check(config: Config) -> None:
    """Raise ConfigError for the first setting that cannot work, alone or with the others."""
    _check_folders(config)
    _check_sizes(config)
    _check_keys(config)
    _check_metrics(config)
    _check_ray(config)
    _check_cluster(config)
    if config.access.token_file:
        read_secret("access.token_file", config.access.token_file, TOKEN_MIN_BYTES)
    if config.access.tenant_secret_file:
        read_secret("access.tenant_secret_file", config.access.tenant_secret_file, SECRET_MIN_BYTES)


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_folders(config: Config) -> None:
    folders = {
        "node.runtime_dir": config.node.runtime_dir,
        "node.state_dir": config.node.state_dir,
        "disk.directory": config.disk_directory,
        "disk.keys_directory": config.keys_directory,
        "ray.temp_dir": config.ray_temp_dir,
    }
    if config.disk.key_file:
        folders["disk.key_file"] = config.disk.key_file
    if config.log.stimulus_log != "off":
        folders["log.stimulus_log"] = config.log.stimulus_log
    if config.policy.prices:
        folders["policy.prices"] = config.policy.prices
    for field, value in folders.items():
        if not value.startswith("/"):
            raise ConfigError(
                field, f"{value!r} is not an absolute path", fix="write a path that begins with /"
            )
        if "\0" in value:
            raise ConfigError(field, f"{value!r} holds a zero byte", fix="take it out")
    longest = max(
        len(os.fsencode(make(config.node.runtime_dir))) for make in (paths.node_socket, paths.gpu_socket)
    )
    if longest > SOCKET_PATH_MAX_BYTES:
        raise ConfigError(
            "node.runtime_dir",
            f"is {longest - SOCKET_PATH_MAX_BYTES} bytes too long for a socket's path",
            fix="name a shorter path, such as /run/kvtier",
        )
    if len(os.fsencode(config.ray_temp_dir)) > RAY_TEMP_DIR_MAX_BYTES:
        raise ConfigError(
            "ray.temp_dir",
            f"{config.ray_temp_dir!r} is longer than {RAY_TEMP_DIR_MAX_BYTES} bytes: "
            "Ray's sockets below it would not fit",
            fix="name a shorter path",
        )


def _check_sizes(config: Config) -> None:
    if config.disk.segment_bytes > config.disk.capacity_bytes:
        raise ConfigError(
            "disk.segment_bytes",
            f"{config.disk.segment_bytes} is more than disk.capacity_bytes ({config.disk.capacity_bytes})",
            fix="make segments smaller or the capacity larger",
        )


def _check_keys(config: Config) -> None:
    """Keys beside the data would be in its backups, and protect nothing."""
    keys, data = (os.path.realpath(path) for path in (config.keys_directory, config.disk_directory))
    if not config.disk.key_file:
        if config.disk.keys_directory:
            raise ConfigError(
                "disk.keys_directory",
                "is of no use without disk.key_file",
                fix="name the master key's file, or take it out",
            )
        return
    if os.path.commonpath([keys, data]) in (keys, data):
        raise ConfigError(
            "disk.keys_directory",
            f"{config.keys_directory!r} and disk.directory ({config.disk_directory!r}) lie in one another",
            fix="name a folder that is not backed up with the data",
        )
    if os.path.commonpath([os.path.realpath(config.disk.key_file), data]) == data:
        raise ConfigError(
            "disk.key_file",
            f"{config.disk.key_file!r} lies in disk.directory",
            fix="keep the master key away from the data",
        )


def _check_metrics(config: Config) -> None:
    metrics = config.metrics
    if metrics.enabled and not metrics.allow_remote and not is_loopback(metrics.host):
        raise ConfigError(
            "metrics.host",
            f"{metrics.host!r} is not a loopback address",
            fix="use 127.0.0.1, or set metrics.allow_remote = true where the network is trusted",
        )


def _check_ray(config: Config) -> None:
    ray = config.ray
    if ray.port_first and ray.port_first + ray.port_count > 65536:
        raise ConfigError(
            "ray.port_count",
            f"ports {ray.port_first} to {ray.port_first + ray.port_count - 1} go beyond 65535",
            fix="begin lower or use fewer",
        )
    if ray.port_first and ray.port_first < 1024:
        raise ConfigError("ray.port_first", f"{ray.port_first} is a privileged port", fix="use 1024 or more")
    if ray.address and not re.fullmatch(r"\S+:\d{1,5}", ray.address):
        raise ConfigError(
            "ray.address", f"{ray.address!r} is not host:port", fix='write it like "10.0.0.1:6379"'
        )
    if ray.gcs_storage and not re.fullmatch(r"/.*|\S+:\d{1,5}", ray.gcs_storage):
        raise ConfigError(
            "ray.gcs_storage",
            f"{ray.gcs_storage!r} is neither an absolute path nor host:port",
            fix='write it like "/var/lib/kvtier/gcs" or "10.0.0.9:6379"',
        )
    if ray.listen:
        _check_listen(ray.listen)
        if not ray.token_file:
            raise ConfigError(
                "ray.token_file",
                "is needed with ray.listen: other nodes need the token to join",
                fix="set it",
            )
    if ray.token_file:
        read_secret("ray.token_file", ray.token_file, RAY_TOKEN_MIN_BYTES)


def _check_cluster(config: Config) -> None:
    cluster = config.cluster
    named = {"cluster.listen": cluster.listen, "cluster.directory_listen": cluster.directory_listen}
    named |= {f"cluster.directory[{i}]": address for i, address in enumerate(cluster.directory)}
    for field, address in named.items():
        if address and not re.fullmatch(r"\S+:\d{1,5}", address):
            raise ConfigError(field, f"{address!r} is not host:port", fix='write it like "10.0.0.1:7200"')
    if cluster.directory_listen and cluster.directory_listen not in cluster.directory:
        raise ConfigError(
            "cluster.directory_listen",
            f"{cluster.directory_listen!r} is not one of cluster.directory",
            fix="write it as it stands there",
        )
    if not (cluster.listen or cluster.directory_listen):
        return
    if not cluster.directory:
        raise ConfigError("cluster.directory", "is empty", fix="name at least one directory service")
    if not cluster.token_file:
        raise ConfigError(
            "cluster.token_file", "is needed between nodes", fix="set it, with the same secret on all nodes"
        )
    read_secret("cluster.token_file", cluster.token_file, TOKEN_MIN_BYTES)
    _check_tls(cluster)
    if cluster.listen and not config.access.tenant_secret_file:
        raise ConfigError(
            "access.tenant_secret_file",
            "is needed with cluster.listen: nodes with different secrets have no key in common",
            fix="set it, with the same secret on all nodes",
        )


def _check_tls(cluster: ClusterConfig) -> None:
    """Raise ConfigError unless all files of TLS are named and there, or none is named."""
    files = {
        "cluster.tls_cert_file": cluster.tls_cert_file,
        "cluster.tls_key_file": cluster.tls_key_file,
        "cluster.tls_ca_file": cluster.tls_ca_file,
    }
    if not any(files.values()):
        return
    for field, path in files.items():
        if not path:
            raise ConfigError(field, "is needed with the other files of TLS", fix="name all three, or none")
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise ConfigError(field, f"{path} cannot be read", fix="check the path and its permissions")
    if os.stat(cluster.tls_key_file).st_mode & 0o007:
        key = cluster.tls_key_file
        raise ConfigError("cluster.tls_key_file", f"{key} is open to all users", fix=f"chmod o= {key}")


def _check_listen(listen: str) -> None:
    """Raise ConfigError unless other nodes can be told this address."""
    try:
        useless = ipaddress.ip_address(listen).is_unspecified
    except ValueError:
        useless = True
    if useless:
        raise ConfigError(
            "ray.listen", f"{listen!r} is no address of this machine", fix='write it like "10.0.0.1"'
        )
