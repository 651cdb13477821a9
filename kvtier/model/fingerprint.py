"""The fingerprint: which model's KV this is. KV is only ever given to a worker with an equal fingerprint.

It binds everything that changes the bytes of the KV of given tokens, or their meaning: weights, adapter,
config, KV dtype and scales, RoPE settings given to the engine, and the layout.  Two fine-tunes of one model
share a config, so weights are never left out.  What is bound without need costs misses; what is left out
would cost wrong tokens: so all of config.json counts, but for the three keys that only record its origin.
`architectures` and `dtype` count, since they choose the code and the precision that compute the KV.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.errors import FingerprintError, ModelSpecError
from kvtier.keys import hash_fields
from kvtier.model.config_json import load_config
from kvtier.model.groups import dtype_name
from kvtier.model.weights import weights_digest

_COSMETIC = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
_FLOATING = frozenset(
    {"main", "master", "trunk", "head", "latest", "default", "current", "stable", "dev", "nightly"}
)
_BARE_VERSION = re.compile(r"v?\d+([._-]\d+)*", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION_FIX = "give the commit, as in 'org/model@8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920'"


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A model's identity. digest: 32 bytes; describe: its name for people, which is not compared."""

    digest: bytes
    describe: str = field(compare=False)

    @property
    def hex(self) -> str:
        """The digest as 64 hexadecimal digits."""
        return self.digest.hex()

    @classmethod
    def of_directory(
        cls,
        path: str | os.PathLike[str],
        *,
        kv_dtype: str,
        layout: str,
        adapter: str | os.PathLike[str] | None = None,
        scales: bytes | None = None,
        rope: Mapping[str, Any] | None = None,
        full: bool = False,
    ) -> Fingerprint:
        """The fingerprint of the model in a folder with its config.json and weights files.

        layout: the engine's name for how it lays KV out, with a version, such as 'vllm-nhd/1'.  adapter: the
        folder of a LoRA adapter as a Path, or its immutable revision as a str.  scales: the KV quantization's
        scales, packed in any way; None when they come with the weights or there are none.  rope: settings
        given to the engine that override the config's.  full: digest every byte and not samples (see
        `kvtier.model.weights`); the two give different fingerprints.  Raises FingerprintError.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FingerprintError(
                f"{folder} is not a folder", fix="give the folder of config.json and weights"
            )
        config, name = _config(folder)
        weights = ("directory", weights_digest(folder, full=full))
        engine = _engine_fields(kv_dtype, layout, scales, rope)
        return cls._of(weights, config, _adapter(adapter, full=full), engine, name)

    @classmethod
    def of_revision(
        cls,
        revision: str,
        config: Mapping[str, Any] | str | Path,
        *,
        kv_dtype: str,
        layout: str,
        adapter: str | os.PathLike[str] | None = None,
        scales: bytes | None = None,
        rope: Mapping[str, Any] | None = None,
    ) -> Fingerprint:
        """The fingerprint of weights that the caller names by a string which never means other weights.

        revision: such as 'org/model@<commit>'.  The rest is as in `of_directory`.  Raises FingerprintError
        for a revision that is empty, moves ('main', 'latest'), or does not tell two models apart ('v1.0').
        """
        data, name = _config(config)
        revision = check_revision(revision)
        weights = ("revision", revision.encode())
        name = revision.partition("@")[0] if "@" in revision else name
        engine = _engine_fields(kv_dtype, layout, scales, rope)
        return cls._of(weights, data, _adapter(adapter, full=False), engine, name)

    @classmethod
    def _of(
        cls,
        weights: tuple[str, bytes],
        config: Mapping[str, Any],
        adapter: tuple[str, bytes],
        engine: list[bytes],
        name: str,
    ) -> Fingerprint:
        identity = [weights[0].encode(), weights[1], adapter[0].encode(), adapter[1]]
        fields = [*identity, canonical_json(without_cosmetic(config)), *engine]
        return cls(hash_fields(b"kvtier.f", fields), name)


def check_revision(revision: str) -> str:
    """The revision, if it can name weights for good. Raises FingerprintError.

    Only the usual mistakes can be seen; that the string never moves is the caller's word.
    """
    text = revision.strip()
    if not text:
        raise FingerprintError("the revision is empty", fix=_REVISION_FIX)
    last = re.split(r"[@:#/\s]", text.lower())[-1]
    if last in _FLOATING or "refs/" in text:
        raise FingerprintError(f"revision {revision!r} can mean other weights tomorrow", fix=_REVISION_FIX)
    if _BARE_VERSION.fullmatch(text) and len(text) < 40:
        raise FingerprintError(
            f"revision {revision!r} does not say of which model",
            fix="put the model's name in front: 'my-model@v1.2'",
        )
    if _HUB_NAME.fullmatch(text):
        raise FingerprintError(f"{revision!r} names a model, but no revision of it", fix=_REVISION_FIX)
    return text


def without_cosmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the keys that only record where it came from, at every depth."""
    return {
        key: without_cosmetic(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _COSMETIC
    }


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """One byte string for equal values, whatever the order of their keys. Raises FingerprintError."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    except (TypeError, ValueError) as error:
        raise FingerprintError(
            f"the config is not JSON: {error}", fix="give what config.json holds"
        ) from error


def _config(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    try:
        return load_config(source)
    except ModelSpecError as error:
        raise FingerprintError(error.message, fix=error.fix) from error


def _adapter(adapter: str | os.PathLike[str] | None, *, full: bool) -> tuple[str, bytes]:
    if adapter is None:
        return "none", b""
    if isinstance(adapter, str):
        return "revision", check_revision(adapter).encode()
    return "directory", weights_digest(Path(adapter), full=full)


def _engine_fields(
    kv_dtype: str, layout: str, scales: bytes | None, rope: Mapping[str, Any] | None
) -> list[bytes]:
    """KV dtype, layout, scales and RoPE overrides; what may be absent has its presence in front."""
    try:
        dtype = dtype_name(kv_dtype)
    except ModelSpecError as error:
        raise FingerprintError(f"kv_dtype: {error.message}", fix=error.fix) from error
    if not layout.strip():
        raise FingerprintError("the layout is empty", fix="name the engine's KV layout, such as 'vllm-nhd/1'")
    return [
        dtype.encode(),
        layout.encode(),
        b"none" if scales is None else b"scales" + scales,
        b"none" if rope is None else b"rope" + canonical_json(rope),
    ]
