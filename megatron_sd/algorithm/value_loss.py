"""The critic's loss on rows, one row per sampled token, and how well its values foretold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class ValueRows(NamedTuple):
    """Both [R] float32. losses: differentiable in the values. clipped: 1 where the clip bound."""

    losses: Tensor
    clipped: Tensor


def value_rows(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> ValueRows:
    """max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2, all [R] float32: an update gains nothing by
    moving a value further than c (PPO2's value clipping, as Search-R1 and verl have it)."""
    bounded = values.clamp(old_values - clip, old_values + clip)
    plain, cut = (values - returns).square(), (bounded - returns).square()
    return ValueRows(losses=0.5 * torch.maximum(plain, cut), clipped=(cut > plain).float())


def value_moments(returns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[5] float64, to be added up over microbatches and ranks: number of rows, and sum and sum of squares of
    R and of R - V."""
    returns, errors = returns.astype(np.float64), returns.astype(np.float64) - values
    columns = (returns.sum(), (returns**2).sum(), errors.sum(), (errors**2).sum())
    return np.array([len(returns), *columns])


def explained_variance(moments: Sequence[float]) -> float | None:
    """1 - Var(R - V) / Var(R), population variances, from value_moments: 1 where values foretell returns but
    for a constant, 0 where they say nothing. None where all returns are equal."""
    count, total, squares, error, error_squares = moments
    if count == 0:
        return None
    variance = squares / count - (total / count) ** 2
    if variance <= 1e-12 * max(squares / count, 1.0):
        return None
    return 1.0 - (error_squares / count - (error / count) ** 2) / variance
