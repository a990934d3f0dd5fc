"""The divergences that tests go through."""

from dataclasses import replace

import pytest

from megatron_sd.ops.divergence import Divergence
from megatron_sd.ops.native.structs import NATIVE_DIVERGENCES

JSD = Divergence(kind="jsd", beta=0.5, temperature=1.0)


def each_of(kinds, like=JSD):
    """The parameter `divergence`: `like`, but of each of these kinds."""
    return pytest.mark.parametrize("divergence", [replace(like, kind=kind) for kind in kinds], ids=kinds)


each_divergence = each_of(NATIVE_DIVERGENCES)
