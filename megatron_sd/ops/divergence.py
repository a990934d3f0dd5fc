"""Which divergence of teacher and student: its kind, and what it is taken with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sd.errors import ConfigError

DIVERGENCES = ("jsd", "forward_kl", "reverse_kl", "mse")


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A divergence of two rows of logits, the teacher's and the student's; formulas: jsd_reference.py.

    kind: one of DIVERGENCES. beta: the teacher's share of the mixture M = beta P + (1 - beta) Q, 0 < beta <
    1; it counts for "jsd" alone. temperature: both distributions are softmax(logits / temperature). top_k:
    both are restricted to the teacher's k likeliest tokens and renormalised; None: the full vocabulary.
    tail_bucket: with top_k, all other tokens together are one more event, instead of nothing. Raises
    ConfigError for a value out of range, or a tail bucket without top_k.
    """

    kind: str
    beta: float
    temperature: float
    top_k: int | None = None
    tail_bucket: bool = False

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ConfigError(f"distill.divergence is {self.kind!r}, expected one of {DIVERGENCES}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"distill.beta is {self.beta}, expected 0 < beta < 1: the generalised JSD vanishes at both"
                " ends; for the KL divergences set distill.divergence to forward_kl or reverse_kl"
            )
        if not self.temperature > 0.0:
            raise ConfigError(f"distill.temperature is {self.temperature}, expected more than 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"distill.top_k is {self.top_k}, expected at least 1, or null for the full vocabulary"
            )
        if self.tail_bucket and self.top_k is None:
            raise ConfigError(
                "distill.tail_bucket is true with distill.top_k null, expected a top_k: all tokens leave no"
                " tail"
            )
