"""The opening: what the prompts of one task begin with (rules, a worked example). It is computed once and
copied into the rows of new prompts, which then are prefilled from there on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_sd.records import TokenIds
from megatron_sd.rollout.embedded.kv_cache import RowStore

MIN_TOKENS = 128  # shorter ones are not worth a pass of their own


class Opening:
    """Its ids, and their keys and values in the only row of `store`."""

    def __init__(self, store: RowStore):
        self.store = store
        self.ids: TokenIds = ()

    def forget(self) -> None:
        """Hold nothing: the weights are others now."""
        self.ids = ()

    def better(self, prompts: Sequence[TokenIds]) -> TokenIds:
        """The opening of these new prompts, different ones, where it is worth computing in place of what is
        held; else ().

        A single prompt tells its opening from the rest only beside later ones: it is held whole, unless it
        begins as those did that came before.
        """
        if not prompts:
            return ()
        usable = [prompt[:-1] for prompt in prompts]  # a prompt's last token is fed anyway, to have logits
        held = min(common_length(self.ids, ids) for ids in usable)
        shared = min(common_length(usable[0], ids) for ids in usable)
        is_alone = len(prompts) == 1
        is_worth_it = held < MIN_TOKENS <= shared if is_alone else shared - held >= MIN_TOKENS
        return usable[0][:shared] if is_worth_it else ()

    def length_in(self, prompt_ids: TokenIds) -> int:
        """Tokens of a new prompt that need not be computed."""
        length = common_length(self.ids, prompt_ids[:-1])
        return length if length >= MIN_TOKENS else 0

    def copy_to(self, target: RowStore, rows: np.ndarray, length: int) -> None:
        """Copy its first `length` places into rows of another store."""
        target.reserve(int(rows.max()) + 1, length)
        for own, other in zip(self.store.tensors, target.tensors):
            other[torch.from_numpy(rows).to(other.device), :, :length] = own[:1, :, :length]


def common_length(first: TokenIds, second: TokenIds) -> int:
    """Tokens with which both begin."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    return next(n for n in range(most) if first[n] != second[n])
