"""The sizes of a model: from its directory, or for planning without one, by name."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from megatron_sd.errors import ConfigError, DataError


def _qwen25(sizes: tuple[int, int, int, int, int], *, tied: bool, positions: int = 32_768) -> dict[str, Any]:
    hidden, intermediate, layers, heads, kv_heads = sizes
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151_936 if tied else 152_064,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
    }


# From the models' published config.json.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen25((896, 4864, 24, 14, 2), tied=True),
    "qwen2.5-1.5b": _qwen25((1536, 8960, 28, 12, 2), tied=True),
    "qwen2.5-3b": _qwen25((2048, 11_008, 36, 16, 2), tied=True),
    "qwen2.5-7b": _qwen25((3584, 18_944, 28, 28, 4), tied=False),
    "qwen2.5-14b": _qwen25((5120, 13_824, 48, 40, 8), tied=False),
    "qwen2.5-32b": _qwen25((5120, 27_648, 64, 40, 8), tied=False),
    "qwen2.5-72b": _qwen25((8192, 29_568, 80, 64, 8), tied=False),
}


def model_config(path: str) -> dict[str, Any]:
    """The config.json of a model directory; where there is none, the sizes that its name stands for
    (models/Qwen2.5-7B-Instruct).

    Raises DataError for a broken config.json, ConfigError for a directory that is not there and whose name
    says nothing.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"no model configuration at {file} ({error}), expected a Hugging Face model directory"
            ) from error
    name = Path(path).name.lower().removesuffix("-instruct")
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known by name are {', '.join(MODELS)}"
    raise ConfigError(f"model {path}: found neither {file} nor a known name, expected one of them; {hint}")
