"""Where each Hugging Face parameter lands in a vLLM worker, by model family.

vLLM's rules (0.32): q, k and v are stacked in qkv_proj, gate and up in gate_up_proj, by rows, each cut by
heads or rows; o_proj and down_proj are cut by columns; embedding and head are cut by rows after padding the
vocabulary to a multiple of 64; with fewer key-value heads than workers each head is held by several; a tied
head is the embedding; everything else is whole everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sd.errors import ConfigError, ReshardError
from megatron_sd.resharding.layout import Rectangle, TensorSpec, WorkerLayout, WorkerTensor, check_tiling

VOCABULARY_MULTIPLE = 64


class UnknownArchitectureError(ReshardError):
    """No description of this model family here: publish it by gathering full parameters."""


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """The sizes of a decoder of the Llama kind, as far as its weights depend on them."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "vocabulary": config["vocab_size"],
        "tied": config["tie_word_embeddings"],
    }


def _qwen2(config: Mapping[str, Any]) -> DecoderSizes:
    return DecoderSizes(**_common(config), qkv_bias=True)


def _qwen3(config: Mapping[str, Any]) -> DecoderSizes:
    return DecoderSizes(**_common(config), qkv_bias=bool(config.get("attention_bias")), qk_norm=True)


def _llama(config: Mapping[str, Any]) -> DecoderSizes:
    bias = bool(config.get("attention_bias"))
    return DecoderSizes(
        **_common(config), qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias"))
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], DecoderSizes]] = {
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "LlamaForCausalLM": _llama,
}


def model_shape(config: Mapping[str, Any]) -> DecoderSizes:
    """From a Hugging Face configuration as a dictionary. Raises UnknownArchitectureError for a family not
    described here."""
    names = config.get("architectures") or []
    known = [name for name in names if name in FAMILIES]
    if not known:
        raise UnknownArchitectureError(
            f"architecture {', '.join(names) or 'unnamed'} has no shard layout, expected one of"
            f" {', '.join(FAMILIES)}: its full parameters are gathered on every rank for each publish;"
            " describe the family in resharding/names.py to reshard it"
        )
    try:
        return FAMILIES[known[0]](config)
    except KeyError as error:
        raise ConfigError(
            f"the configuration of {known[0]} lacks {error}, expected a complete config.json"
        ) from error


def worker_layouts(config: Mapping[str, Any], *, tp_size: int, dtype: str) -> tuple[WorkerLayout, ...]:
    """The tensors of each of `tp_size` workers, in tensor-parallel rank order. Raises
    UnknownArchitectureError, and ConfigError for a number of workers that the model cannot be cut for."""
    shape = model_shape(config)
    _check_divides(shape, tp_size)
    layouts = []
    for rank in range(tp_size):
        cut = _Cut(shape=shape, tp_rank=rank, tp_size=tp_size, dtype=dtype)
        layouts.append(WorkerLayout(tp_rank=rank, tp_size=tp_size, tensors=tuple(cut.tensors())))
        check_tiling(layouts[-1])
    return tuple(layouts)


def whole_parameters(config: Mapping[str, Any], *, dtype: str) -> tuple[TensorSpec, ...]:
    """The parameters that the trainer must have; a tied head is not among them."""
    (whole,) = worker_layouts(config, tp_size=1, dtype=dtype)
    return tuple(
        TensorSpec(
            name=piece.parameter,
            shape=(piece.rows[1], piece.columns[1])[: len(tensor.spec.shape)],
            dtype=dtype,
        )
        for tensor in whole.tensors
        for piece in tensor.pieces
    )


def _check_divides(shape: DecoderSizes, tp_size: int) -> None:
    fewer, more = sorted((shape.num_kv_heads, tp_size))  # heads are cut, or held by several workers
    uneven = {
        f"{shape.num_heads} attention heads": shape.num_heads % max(tp_size, 1),
        f"{shape.num_kv_heads} key-value heads": more % max(fewer, 1),
        f"intermediate size {shape.intermediate}": shape.intermediate % max(tp_size, 1),
        f"padded vocabulary {_padded(shape.vocabulary)}": _padded(shape.vocabulary) % max(tp_size, 1),
    }
    problems = [quantity for quantity, rest in uneven.items() if rest]
    if tp_size < 1 or problems:
        raise ConfigError(
            f"tensor-parallel size: found {tp_size}, expected one that divides the model evenly"
            + (
                f"; {', '.join(problems)} cannot be shared so: choose a divisor of {shape.num_heads}"
                if problems
                else ""
            )
        )


def _padded(vocabulary: int) -> int:
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One worker's part of the model."""

    shape: DecoderSizes
    tp_rank: int
    tp_size: int
    dtype: str

    def tensors(self) -> Iterator[WorkerTensor]:
        shape = self.shape
        yield self._vocabulary("model.embed_tokens.weight")
        for layer in range(shape.num_layers):
            yield from self._attention(f"model.layers.{layer}.self_attn")
            yield from self._mlp(f"model.layers.{layer}.mlp")
            yield self._replicated(f"model.layers.{layer}.input_layernorm.weight", shape.hidden)
            yield self._replicated(f"model.layers.{layer}.post_attention_layernorm.weight", shape.hidden)
        yield self._replicated("model.norm.weight", shape.hidden)
        if not shape.tied:
            yield self._vocabulary("lm_head.weight")

    def _attention(self, prefix: str) -> Iterator[WorkerTensor]:
        shape = self.shape
        heads = _part(shape.num_heads, self.tp_rank, self.tp_size)
        if shape.num_kv_heads >= self.tp_size:
            kv_heads = _part(shape.num_kv_heads, self.tp_rank, self.tp_size)
        else:
            head = self.tp_rank * shape.num_kv_heads // self.tp_size
            kv_heads = (head, head + 1)
        parts = [
            (f"{prefix}.{name}", (owned[0] * shape.head_dim, owned[1] * shape.head_dim))
            for name, owned in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        ]
        yield from self._stacked(f"{prefix}.qkv_proj", parts, bias=shape.qkv_bias)
        yield from self._by_columns(f"{prefix}.o_proj", parts[0][1], bias=shape.out_bias)
        if shape.qk_norm:
            yield self._replicated(f"{prefix}.q_norm.weight", shape.head_dim)
            yield self._replicated(f"{prefix}.k_norm.weight", shape.head_dim)

    def _mlp(self, prefix: str) -> Iterator[WorkerTensor]:
        rows = _part(self.shape.intermediate, self.tp_rank, self.tp_size)
        parts = [(f"{prefix}.{name}", rows) for name in ("gate_proj", "up_proj")]
        yield from self._stacked(f"{prefix}.gate_up_proj", parts, bias=self.shape.mlp_bias)
        yield from self._by_columns(f"{prefix}.down_proj", rows, bias=self.shape.mlp_bias)

    def _stacked(
        self, name: str, parts: Sequence[tuple[str, tuple[int, int]]], *, bias: bool
    ) -> Iterator[WorkerTensor]:
        """Rows of several matrices of [.., hidden], one below the other, and so their biases."""
        for suffix, num_columns in (("weight", self.shape.hidden), ("bias", 1))[: 1 + bias]:
            pieces, at = [], 0
            for module, rows in parts:
                pieces.append(
                    Rectangle(parameter=f"{module}.{suffix}", rows=rows, columns=(0, num_columns), at_row=at)
                )
                at += rows[1] - rows[0]
            yield self._tensor(f"{name}.{suffix}", (at, num_columns)[: 1 + (suffix == "weight")], pieces)

    def _by_columns(self, name: str, columns: tuple[int, int], *, bias: bool) -> Iterator[WorkerTensor]:
        """Columns of a matrix of [hidden, ..]; its bias is whole."""
        weight = f"{name}.weight"
        piece = Rectangle(parameter=weight, rows=(0, self.shape.hidden), columns=columns)
        yield self._tensor(weight, (self.shape.hidden, columns[1] - columns[0]), [piece])
        if bias:
            yield self._replicated(f"{name}.bias", self.shape.hidden)

    def _replicated(self, name: str, length: int) -> WorkerTensor:
        return self._tensor(name, (length,), [Rectangle(parameter=name, rows=(0, length), columns=(0, 1))])

    def _vocabulary(self, name: str) -> WorkerTensor:
        part = _padded(self.shape.vocabulary) // self.tp_size
        start, stop = (min(rank * part, self.shape.vocabulary) for rank in (self.tp_rank, self.tp_rank + 1))
        piece = Rectangle(parameter=name, rows=(start, stop), columns=(0, self.shape.hidden))
        return self._tensor(name, (part, self.shape.hidden), [piece], num_padding_rows=part - (stop - start))

    def _tensor(
        self, name: str, shape: tuple[int, ...], pieces: Sequence[Rectangle], num_padding_rows: int = 0
    ) -> WorkerTensor:
        spec = TensorSpec(name=name, shape=shape, dtype=self.dtype)
        return WorkerTensor(spec=spec, pieces=tuple(pieces), num_padding_rows=num_padding_rows)


def _part(count: int, rank: int, size: int) -> tuple[int, int]:
    return rank * count // size, (rank + 1) * count // size
