"""What a rank computes of a microbatch, on its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.microbatches import distilled_part, row_share
from megatron_sd.algorithm.packing.rows import PackedRow, RowPart, student_row, teacher_row
from megatron_sd.distributed.parallel import Parallel
from megatron_sd.ops.head.types import HeadRows
from megatron_sd.records import Microbatch


class Runs(NamedTuple):
    """Where sequences lie that follow one another in a row: what PackedRow says, on the device."""

    parts: tuple[RowPart, ...]
    positions: Tensor
    starts: Tensor
    longest: int
    keys: Tensor | None
    key_starts: Tensor
    most_seen: int

    @classmethod
    def of(cls, row: PackedRow, on_device: Callable[[np.ndarray], Tensor]) -> Runs:
        """on_device: the tensor of an array."""
        keys = row.keys
        return cls(
            parts=row.parts,
            positions=on_device(row.positions),
            starts=on_device(row.starts),
            longest=row.longest,
            keys=None if keys is None else on_device(keys),
            key_starts=on_device(row.key_starts),
            most_seen=row.most_seen,
        )

    def options(self) -> dict[str, Any]:
        """What the backbone is told: for the attention `varlen` these runs, for transformers' own kinds,
        which know no shared beginnings, their words for sequences. Flash attention takes the last four, others
        the positions."""
        return {
            "position_ids": self.positions,
            "runs": self,
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


@dataclass(frozen=True, kw_only=True)
class DeviceMicrobatch:
    """The arrays of a records.Microbatch as tensors on the device (shapes there)."""

    input_ids: Tensor
    row_index: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    row_weights: Tensor
    rollouts: Tensor
    turns: Tensor
    returns: Tensor
    old_values: Tensor
    teacher_prompts: Tensor
    teacher_prompt_lengths: Tensor
    teacher_prompt_of: Tensor
    teacher_ids: Tensor
    teacher_rows: Tensor
    query_rows: Tensor
    query_weights: Tensor
    query_in_spread: Tensor
    head_rows: HeadRows
    has_teacher: bool
    runs: Runs | None = None
    teacher_runs: Runs | None = None

    @classmethod
    def of(cls, microbatch: Microbatch, device: torch.device) -> DeviceMicrobatch:
        """Copy to the device. A packed microbatch becomes one row [1, T] of student and of teacher, with
        the rows in it."""

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        apart = ("head_rows", "has_teacher", "runs", "teacher_runs")
        tensors = {
            name: on_device(getattr(microbatch, name))
            for name in cls.__dataclass_fields__
            if name not in apart
        }
        head_rows = HeadRows(on_device(microbatch.targets), tensors["query_rows"], microbatch.query_rows)
        if microbatch.is_packed:
            row = student_row(microbatch)
            tensors |= {"input_ids": on_device(row.ids), "row_index": on_device(row.rows)}
            tensors["runs"] = Runs.of(row, on_device)
        if microbatch.is_packed and microbatch.has_teacher:
            row = teacher_row(microbatch)
            tensors |= {"teacher_ids": on_device(row.ids), "teacher_rows": on_device(row.rows)}
            tensors["teacher_runs"] = Runs.of(row, on_device)
        return cls(head_rows=head_rows, has_teacher=microbatch.has_teacher, **tensors)


def on_this_rank(microbatch: Microbatch, weights: TermWeights, parallel: Parallel) -> DeviceMicrobatch:
    """What this pass needs of the microbatch on this rank: what is distilled alone, where the policy term
    counts nothing, and this rank's rows of it, where others read the same sequences."""
    if weights.policy == 0.0:
        microbatch = distilled_part(microbatch, weights)
    own = row_share(microbatch, parallel.sequence.rank, parallel.sequence.size)
    return DeviceMicrobatch.of(own, parallel.world.device)
