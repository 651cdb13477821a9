"""Reads a Hugging Face config.json: finds the text model's keys, checks their types, names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtier.errors import ModelSpecError
from kvtier.model.groups import dtype_name

_TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config")

# Published configs leave these out and rely on the defaults of the model's own code.
_MODEL_DEFAULTS: dict[str, dict[str, object]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
    },
    "gemma4_text": {"sliding_window_pattern": 6},
    "cohere2": {"sliding_window_pattern": 4},
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False},
    "qwen3_moe": {"use_sliding_window": False},
}

# Guessing at these would give a geometry that misses a part of the KV.
_UNSUPPORTED: dict[str, str] = {
    "block_configs": "other head counts in each layer",
    "cross_attention_layers": "cross-attention KV, which belongs to images and not to tokens",
    "index_head_dim": "a sparse-attention indexer with a key cache of its own",
    "hybrid_layer_pattern": "sliding layers with other head counts",
    "zero_expert_num": "two attentions in each layer",
}


class ConfigReader:
    """Typed access to one section of a config. `where` names the section in errors."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self._data = data
        self.where = where
        self.model_type = str(data.get("model_type") or "")

    def get(self, *names: str) -> Any:
        """The first of these keys that is there and not null, or None."""
        return next((self._data[n] for n in names if self._data.get(n) is not None), None)

    def has(self, *names: str) -> bool:
        """Whether any of these keys is there and not null."""
        return self.get(*names) is not None

    def count(self, *names: str) -> int:
        """A positive integer that must be there, under any of these names."""
        value = self.optional_count(*names)
        if value is None:
            raise ModelSpecError(f"{self.where}: {names[0]} is missing", fix=f"add {' or '.join(names)}")
        return value

    def optional_count(self, *names: str) -> int | None:
        """A positive integer or None when absent. Raises ModelSpecError for anything else."""
        value = self.get(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            name = next(n for n in names if self._data.get(n) is not None)
            raise ModelSpecError(f"{self.where}: {name} is {value!r}", fix="it must be a positive integer")
        return value

    def zero_or_count(self, name: str) -> int:
        """Zero when absent, null or 0, else a positive integer."""
        return 0 if self.get(name) in (None, 0) else self.count(name)

    def integers(self, *names: str) -> list[int]:
        """A list of integers. Raises ModelSpecError for anything else."""
        value = self.get(*names)
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            problem = f"{self.where}: {names[0]} is {value!r}"
            raise ModelSpecError(problem, fix="it must be a list of integers")
        return value

    def section(self, name: str) -> ConfigReader:
        """A nested object. Raises ModelSpecError when it is not one."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ModelSpecError(f"{self.where}: {name} is {value!r}", fix="it must be a JSON object")
        return ConfigReader(value, f"{self.where}: {name}")

    def head_dim(self) -> int:
        """Elements of an attention head: `head_dim`, or hidden size over heads."""
        explicit = self.optional_count("head_dim", "kv_channels", "attention_head_dim")
        if explicit is not None:
            return explicit
        hidden = self.count("hidden_size", "n_embd", "d_model")
        heads = self.count("num_attention_heads", "n_head", "n_heads")
        if hidden % heads:
            raise ModelSpecError(
                f"{self.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}",
                fix="add head_dim",
            )
        return hidden // heads


def load_config(source: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """A config as a dict, and the model's name as far as it is known.

    source: the config itself, the path of a config.json, or of its folder.  Raises ModelSpecError.
    """
    if isinstance(source, Mapping):
        return dict(source), str(source.get("_name_or_path") or source.get("model_type") or "model")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        problem = f"cannot read {path}: {error.strerror}"
        raise ModelSpecError(problem, fix="give a config.json or its folder") from error
    except ValueError as error:
        raise ModelSpecError(f"{path} is not JSON: {error}", fix="give a Hugging Face config.json") from error
    if not isinstance(data, dict):
        raise ModelSpecError(f"{path} holds no JSON object", fix="give a Hugging Face config.json")
    return data, model_name(path.resolve().parent, data)


def model_name(folder: Path, config: Mapping[str, Any]) -> str:
    """A name for people: what the config says, the hub's name of a cached snapshot, or the folder's name."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return str(config.get("_name_or_path") or folder.name)


def text_reader(config: Mapping[str, Any]) -> ConfigReader:
    """The section that describes the language model, with its model type's defaults filled in.

    Raises ModelSpecError for what kvtier does not understand: better no geometry than a wrong one.
    """
    data, where = dict(config), "config.json"
    while section := next((s for s in _TEXT_SECTIONS if isinstance(data.get(s), Mapping)), None):
        data, where = dict(data[section]), f"{where}: {section}"
    merged = {**_MODEL_DEFAULTS.get(str(data.get("model_type")), {}), **data}
    for key, meaning in _UNSUPPORTED.items():
        if merged.get(key):
            raise ModelSpecError(f"{where}: {key} means {meaning}", fix="this model is not supported")
    if merged.get("is_encoder_decoder"):
        raise ModelSpecError(f"{where}: is_encoder_decoder is true", fix="only decoder models are supported")
    return ConfigReader(merged, where)


def compute_dtype(config: Mapping[str, Any], text: ConfigReader) -> str | None:
    """The dtype that the config names, in the text section or outside; None when it names none."""
    name = text.get("dtype", "torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    return None if name in (None, "auto") else dtype_name(name)


def row_dtype(config: Mapping[str, Any], text: ConfigReader, kv_dtype: str | None) -> str:
    """The dtype of KV rows: the caller's, else the model's. Raises ModelSpecError when neither is known."""
    if kv_dtype is not None and kv_dtype != "auto":
        return dtype_name(kv_dtype)
    quantization = text.get("quantization_config") or config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("kv_cache_scheme"):
        raise ModelSpecError(
            "quantization_config: kv_cache_scheme asks for quantized KV, which not every engine follows",
            fix="say which one yours uses: kv_dtype='fp8_e4m3', or kv_dtype='bfloat16'",
        )
    dtype = compute_dtype(config, text)
    if dtype is None:
        problem = f"{text.where}: dtype (or torch_dtype) is missing"
        raise ModelSpecError(problem, fix="give kv_dtype, such as 'bfloat16'")
    return dtype
