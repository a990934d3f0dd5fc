"""Which divergence of teacher and student: its kind, and what it is taken with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sd.errors import ConfigError

ROW_DIVERGENCES = ("jsd", "forward_kl", "reverse_kl", "mse")  # of two rows of logits
SAMPLED = "sampled"  # of the sampled token's two log-probabilities
DIVERGENCES = (*ROW_DIVERGENCES, SAMPLED)
SUPPORTS = ("teacher", "student")  # whose likeliest tokens top_k keeps


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A divergence of the teacher's P = softmax(logits / temperature) and the student's Q, row by row.

    kind: "jsd" is beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q and 0 < beta < 1
    (TRL's generalised JSD; at beta = 0.5 the paper's), "forward_kl" KL(P || Q), "reverse_kl" KL(Q || P),
    "mse" the sum of (P - Q)^2; jsd_reference.py has the gradients too. "sampled" is log Q - log P of the
    token that was sampled, at the rollouts' temperature (ops/head/sampled.py). beta counts for "jsd" alone.
    top_k: both are restricted to the k likeliest tokens and renormalised, as the paper does; None: the full
    vocabulary. support: whose likeliest, the teacher's (SD-Search, OPSD) or the student's (SDFT, SDPO).
    tail_bucket: with top_k, all other tokens together are one more event (SDPO), instead of nothing.
    entry_clip: every entry's summand is cut there from above before they are summed (OPSD's jsd_token_clip);
    negative summands stay, so a value may fall below 0; None: off. scale_by_temperature_squared: times
    temperature^2, which keeps the size of the gradient in the logits (Hinton et al., 2015, section 2). Raises
    ConfigError for a value out of range, and for a tail bucket, or the student's support, without top_k, and
    for a sampled one with what counts for whole rows alone.
    """

    kind: str
    beta: float
    temperature: float
    top_k: int | None = None
    tail_bucket: bool = False
    support: str = "teacher"
    entry_clip: float | None = None
    scale_by_temperature_squared: bool = False

    @property
    def scale(self) -> float:
        """What every value is multiplied by."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0

    def check_vocabulary(self, size: int) -> None:
        """Raises ConfigError for a top_k above the number of tokens."""
        if self.top_k is not None and self.top_k > size:
            raise ConfigError(f"distill.top_k is {self.top_k}, expected at most the vocabulary size {size}")

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
        if self.support not in SUPPORTS:
            raise ConfigError(f"distill.support is {self.support!r}, expected one of {SUPPORTS}")
        if self.support == "student" and self.top_k is None:
            raise ConfigError(
                "distill.support is 'student' with distill.top_k null, expected a top_k: the full vocabulary is"
                " everyone's support"
            )
        if self.entry_clip is not None and not self.entry_clip > 0.0:
            raise ConfigError(
                f"distill.entry_clip is {self.entry_clip}, expected more than 0, or null for none"
            )
        if self.kind == SAMPLED and (self.top_k, self.entry_clip, self.temperature) != (None, None, 1.0):
            raise ConfigError(
                f"distill.divergence is {SAMPLED!r} with distill.top_k {self.top_k}, distill.entry_clip"
                f" {self.entry_clip} and distill.temperature {self.temperature}, expected null, null and 1:"
                " it looks at one token, at the rollouts' temperature"
            )
