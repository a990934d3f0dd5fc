"""How far the native divergence is from float64, against how far torch's own formula is in the same dtype."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_sd.ops.native import cpu_library
from tests.ops.divergences import each_divergence
from tests.ops.test_jsd_native import (
    EPS,
    each_dtype,
    pair,
    relative_error,
    value_and_gradient,
)

pytestmark = pytest.mark.skipif(
    cpu_library.LIBRARY is None, reason=f"no native library: {cpu_library.MISSING}"
)


@each_divergence
@each_dtype
@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    ("vocabulary", "temperature", "beta"), [(4999, 1.0, 0.5), (151, 0.7, 0.1), (1024, 1.5, 0.9)]
)
def test_error_is_at_most_twice_the_references(divergence, dtype, distance, vocabulary, temperature, beta):
    """Over many rows: in a few, where a value is the rest of two normalisers' rounding, either may be the
    luckier."""
    student, teacher = pair(100, vocabulary, distance=distance, dtype=dtype)
    divergence = replace(divergence, beta=beta, temperature=temperature)
    exact, exact_gradient = value_and_gradient(student.double(), teacher.double(), divergence, impl="torch")
    torch_value, torch_gradient = value_and_gradient(student, teacher, divergence, impl="torch")
    value, gradient = value_and_gradient(student, teacher, divergence, impl="cpp")
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    # terms of the first order in the distance cancel, leaving those of the second
    eps = EPS[torch.float32] + 2e-8 / distance
    assert relative_error(value, exact) <= 2 * relative_error(torch_value, exact) + eps
    # Logits are multiplied by log2(e) / temperature in float32, as if the temperature were that far off,
    # which an exponent of so
    # many nats (four standard deviations) makes an error of that many times as much.
    scale, nats = 1 / (math.log(2) * temperature), 4 * max(distance, 3.0) / temperature
    eps = EPS[dtype] + nats * abs(float(np.float32(scale)) / scale - 1)
    assert (
        relative_error(gradient, exact_gradient) <= 2 * relative_error(torch_gradient, exact_gradient) + eps
    )
