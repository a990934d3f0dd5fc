"""TensorBoard event files of a run: scalars, a layout, and texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_NAME = "tensorboard"
# Charts of the "Custom Scalars" tab. Each chart draws every scalar whose name matches one of its regular
# expressions.
LAYOUT = {
    "outcome": {
        "reward": ["Multiline", ["reward/(mean|em|f1|format_valid)"]],
        "held-out": ["Multiline", ["eval/reward/(em|f1)", "eval/rollout/hop_hit_rate"]],
        "searching": ["Multiline", ["rollout/(searches|turns)"]],
        "retrieval": ["Multiline", ["rollout/(hop_hit_rate|duplicate_query_share)"]],
        "why rollouts end": ["Multiline", ["rollout/stop_.*"]],
    },
    "learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "distillation": ["Multiline", ["distill/(divergence|.*entropy).*"]],
        "gradient of L_SD against GRPO": ["Multiline", ["distill/.*grad.*"]],
        "groups by outcome": ["Multiline", ["distill/share_groups_.*"]],
        "what blocks reveal": ["Multiline", ["distill/(share_block.*|copy_rate.*)"]],
    },
    "cost": {
        "seconds by phase": ["Multiline", ["time/.*"]],
        "peak memory (GiB)": ["Multiline", ["mem/.*"]],
    },
}


class TensorBoard:
    """Writes event files into `directory`."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Start a new event file that supersedes earlier points of `first_step` and later ones (TensorBoard
        hides them)."""
        self._writer = SummaryWriter(str(directory), purge_step=first_step)
        self._writer.add_custom_scalars(LAYOUT)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One scalar a metric."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def text(self, name: str, content: str, step: int) -> None:
        """A text shown verbatim. TensorBoard renders Markdown, in which an indented block keeps its lines
        as they are."""
        self._writer.add_text(name, "\n".join("    " + line for line in content.split("\n")), step)
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
