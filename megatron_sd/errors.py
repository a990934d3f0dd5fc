"""Typed errors: each message names what was found, what was expected and what to do."""

from __future__ import annotations


class MegatronSdError(Exception):
    """Base of every error this project raises on purpose; doors print it without a traceback."""


class ConfigError(MegatronSdError):
    """A configuration key is unknown, missing, of the wrong type or out of range."""


class DataError(MegatronSdError):
    """An input file (questions, corpus, index, model directory) is missing, broken or does not fit the
    run."""


class RetrievalError(MegatronSdError):
    """The retriever could not answer; the rollout that asked becomes `StopReason.RETRIEVAL_FAILED`."""


class ToolError(MegatronSdError):
    """A tool raised or took too long; the rollout that called it becomes `StopReason.TOOL_FAILED`."""


class RolloutError(MegatronSdError):
    """Too many rollouts failed for a step to be worth training on, or the engine returned nothing."""


class RefusedStepError(MegatronSdError):
    """No rank took the optimiser step; the parameters are as they were. remedy: for a run that ends because
    too many of its steps were. older_weights_help: the fault may lie in the weights."""

    remedy = (
        "lower optimizer.learning_rate, try float32 parameters, or look at what the step's transcripts and"
        " metrics show; the last checkpoint is good"
    )
    older_weights_help = True


class BarrenStepError(RefusedStepError):
    """No rollout of the step has a token to train on."""

    remedy = (
        "look at what prompts and rollouts are, and how long: rollout.max_rollout_tokens must hold the prompt"
        " and an answer"
    )
    older_weights_help = False


class NothingKeptError(BarrenStepError):
    """No group of the step is kept by rollout.keep_groups."""

    remedy = (
        "ask questions that the policy answers right now and then (`sd-search select` keeps those of wanted"
        " difficulty), or set rollout.keep_groups to all"
    )


class NonFiniteError(RefusedStepError):
    """A loss or gradient is NaN or infinite on at least one rank."""


class GradientSpikeError(RefusedStepError):
    """The gradient's norm is far beyond those of the steps before."""


class OwnCodeError(MegatronSdError):
    """A function of the user's own raised, came back with something else than was asked for, or not at
    all."""


class CheckpointError(MegatronSdError):
    """A checkpoint could not be written, does not verify, or belongs to another run."""


class ReshardError(MegatronSdError):
    """Weights could not be handed to the inference workers; they still hold the version they had."""


class NoProgressError(MegatronSdError):
    """A run has been started again and again from the same step."""


class StopRequested(MegatronSdError):  # noqa: N818, nothing is wrong
    """Somebody asked the run to stop; it saves and ends with exit code 85."""
