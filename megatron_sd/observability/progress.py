"""What a person watching the run sees: a bar on a terminal, one line a step anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

# metric -> how it is called here
_SHOWN = {
    "reward/mean": "reward",
    "reward/em": "em",
    "rollout/hop_hit_rate": "hits",
    "rollout/searches": "searches",
    "loss/policy": "loss",
    "distill/divergence_nats": "jsd",
    "eval/reward/em": "eval em",
    "eval/reward/f1": "eval f1",
}


class Progress:
    """Shows each recorded step on `stream`."""

    def __init__(self, num_steps: int, step: int, stream: TextIO) -> None:
        """num_steps: the last step of the run; step: where it begins."""
        self._num_steps = num_steps
        self._stream = stream
        self._bar = tqdm(total=num_steps, initial=step, file=stream, unit="step", dynamic_ncols=True) if stream.isatty() else None

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move to `step` and show its main figures."""
        figures = [f"{label} {metrics[name]:z.3f}" for name, label in _SHOWN.items() if name in metrics]
        if "time/step_s" in metrics:
            figures.append(f"{metrics['time/step_s']:.2f} s")
        if self._bar is None:
            print(f"step {step}/{self._num_steps}", *figures, sep="  ", file=self._stream, flush=True)
            return
        self._bar.set_postfix_str(", ".join(figures), refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the finished bar on the terminal."""
        if self._bar is not None:
            self._bar.close()
