"""Did two runs take the same AdamW steps, up to the rounding of their gradients?

A bound on each parameter cannot say: AdamW divides a gradient by its own size, so where a gradient is
nearly 0 its rounding decides which way a parameter goes, by as much as the learning rate. Compared is what
rounding can be measured against:

- the first moment, which is linear in the gradients, tensor by tensor, relative to its norm;
- how far a tensor moved, relative to its whole movement.

Measured between one rank and two (own microbatches, shared sequences, shared layers) after four steps, with
ATEN_CPU_CAPABILITY default and avx2, on 1 and 2 threads: moments differ by at most 7e-5 of their norm,
movements by 4e-3 (a key's bias). tests/training/test_policy.py shows that one rollout of sixteen left out
does not pass either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

MOMENT_SHARE = 5e-4
MOVEMENT_SHARE = 2e-2
NOISE_SHARE = 1e-6  # of all gradients' norm: a tensor's moment below it is rounding alone

Tensors = Mapping[str, Tensor]
Part = tuple[int, Tensor]  # where a rank's elements of a flat tensor begin, and they


def assert_same_steps(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    """found, expected: the outcomes of rank_programs.update_steps on all ranks that hold parts."""
    assert_same_movement(found[0]["parameters"], expected[0]["parameters"], expected[0]["start"])
    assert_same_moments(
        *(joined([outcome["moments"] for outcome in outcomes]) for outcomes in (found, expected))
    )


def assert_same_movement(found: Tensors, expected: Tensors, start: Tensors) -> None:
    """Parameters by name after equal steps from `start`."""
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        movement = (parameter - start[name]).double().norm().item()
        apart = (found[name] - parameter).double().norm().item()
        assert apart <= MOVEMENT_SHARE * movement, (
            f"{name}: {apart:.3g} apart after a movement of {movement:.3g}"
        )


def assert_same_moments(found: Tensors, expected: Tensors) -> None:
    """First moments by name, after equal steps."""
    assert found.keys() == expected.keys()
    noise = NOISE_SHARE * sum(moment.double().norm().item() ** 2 for moment in expected.values()) ** 0.5
    for name, moment in expected.items():
        apart = (found[name].flatten() - moment.flatten()).double().norm().item()
        norm = moment.double().norm().item()
        assert apart <= MOMENT_SHARE * norm + noise, (
            f"{name}: moments of norm {norm:.3g} are {apart:.3g} apart"
        )


def joined(parts: Sequence[Mapping[str, Part]]) -> dict[str, Tensor]:
    """Flat tensors, of the parts that some ranks hold; each element once."""
    names = {name: None for own in parts for name in own}
    pieces = {
        name: sorted((own[name] for own in parts if name in own), key=lambda part: part[0]) for name in names
    }
    for name, own in pieces.items():
        ends = [start + len(elements) for start, elements in own]
        assert [start for start, _ in own] == [0, *ends[:-1]], name
    return {name: torch.cat([elements for _, elements in own]) for name, own in pieces.items()}


def saved_moments(shards: Path) -> dict[str, Tensor]:
    """First moments, flat, of a checkpoint's shards (training/state/optimizer_state.py)."""
    return joined([moments_of(path) for path in sorted(shards.glob("rank_*.safetensors"))])


def moments_of(path: Path) -> dict[str, Part]:
    """First moments in one rank's file; none before the first step."""
    with safe_open(path, "pt") as file:
        places, keys = json.loads(file.metadata()["places"]), set(file.keys())
        kept = {name: start for name, (start, _) in places.items() if f"{name}:exp_avg" in keys}
        return {name: (start, file.get_tensor(f"{name}:exp_avg")) for name, start in kept.items()}
