"""What values of distill.* go together, and with which of the rest (checks.py: all others)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_sd.config.run import Config


def check_distill(config: Config) -> None:
    """Raise ConfigError for values of distill.* that do not go together, naming both keys."""
    _check_divergence(config)
    _check_weights(config)
    _check_teacher(config)
    _check_evidence(config)


def _check_teacher(config: Config) -> None:
    distill = config.distill
    if distill.teacher == "other" and distill.teacher_path is None:
        raise ConfigError(
            "distill.teacher_path: found none with distill.teacher other, expected the directory of the model"
            " that teaches, as --distill.teacher_path DIRECTORY"
        )
    if distill.teacher != "other" and distill.teacher_path is not None:
        raise ConfigError(
            f"distill.teacher_path: found {distill.teacher_path!r} with distill.teacher {distill.teacher},"
            " expected none, or teacher other: no other teacher reads that model"
        )
    if distill.block == "plain" and distill.teacher == "live":
        raise ConfigError(
            "distill.teacher: found live with distill.block plain, expected other, frozen or ema: the student"
            " itself, behind its own prompt, differs in nothing"
        )
    if config.model.lora.rank and config.distill.teacher == "ema":
        raise ConfigError(
            "distill.teacher: found ema with model.lora.rank above 0, expected live, frozen or other: W does"
            " not move"
        )


def _check_evidence(config: Config) -> None:
    """What the engine that is asked for the teacher's queries has to be."""
    if config.distill.queries == "all":
        return
    wanted = {
        "distill.block": (
            config.distill.block,
            config.distill.block != "none",
            "a block that the teacher reads",
        ),
        "distill.scope": (
            config.distill.scope,
            config.distill.scope != "all",
            "query, first_query or last_query",
        ),
        "distill.teacher": (
            config.distill.teacher,
            config.distill.teacher == "live",
            "live, whose weights it has",
        ),
        "rollout.max_lag": (
            config.rollout.max_lag,
            config.rollout.max_lag == 0,
            "0: else it samples the next step",
        ),
    }
    for key, (found, fits, expected) in wanted.items():
        if not fits:
            raise ConfigError(
                f"{key}: found {found} with distill.queries evidence, which asks the engine for the teacher's"
                f" queries, expected {expected}"
            )


def _check_divergence(config: Config) -> None:
    distill = config.distill
    if distill.divergence == "jsd" and not 0 < distill.beta < 1:
        raise ConfigError(
            f"distill.beta: found {distill.beta!r} with distill.divergence jsd, expected strictly between 0"
            " and 1; for its limits use divergence forward_kl or reverse_kl"
        )
    whole_rows = {"top_k": None, "entry_clip": None, "temperature": 1.0}
    for key, expected in whole_rows.items():
        if distill.divergence == "sampled" and (found := getattr(distill, key)) != expected:
            raise ConfigError(
                f"distill.{key}: found {found} with distill.divergence sampled, expected"
                f" {'none' if expected is None else expected}: it looks at one token, at the rollouts'"
                " temperature"
            )
    if distill.support == "student" and distill.top_k is None:
        raise ConfigError(
            "distill.support: found student with distill.top_k none, expected a top_k, since the full"
            " vocabulary is everyone's support; or support teacher"
        )


def _check_weights(config: Config) -> None:
    distill, policy_weight = config.distill, config.policy_loss.weight
    if distill.alpha.mode == "grad_ratio" and distill.measure_every == 0:
        raise ConfigError(
            "distill.alpha.mode: found 'grad_ratio' with distill.measure_every 0, expected fixed, or"
            " measure_every above 0: the ratio has to be measured"
        )
    measures = distill.block != "none" and distill.measure_every > 0
    if measures and config.update.zero_stage != 3:
        raise ConfigError(
            f"update.zero_stage: found {config.update.zero_stage}, expected 3, where the gradient ratio can"
            " be measured; or set distill.measure_every to 0 with distill.alpha.mode fixed"
        )
    if policy_weight == 0.0 and distill.block == "none":
        raise ConfigError(
            "policy_loss.weight: found 0 with distill.block none, expected more than 0, or a block: nothing"
            " would be trained"
        )
    if policy_weight == 0.0 and measures:
        raise ConfigError(
            f"distill.measure_every: found {distill.measure_every} with policy_loss.weight 0, expected 0 with"
            " distill.alpha.mode fixed: there is no gradient of the policy loss to compare with"
        )
    if policy_weight == 0.0 and distill.alpha.warmup_steps > 0:
        raise ConfigError(
            f"distill.alpha.warmup_steps: found {distill.alpha.warmup_steps} with policy_loss.weight 0,"
            " expected 0: nothing would be trained in these steps"
        )
