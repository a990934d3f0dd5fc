"""Sampling by inverse CDF with counter-based noise: a token depends on its logits, its rollout's seed and
its position alone."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def rollout_seed(run_seed: int, *, step: int, question_id: str, index: int) -> int:
    """The seed of one rollout, in [0, 2**63): a pure hash, so that nothing about randomness needs saving
    for a resume."""
    key = f"{run_seed}/{step}/{index}/{question_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The splitmix64 output function (Steele, Lea and Flood, 2014), elementwise on uint64 with
    wrap-around."""
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def splitmix64_of(*values: int) -> int:
    """A hash of integers in [0, 2**64), in [0, 2**64)."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        state = splitmix64(state + np.uint64(value))
    return int(state[0])


def uniform_noise(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[n] float32 in [0, 1), multiples of 2**-24: one number per (seed, absolute token position). Both are
    [n] integers."""
    bits = splitmix64(splitmix64(seeds.astype(np.uint64)) + positions.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def sample(
    logits: torch.Tensor, temperatures: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row: ids [n] int64 and their log-probabilities [n] float32 (nats) under
    softmax(logits / temperature).

    logits: [n, V] on any device. temperatures: [n]; 0 takes the most likely token, its log-probability at
    temperature 1. noise: [n] float32 in [0, 1). The id is the first whose cumulative probability exceeds
    noise * total, so a token of probability 0 is never drawn. A row with a NaN or infinite logit (-inf
    excepted) has log-probability NaN.
    """
    scaled = logits.float()
    greedy = temperatures == 0
    scale = np.where(greedy, 1.0, temperatures).astype(np.float32)
    if (scale != 1).any():
        scaled = scaled / torch.from_numpy(scale).to(logits.device)[:, None]
    probabilities = torch.softmax(scaled, dim=-1)
    if greedy.all():
        ids = probabilities.argmax(dim=-1, keepdim=True)
    else:
        cumulative = probabilities.cumsum(dim=-1)
        threshold = torch.from_numpy(noise).to(logits.device)[:, None] * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
        if greedy.any():
            best = probabilities.argmax(dim=-1, keepdim=True)
            ids = torch.where(torch.from_numpy(greedy).to(logits.device)[:, None], best, ids)
    logprobs = probabilities.gather(1, ids).log()
    return ids[:, 0].cpu().numpy(), logprobs[:, 0].cpu().numpy()
