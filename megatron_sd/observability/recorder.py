"""Everything a run writes about itself, behind one object: metrics.jsonl, sinks, transcripts, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_sd.config import LogConfig
from megatron_sd.durable.files import write_whole
from megatron_sd.observability.metrics_log import METRICS_NAME, MetricsLog, newest_steps
from megatron_sd.observability.names import CHANGES_NAME, CONFIG_NAME, TRANSCRIPTS_NAME
from megatron_sd.observability.progress import Progress
from megatron_sd.observability.sinks.background import Background
from megatron_sd.observability.sinks.sink import Sink, TrackedRun
from megatron_sd.observability.sinks.table import open_sinks
from megatron_sd.observability.sinks.tensorboard import TensorBoard
from megatron_sd.observability.transcripts import Decode, group_record, render_group
from megatron_sd.records import RolloutGroup


class Recorder:
    """Records a run under `run_dir`. On a rank that is not `enabled` every method does nothing and touches
    no file.

        config.yaml                      the resolved configuration
        plan_changes.jsonl               what was changed of the plan on resume, and from which step on
        metrics.jsonl                    one line a record (metrics_log.py)
        tensorboard/                     event files, where log.sinks names it
        services.json                    by which identity other sinks know the run
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
        log: LogConfig,
    ) -> None:
        """decode: token ids to text. Nothing is opened before `begin`."""
        self._run_dir = Path(run_dir)
        self._enabled = enabled
        self._num_steps = num_steps
        self._config_text = config_text
        self._decode = decode
        self._config = log
        self._open: tuple[MetricsLog, Progress] | None = None
        self._sinks: list[Sink] = []

    def begin(self, step: int, plan_changes: Sequence[tuple[int, str]] = ()) -> None:
        """Start recording after optimiser step `step` (0, or that of a checkpoint): what was recorded
        beyond it is superseded. plan_changes: what was changed of the plan since the run began, from which
        step on and in words."""
        if not self._enabled:
            return
        self.close()
        self._run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self._run_dir / CONFIG_NAME, self._config_text)
        sent = newest_steps(self._run_dir / METRICS_NAME)
        self._open = (
            MetricsLog(self._run_dir / METRICS_NAME, first_step=step + 1),
            Progress(self._num_steps, step, sys.stderr),
        )
        tracked = TrackedRun(
            run_dir=self._run_dir, config_text=self._config_text, first_step=step + 1, log=self._config
        )
        self._sinks = open_sinks(tracked, sent)
        self._show("config", self._config_text, step)
        if plan_changes:
            lines = (
                json.dumps({"step": from_step, "words": words}) + "\n" for from_step, words in plan_changes
            )
            write_whole(self._run_dir / CHANGES_NAME, "".join(lines))
            self._show("plan changes", "\n".join(words for _, words in plan_changes), step)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step everywhere, with log/lost_<sink> where a service did not take some.
        Call `begin` first."""
        if self._open is None:
            return
        log, progress = self._open
        for sink in self._sinks:
            metrics = {**metrics, **(sink.lost_metrics() if isinstance(sink, Background) else {})}
        log.record(step, metrics)
        for sink in self._sinks:
            sink.write(step, metrics)
        progress.show(step, metrics)

    def _show(self, name: str, text: str, step: int) -> None:
        """Texts stay on this machine: TensorBoard alone shows them."""
        for sink in self._sinks:
            if isinstance(sink, TensorBoard):
                sink.text(name, text, step)

    def transcripts(self, step: int, groups: Sequence[RolloutGroup], blocks: Sequence[Sequence[str]]) -> None:
        """Write the first groups of the step; blocks[g][i] is the hindsight text for rollout i of group g."""
        if self._open is None:
            return
        chosen = list(zip(groups, blocks, strict=True))[: self._config.transcripts_per_step]
        path = self._run_dir / TRANSCRIPTS_NAME / f"step_{step:08}.txt"
        path.parent.mkdir(exist_ok=True)
        texts = [render_group(group, own, self._decode) for group, own in chosen]
        write_whole(path, "\n\n".join(texts))
        records = (
            json.dumps(group_record(group, own, self._decode), ensure_ascii=False) for group, own in chosen
        )
        write_whole(path.with_suffix(".jsonl"), "".join(record + "\n" for record in records))
        for place, text in enumerate(texts):
            self._show(f"transcripts/{place}", text, step)

    def close(self) -> None:
        """Close the files, and wait for services within bounds; recording is over."""
        for part in (*(self._open or ()), *self._sinks):
            part.close()
        self._open, self._sinks = None, []
