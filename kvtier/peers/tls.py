"""TLS between nodes: each shows a certificate, and holds the other's to one authority."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from kvtier.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. cert: of this node, with its chain; key: of that; ca: who signs those of all nodes."""

    cert: str
    key: str
    ca: str


def server_side(files: TlsFiles) -> ssl.SSLContext:
    """For connections that are accepted: nobody without a certificate comes in. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, files)


def client_side(files: TlsFiles) -> ssl.SSLContext:
    """For connections that are opened: the certificate has to name the host that was called.

    Raises ConfigError.
    """
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), files)


def _loaded(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # A pass phrase is asked for at a terminal otherwise, and nobody is there.
        context.load_cert_chain(files.cert, files.key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cluster.tls_cert_file",
            f"{files.cert} and {files.key} are no certificate with its key: {error}",
            fix="name a PEM certificate and its key without a pass phrase",
        ) from error
    try:
        context.load_verify_locations(files.ca)
    except OSError as error:
        raise ConfigError(
            "cluster.tls_ca_file", f"{files.ca} holds no certificate: {error}", fix="name a PEM certificate"
        ) from error
    return context
