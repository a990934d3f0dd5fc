"""`sd-search demo`: the main job on embedded defaults, on a CPU, in minutes.

World and index, start policy, GRPO and SD-Search from the same start and seed under DeepSpeed ZeRO-3,
greedy evaluation of all three on held-out entities, one table.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from data_prep.world.world import WorldConfig
from eval.run import EvalConfig, evaluate
from launch.local import start_ranks
from launch.programs import make_world
from megatron_sd.config import Config
from megatron_sd.config.command_line import parse
from megatron_sd.config.load import load
from megatron_sd.durable.directories import committed
from megatron_sd.errors import ConfigError
from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics

ARMS = {"GRPO": ("--distill.block=none",), "SD-Search": ()}
WRITTEN = {"world", "coldstart", "eval", "report.json", *(name.lower() for name in ARMS)}  # below `output`
KV_CACHE_GIB = 0.5  # of a vLLM worker, if there is one: forty rollouts of the start policy fit several times
PHASES = ("rollout", "assemble", "update", "publish")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole story on one machine. Everything is written below `output`, which is cleared of an earlier
    demo first."""

    output: str = "runs/demo"  # where everything goes
    num_steps: int | None = None  # None: what the recipe says
    num_eval_questions: int = 200  # held-out questions that the table is over
    num_ranks: int = 2  # processes that train
    engine: Literal["torch", "vllm"] = "torch"  # of the rollouts; vllm needs the [vllm] extra
    fresh: bool = False  # cold-start a new start policy (20-40 minutes) instead of using the committed one


def main(argv: Sequence[str]) -> None:
    """The command line of the demo."""
    config = parse(DemoConfig, argv, "sd-search demo")
    for name in ("num_ranks", "num_eval_questions"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: found {getattr(config, name)}, expected 1 or more")
    started = time.perf_counter()
    output = Path(config.output)
    clear(output)
    say("1/4  a synthetic multi-hop world and its BM25 index")
    make_world(WorldConfig(output=str(output / "world")))
    say("2/4  the start policy")
    model = start_policy(config, output)
    say(
        f"3/4  training from the same start and seed: {', '.join(ARMS)} (DeepSpeed ZeRO-3, {config.num_ranks}"
        " ranks)"
    )
    runs = {name: train(name, overrides, config, model) for name, overrides in ARMS.items()}
    say("4/4  greedy evaluation on held-out entities")
    report = compare(model, runs, config)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report), flush=True)
    print(f"\nTensorBoard   tensorboard --logdir {output}")
    print(f"transcripts   {output}/*/transcripts")
    print(f"took          {(time.perf_counter() - started) / 60:.1f} minutes")


def clear(output: Path) -> None:
    """Remove what an earlier demo wrote. Raises ConfigError, and removes nothing, when `output` holds
    anything else."""
    if output.exists() and not output.is_dir():
        raise ConfigError(
            f"--output: found a file at {output}, expected a directory of an earlier demo, or a new one"
        )
    foreign = sorted({path.name for path in output.iterdir()} - WRITTEN) if output.exists() else []
    if foreign:
        raise ConfigError(
            f"--output: {output} holds {foreign[0]!r}, which no demo wrote, and would be emptied: choose"
            " another"
        )
    shutil.rmtree(output, ignore_errors=True)


def say(line: str) -> None:
    """One line that stands out between the logs of the stages."""
    print(f"\n=== {line}", flush=True)


def recipe_arguments(config: DemoConfig, model: Path, *overrides: str) -> list[str]:
    """Command line of a training run of the demo: the recipe, the demo's paths, the arm's overrides."""
    world = Path(config.output) / "world"
    steps = [] if config.num_steps is None else [f"--num_steps={config.num_steps}"]
    engine = [f"--rollout.engine={config.engine}", f"--rollout.vllm.kv_cache_gib={KV_CACHE_GIB}"]
    return [
        f"--config={files('launch') / 'configs' / 'world.yaml'}",
        f"--model.path={model}",
        f"--data.train={world / 'questions.jsonl'}",
        f"--data.eval={world / 'questions.jsonl'}",
        f"--retriever.corpus={world / 'corpus'}",
        *steps,
        *engine,
        *overrides,
    ]


def start_policy(config: DemoConfig, output: Path) -> Path:
    """The committed start policy, or a new one."""
    if not config.fresh:
        return Path(str(files("data_prep") / "coldstart_model"))
    from data_prep.world.coldstart import ColdstartConfig, run_coldstart

    return run_coldstart(ColdstartConfig(output=str(output / "coldstart")))


def train(name: str, overrides: Sequence[str], config: DemoConfig, model: Path) -> Config:
    """Train one arm; returns its configuration. Raises MegatronSdError when it fails."""
    say(f"     {name}")
    arguments = recipe_arguments(config, model, *overrides, f"--run_dir={run_dir(config, name)}")
    start_ranks(config.num_ranks, arguments)
    return load(arguments)


def run_dir(config: DemoConfig, name: str) -> Path:
    """Where an arm writes: runs/demo/sd-search."""
    return Path(config.output) / name.lower()


def compare(model: Path, runs: Mapping[str, Config], config: DemoConfig) -> dict[str, dict[str, float]]:
    """For the start policy and every arm: held-out metrics, and for the arms the median seconds of each
    phase."""
    any_run = next(iter(runs.values()))
    report = {"start policy": held_out(model, any_run, config)}
    for name, run in runs.items():
        steps = read_metrics(Path(run.run_dir) / METRICS_NAME)
        times = {f"{phase}_s": median(steps, f"time/{phase}_s") for phase in PHASES}
        report[name] = held_out(final_model(run), run, config) | times | {"step_s": sum(times.values())}
    return report


def final_model(run: Config) -> Path:
    """The model directory of the newest checkpoint."""
    return committed(Path(run.run_dir) / "checkpoints")[0] / "model"


def held_out(model: Path, run: Config, config: DemoConfig) -> dict[str, float]:
    """Greedy evaluation of a model directory under the run's protocol."""
    settings = EvalConfig(
        model=dataclasses.replace(run.model, path=str(model)),
        retriever=run.retriever,
        questions=run.data.eval,
        split=run.data.eval_split,
        limit=config.num_eval_questions,
        output=str(Path(config.output) / "eval" / model.parent.parent.parent.name),
        protocol=run.protocol,
        rollout=dataclasses.replace(run.rollout, questions_per_step=config.num_eval_questions),
        reward=run.reward,
    )
    report = evaluate(settings)
    names = {"em": "em", "f1": "f1", "hop_hits": "supporting_recall", "searches": "searches"}
    return {short: report["averages"]["questions"][name]["value"] for short, name in names.items()}


def median(steps: Mapping[int, Mapping[str, float]], name: str) -> float:
    """Median of a metric over the steps of a run."""
    return statistics.median(values[name] for values in steps.values() if name in values)


def render(report: Mapping[str, Mapping[str, float]]) -> str:
    """The table: held-out metrics, median seconds of each phase, and SD-Search's overhead over GRPO."""
    quality = ("em", "f1", "hop_hits", "searches")
    times = (*(f"{phase}_s" for phase in PHASES), "step_s")
    lines = [f"\n{'held out, greedy':<16}" + "".join(f"{name:>11}" for name in (*quality, *times))]
    for name, figures in report.items():
        cells = [
            f"{figures[column]:>11.3f}" if column in figures else f"{'':>11}" for column in (*quality, *times)
        ]
        lines.append(f"{name:<16}" + "".join(cells))
    plain, distilled = (report[name] for name in ARMS)
    update, step = (distilled[column] / plain[column] - 1 for column in ("update_s", "step_s"))
    lines.append(
        f"\nSD-Search over GRPO: update {update:+.1%}, whole step {step:+.1%} (median of a step's seconds)"
    )
    lines.append(
        "One world, one start policy, one seed: the table shows that training works, not which method is"
        " better."
    )
    return "\n".join(lines)
