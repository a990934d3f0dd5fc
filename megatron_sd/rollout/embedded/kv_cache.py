"""Keys and values of many conversations: a transformers Cache that decoding reads as views, with shared
prompts stored once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from megatron_sd.errors import ConfigError

_BLOCK = 64  # positions by which rows grow
_GROWTH = 1.5  # and at least by this factor, so that copies are amortised


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """What a model keeps of a token. num_heads: key-value heads, of every layer. widths: of a head's keys
    of layer 0, its values of layer 0, and so on. is_attended: attention reads it as it is kept (not so
    where a layer keeps a compressed form)."""

    num_heads: int
    widths: tuple[int, ...]
    is_attended: bool


class StateProbe(Cache):
    """Notes, by layer, the shapes of keys and values that a model hands to its cache (kept) and to its
    attention (attended)."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.attended: dict[int, tuple[torch.Size, torch.Size]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple:
        """As the model calls it."""
        self.kept[layer_idx] = key_states.shape, value_states.shape
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As the model calls it."""
        return 0


@torch.inference_mode()
def state_shape(model: PreTrainedModel, *, through: str | None = None) -> StateShape:
    """From one token's pass, since families differ and configurations do not say how. through: the option
    under which attention gets the cache, where it does. Raises ConfigError for a model that keeps something
    else."""
    probe, token = StateProbe(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    handed_on = {through: probe} if through else {}
    model(input_ids=token, position_ids=token, past_key_values=probe, use_cache=True, **handed_on)
    shapes = [shape for layer in sorted(probe.kept) for shape in probe.kept[layer]]
    num_layers, num_heads = model.config.get_text_config().num_hidden_layers, {shape[1] for shape in shapes}
    if sorted(probe.kept) != list(range(num_layers)) or len(num_heads) != 1:
        raise ConfigError(
            f"rollout.engine: found torch with a {model.config.model_type} model of {num_layers} layers, of"
            f" which {len(probe.kept)} keep keys and values, of {sorted(num_heads)} heads; expected all, of"
            " one number: choose vllm"
        )
    widths = tuple(shape[3] for shape in shapes)
    return StateShape(num_heads=num_heads.pop(), widths=widths, is_attended=probe.attended == probe.kept)


class RowStore:
    """Per layer a pair of tensors [rows, key-value heads, capacity, width of a head], zero-filled: keys of
    layer 0, values of layer 0, and so on. Widths may differ from tensor to tensor.

    Rows and capacity grow on demand, up to max_rows and max_length.
    """

    def __init__(
        self, shape: StateShape, *, max_rows: int, max_length: int, dtype: torch.dtype, device: torch.device
    ):
        self._shape = shape
        self._max_rows, self._max_length = max_rows, max_length
        self._dtype, self._device = dtype, device
        self.num_rows, self.capacity = 0, 0
        self.give_back()

    def give_back(self) -> None:
        """Hold no row, and no memory; what is reserved next is as large as what was held, so that it need
        not grow again."""
        self._held_before = self.num_rows, self.capacity
        self.num_rows, self.capacity = 0, 0
        self.tensors = [self._zeros(width, 0, 0) for width in self._shape.widths]

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _zeros(self, width: int, num_rows: int, capacity: int) -> torch.Tensor:
        return torch.zeros(
            num_rows, self._shape.num_heads, capacity, width, dtype=self._dtype, device=self._device
        )

    def reserve(self, num_rows: int, length: int) -> None:
        """Make room for `num_rows` rows of `length` positions, keeping what is there."""
        if num_rows <= self.num_rows and length <= self.capacity:
            return
        old_rows, old_capacity = self.num_rows, self.capacity
        if not old_rows:
            num_rows, length = max(num_rows, self._held_before[0]), max(length, self._held_before[1])
        if num_rows > old_rows:
            self.num_rows = min(max(num_rows, int(_GROWTH * old_rows)), self._max_rows)
        if length > old_capacity:
            blocks = -(-max(length, int(_GROWTH * old_capacity)) // _BLOCK)
            self.capacity = min(blocks * _BLOCK, self._max_length)
        for n, width in enumerate(self._shape.widths):
            old = self.tensors[n]
            self.tensors[n] = self._zeros(width, self.num_rows, self.capacity)
            self.tensors[n][:old_rows, :, :old_capacity] = old

    def index(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """[m, heads, T] flat indices, in units of a head's width, of places [m, T] in rows [m]."""
        num_heads = self._shape.num_heads
        heads = rows[:, None, None] * num_heads + np.arange(num_heads)[None, :, None]
        return heads * self.capacity + places[:, None, :]

    def copy_rows(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        """Copy the first `length` places of rows. All sources are read before a target is written: rows can
        be swapped."""
        self.reserve(int(max(sources.max(), targets.max())) + 1, length)
        source, target = (torch.from_numpy(rows).to(self._device) for rows in (sources, targets))
        for tensor in self.tensors:
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear_row_if_broken(self, row: int) -> None:
        """Zero a row that holds a number which is not finite: no mask can hide that from the row's next
        user."""
        if row < self.num_rows and not all(torch.isfinite(tensor[row]).all() for tensor in self.tensors):
            for tensor in self.tensors:
                tensor[row].zero_()


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: entry i [of m] feeds T tokens of one conversation, whose cached tokens lie in at
    most two places.

    rows: [m] of the store that the pass writes. positions: [m, T] in the conversation; valid: [m, T] bool,
    False for padding, which is not written (its positions are 0). shared: [m] how many of its first tokens
    lie in row prompt_rows[i] ([m]) of the shared prompts; the others lie in its own row. Attention reads
    `shared_width` places of prompts, then `width` of own rows.
    """

    rows: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    shared: np.ndarray
    prompt_rows: np.ndarray

    @cached_property
    def places(self) -> np.ndarray:
        """[m, T] in the own row; negative or meaningless for padding."""
        return self.positions - self.shared[:, None]

    @cached_property
    def width(self) -> int:
        """Places of the longest own row."""
        return int(self.places.max(initial=0, where=self.valid)) + 1

    @cached_property
    def shared_width(self) -> int:
        """Places of the longest shared prompt."""
        return int(self.shared.max())

    def hidden(self) -> np.ndarray:
        """[m, T, shared_width + width] bool: what each token may not attend to. No token is without
        anything to attend to."""
        shared, positions = self.shared[:, None, None], self.positions[:, :, None]
        beyond_prompt = np.broadcast_to(
            np.arange(self.shared_width) >= shared, (*self.positions.shape, self.shared_width)
        )
        return np.concatenate([beyond_prompt, np.arange(self.width) + shared > positions], axis=2)


class RowCache(Cache):
    """`rows`: a conversation each, without its shared prompt if it has one. `prompts`: prompts that several
    of them share.

    `bind` says before each forward pass where its keys and values go and what its attention reads.
    """

    def __init__(self, rows: RowStore, prompts: RowStore, *, device: torch.device):
        super().__init__(layers=[])
        self.rows, self.prompts = rows, prompts
        self._device = device

    def bind(self, store: RowStore, step: Pass) -> None:
        """The next pass writes `store`, which is `rows` or `prompts`. Rows that follow each other are read
        as views, others are copied for the pass; so are shared prompts, unless a decode plan lets
        `row_attention` read them in place."""
        store.reserve(int(step.rows.max()) + 1, step.width)
        index = store.index(step.rows, step.places)
        self._source = None
        if not step.valid.all():
            kept = np.broadcast_to(step.valid[:, None, :], index.shape).reshape(-1)
            self._source = torch.from_numpy(np.flatnonzero(kept)).to(self._device)
            index = index.reshape(-1)[kept]
        self._store, self._index = store, torch.from_numpy(index.reshape(-1)).to(self._device)
        self._width, self._shared_width = step.width, step.shared_width
        contiguous = bool((np.diff(step.rows) == 1).all())
        ends = int(step.rows[0]), int(step.rows[-1]) + 1
        self._rows = slice(*ends) if contiguous else torch.from_numpy(step.rows).to(self._device)
        self._prompt_rows = torch.from_numpy(step.prompt_rows).to(self._device)
        is_planned = step.shared_width > 0 and step.positions.shape[1] == 1
        self.decode_plan = DecodePlan(step, self._device) if is_planned else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object
    ) -> tuple:
        """Write new states [m, heads, T, head_dim]; return the keys and values to attend to, [m, heads,
        places, head_dim].

        With a decode plan these are the own rows only.
        """
        return tuple(
            self._write_read(2 * layer_idx + n, states) for n, states in enumerate((key_states, value_states))
        )

    def _write_read(self, number: int, states: torch.Tensor) -> torch.Tensor:
        tensor = self._store.tensors[number]
        width = tensor.shape[3]
        flat = states.reshape(-1, width)
        tensor.view(-1, width).index_copy_(
            0, self._index, flat if self._source is None else flat[self._source]
        )
        own = (
            tensor[self._rows, :, : self._width]
            if isinstance(self._rows, slice)
            else tensor[:, :, : self._width][self._rows]
        )
        if not self._shared_width or self.decode_plan is not None:
            return own
        return torch.cat(
            [self.prompts.tensors[number][:, :, : self._shared_width][self._prompt_rows], own], dim=2
        )

    def shared_prompts(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [prompts, heads, shared width, head_dim] of the prompts of the decode plan, as
        views."""
        count = self.decode_plan.num_prompts
        return tuple(
            t[:count, :, : self._shared_width]
            for t in self.prompts.tensors[2 * layer_idx : 2 * layer_idx + 2]
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The visible width: rows differ in length, and positions are always given."""
        return self._width


class DecodePlan:
    """How the entries of a decode pass meet their shared prompts: entries of one prompt become query
    positions of one row.

    gather: [num_prompts * most] entry of each (prompt, seat), some seats empty (entry 0). seat: [m] flat
    (prompt, seat) of each entry. shares: [m] bool, False for entries without a shared prompt, whose seat is
    arbitrary.
    """

    def __init__(self, step: Pass, device: torch.device):
        shares = step.shared > 0
        entries = np.flatnonzero(shares)
        prompts = step.prompt_rows[entries]
        order = np.argsort(prompts, kind="stable")
        counts = np.bincount(prompts)
        rank = np.arange(len(entries)) - (np.cumsum(counts) - counts)[prompts[order]]
        self.num_prompts, self.most = len(counts), int(counts.max())
        seat = np.zeros(len(shares), dtype=np.int64)
        seat[entries[order]] = prompts[order] * self.most + rank
        gather = np.zeros(self.num_prompts * self.most, dtype=np.int64)
        gather[seat[entries]] = entries
        self.gather, self.seat, self.shares = (torch.from_numpy(a).to(device) for a in (gather, seat, shares))

    def to_prompts(self, states: torch.Tensor) -> torch.Tensor:
        """[m, heads, g, d] -> [prompts, heads, most * g, d]."""
        _, heads, group, size = states.shape
        seated = states[self.gather].view(self.num_prompts, self.most, heads, group, size)
        return seated.transpose(1, 2).reshape(self.num_prompts, heads, self.most * group, size)

    def to_entries(self, states: torch.Tensor) -> torch.Tensor:
        """[prompts, heads, most * g, d] -> [m, heads, g, d]; what entries without a prompt get means
        nothing."""
        _, heads, seats, size = states.shape
        seated = states.view(self.num_prompts, heads, self.most, seats // self.most, size).transpose(1, 2)
        return seated.reshape(self.num_prompts * self.most, heads, seats // self.most, size)[self.seat]
