"""Everything a run writes about itself, behind one object: metrics.jsonl, TensorBoard, transcripts,
progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sd.durable.files import write_whole
from megatron_sd.observability.metrics_log import METRICS_NAME, MetricsLog
from megatron_sd.observability.progress import Progress
from megatron_sd.observability.tensorboard import TENSORBOARD_NAME, TensorBoard
from megatron_sd.observability.transcripts import Decode, group_record, render_group
from megatron_sd.records import RolloutGroup

CONFIG_NAME = "config.yaml"
CHANGES_NAME = "plan_changes.jsonl"
TRANSCRIPTS_NAME = "transcripts"


class Recorder:
    """Records a run under `run_dir`. On a rank that is not `enabled` every method does nothing and touches
    no file.

        config.yaml                      the resolved configuration
        plan_changes.jsonl               what was changed of the plan on resume, and from which step on
        metrics.jsonl                    one line a record (metrics_log.py)
        tensorboard/                     event files
        transcripts/step_00000010.txt    rollouts to read; .jsonl beside it
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        enabled: bool,
        num_steps: int,
        config_text: str,
        decode: Decode,
        transcripts_per_step: int,
    ) -> None:
        """decode: token ids to text. transcripts_per_step: groups written each time. Nothing is opened
        before `begin`."""
        self._run_dir = Path(run_dir)
        self._enabled = enabled
        self._num_steps = num_steps
        self._config_text = config_text
        self._decode = decode
        self._transcripts_per_step = transcripts_per_step
        self._open: tuple[MetricsLog, TensorBoard, Progress] | None = None

    def begin(self, step: int, plan_changes: Sequence[tuple[int, str]] = ()) -> None:
        """Start recording after optimiser step `step` (0, or that of a checkpoint): what was recorded
        beyond it is superseded. plan_changes: what was changed of the plan since the run began, from which
        step on and in words."""
        if not self._enabled:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self._run_dir / CONFIG_NAME, self._config_text)
        log = MetricsLog(self._run_dir / METRICS_NAME, first_step=step + 1)
        board = TensorBoard(self._run_dir / TENSORBOARD_NAME, first_step=step + 1)
        board.text("config", self._config_text, step)
        if plan_changes:
            lines = (
                json.dumps({"step": from_step, "words": words}) + "\n" for from_step, words in plan_changes
            )
            write_whole(self._run_dir / CHANGES_NAME, "".join(lines))
            board.text("plan changes", "\n".join(words for _, words in plan_changes), step)
        self._open = (log, board, Progress(self._num_steps, step, sys.stderr))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step everywhere. Call `begin` first."""
        if self._open is not None:
            log, board, progress = self._open
            log.record(step, metrics)
            board.record(step, metrics)
            progress.show(step, metrics)

    def transcripts(self, step: int, groups: Sequence[RolloutGroup], blocks: Sequence[Sequence[str]]) -> None:
        """Write the first groups of the step; blocks[g][i] is the hindsight text for rollout i of group g."""
        if self._open is None:
            return
        chosen = list(zip(groups, blocks, strict=True))[: self._transcripts_per_step]
        path = self._run_dir / TRANSCRIPTS_NAME / f"step_{step:08}.txt"
        path.parent.mkdir(exist_ok=True)
        texts = [render_group(group, own, self._decode) for group, own in chosen]
        write_whole(path, "\n\n".join(texts))
        records = (
            json.dumps(group_record(group, own, self._decode), ensure_ascii=False) for group, own in chosen
        )
        write_whole(path.with_suffix(".jsonl"), "".join(record + "\n" for record in records))
        _, board, _ = self._open
        for place, text in enumerate(texts):
            board.text(f"transcripts/{place}", text, step)

    def close(self) -> None:
        """Close the files; recording is over."""
        for part in self._open or ():
            part.close()
        self._open = None
