"""Certificates for tests, made with the openssl command: an authority, and what it has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")


class Files(NamedTuple):
    """Paths of PEM files: a certificate, its key, and who signed it."""

    cert: str
    key: str
    ca: str


def make_authority(folder: Path, name: str) -> Path:
    """An authority's certificate; its key is beside it. Raises FileNotFoundError where openssl is not."""
    folder.mkdir(parents=True, exist_ok=True)
    ca = folder / f"{name}.pem"
    _openssl("-subj", f"/CN={name}", "-keyout", str(ca.with_suffix(".key")), "-out", str(ca))
    return ca


def make_certificate(ca: Path, name: str, host: str = "127.0.0.1") -> Files:
    """A certificate for an address that `ca` has signed, in its folder."""
    cert, key = ca.with_name(f"{name}.pem"), ca.with_name(f"{name}.key")
    _openssl(
        *("-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{host}"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
        *("-CA", str(ca), "-CAkey", str(ca.with_suffix(".key"))),
        *("-keyout", str(key), "-out", str(cert)),
    )
    key.chmod(0o600)
    return Files(str(cert), str(key), str(ca))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", "req", "-x509", *_KEY, *arguments], check=True, capture_output=True)
