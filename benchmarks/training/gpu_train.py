"""What an update costs on a real GPU, in less than ten minutes: `make gpu-check-train`, or

    python -m benchmarks.training.gpu_train [--json FILE] [--shapes 0.5b 3b 7b] [--tiny]

ZeRO-3 on one GPU, random weights of Qwen2.5's shapes, rollouts of four searches with observations of 500
tokens: GRPO and SD-Search, and (0.5b, stage 2) SD-Search with whole logits in the place of the head's one
pass. Prints seconds of forward with backward and of the optimiser's step, tokens a second, the share of the
card's own matrix products, and peak memory against the planner's forecast. Each arm is a process of its
own. --tiny runs it at toy sizes, on a CPU too, where no figure means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

from benchmarks.training.realistic_rollouts import Lengths, samples  # noqa: E402 (it lies beside this file)

NUM_STEPS = 3  # timed, after one that warms up


@dataclass(frozen=True)
class Shape:
    """A model of launch/planner/models.py, or a toy; questions of a step; what else the run needs to fit
    one GPU."""

    model: str
    num_questions: int
    options: tuple[str, ...] = ()


SHAPES = {
    "0.5b": Shape("qwen2.5-0.5b", 8),
    "3b": Shape("qwen2.5-3b", 4),
    "7b": Shape("qwen2.5-7b", 2, ("--update.offload_optimizer=cpu", "--update.max_microbatch_tokens=8192")),
}
TOY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def missing() -> str:
    """What this machine lacks, "" if nothing."""
    import torch

    if torch.cuda.is_available():
        return ""
    return f"a CUDA device that torch sees (torch {torch.__version__}, CUDA {torch.version.cuda})"


def write_random_model(directory: Path, shape: Shape, *, tiny: bool, dtype: str) -> dict:
    """config.json and safetensors of random weights; returns the configuration."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.planner.models import MODELS

    config = MODELS[shape.model] | (
        {**TOY, "vocab_size": 512, "max_position_embeddings": 4096} if tiny else {}
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, size: torch.Size) -> torch.Tensor:
        values = torch.empty(size, device=device, dtype=getattr(torch, dtype))
        return (
            values.fill_(1.0).cpu() if "norm" in name else values.normal_(std=0.02, generator=generator).cpu()
        )

    weights = {name: draw(name, parameter.shape) for name, parameter in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return config


def unfused(policy) -> None:
    """Replace the head by the usual one: whole logits, a chunk of rows at a time, which autograd keeps."""
    import torch

    from benchmarks.kernels.head_peers import whole_logits
    from megatron_sd.ops.head.row_cuts import cut_rows
    from megatron_sd.ops.head.types import RowValues
    from megatron_sd.training.policy_module import RowHead

    class WholeLogits(RowHead):
        def forward(self, hidden, teacher, rows, row_loss):
            parts = []
            for cut in cut_rows(len(hidden), rows.host_query_rows, self.options.chunk_rows):
                read, own = teacher.hidden[cut.queries], rows.query_rows[cut.queries] - cut.rows.start
                parts.append(whole_logits(hidden[cut.rows], read, self.weight, rows.targets[cut.rows], own))
            logprobs, divergences = (torch.cat(column) for column in zip(*parts, strict=True))
            zeros = torch.zeros_like(divergences).detach()
            values = RowValues(
                logprobs.new_zeros(()), logprobs, logprobs.detach(), divergences, zeros, zeros, zeros
            )
            return values._replace(loss=row_loss(values, slice(None), slice(None)))

    head = policy.model.get_output_embeddings()
    head.__class__ = WholeLogits


def run_config(shape: Shape, model: Path, *, tiny: bool, options: tuple[str, ...]):
    """Of the run that is measured."""
    import torch

    from megatron_sd.config.load import load

    paths = {"run_dir": "none", "model.path": model, "data.train": "none", "retriever.corpus": "none"}
    chosen = {"policy_loss.kl_weight": 0, "model.gradient_checkpointing": "true", "distill.measure_every": 0}
    chosen |= {"model.dtype": "float32" if tiny and not torch.cuda.is_available() else "bfloat16"}
    return load([*(f"--{key}={value}" for key, value in (paths | chosen).items()), *shape.options, *options])


def measure(
    shape: Shape, model: Path, *, arm: str, tiny: bool, options: tuple[str, ...] = (), fused: bool = True
) -> dict:
    """One arm: grpo or sd. Seconds are medians over NUM_STEPS."""
    import torch

    from launch.planner.models import model_config
    from megatron_sd.algorithm.distill_loss import TermWeights
    from megatron_sd.algorithm.packing.batches import pack
    from megatron_sd.building.policy import build_policy
    from megatron_sd.distributed.parallel import Parallel
    from megatron_sd.distributed.world import join_world

    world, config = join_world(), run_config(shape, model, tiny=tiny, options=options)
    policy = build_policy(config, Parallel.of(config.update, world))
    if not fused:
        unfused(policy)
    description = model_config(str(model))
    num_questions, scale = (1, 0.1) if tiny else (shape.num_questions, 1.0)
    made = samples(num_questions, description["vocab_size"], lengths=Lengths().scaled(scale))
    (batch,) = pack(made, max_tokens=config.update.microbatch_tokens, world_size=1, aggregation="token")
    alpha = 1.0 if arm == "sd" else 0.0
    weights = TermWeights(policy=1.0, distill_spread=alpha, distill_no_spread=alpha)
    passes, steps = [], []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + NUM_STEPS):
        moments = [now()]
        for microbatch in batch:
            policy.accumulate(microbatch, batch.totals, weights)
        moments.append(now())
        update = policy.step()
        moments.append(now())
        passes.append(moments[1] - moments[0])
        steps.append(moments[2] - moments[1])
    seconds = {
        "forward and backward": statistics.median(passes[1:]),
        "optimiser": statistics.median(steps[1:]),
    }
    return figures(seconds, batch, config, description, distils=arm == "sd") | {"grad_norm": update.grad_norm}


def figures(seconds: dict[str, float], batch, config, description: dict, *, distils: bool) -> dict:
    """What is written of an arm. Products: the student's forward, that again, twice as much backward; the
    teacher; the head."""
    import torch

    from launch.planner.memory import Sizes, peak, rank_memory
    from megatron_sd.resharding.names import model_shape

    on_gpu, shape = torch.cuda.is_available(), model_shape(description)
    sizes = Sizes.of(shape)
    tokens = sum(int(m.lengths.sum()) for m in batch)
    read = sum(int(m.teacher_lengths.sum() + m.teacher_prompt_lengths.sum()) for m in batch) if distils else 0
    rows = sum(len(m.row_index) for m in batch)
    products = 2 * sizes.num_layers * sizes.layer * (4 * tokens + read) + 2 * sizes.embedding * 3 * rows
    parts = [
        part for part in rank_memory(shape, config, world_size=1, on_gpu=on_gpu) if "engine" not in part.name
    ]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "teacher_tokens": read,
        "microbatches": len(batch.microbatches),
        "tokens_a_second": tokens / sum(seconds.values()),
        "tflops": products / seconds["forward and backward"] / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "planned_gib": peak(parts)[0] / 2**30,
        "parameters": sizes.total,
    }


def now() -> float:
    """Seconds, with the device's work done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


ARMS = {
    "GRPO": {"arm": "grpo"},
    "SD-Search": {"arm": "sd"},
}
WHOLE_LOGITS = {
    "SD-Search, stage 2": {"arm": "sd", "options": ("--update.zero_stage=2",)},
    "SD-Search, stage 2, whole logits": {"arm": "sd", "options": ("--update.zero_stage=2",), "fused": False},
}


def run_arm(name: str, arm: str, *, tiny: bool) -> dict:
    """One arm of one shape in a process of its own; its figures, or why there are none."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--measure",
            name,
            arm,
            output.name,
            *(["--tiny"] if tiny else []),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1:]}
        return json.loads(Path(output.name).read_text())


def matmul_tflops(*, tiny: bool) -> float | None:
    """Of this card, measured; None at toy sizes."""
    if tiny or missing():
        return None
    from benchmarks.kernels import gpu_timing

    return gpu_timing.matmul_flops_a_ms(rounds=5) / 1e9


def describe(name: str, found: dict[str, dict], rate: float | None) -> str:
    """The table of one shape."""
    lines = [f"== {name}"]
    for arm, own in found.items():
        if "failed" in own:
            lines.append(f"  {arm:<34} failed: {own['failed']}")
            continue
        share = "" if rate is None else f", {own['tflops'] / rate:.0%} of {rate:.0f} TFLOP/s"
        memory = (
            ""
            if own["peak_gib"] is None
            else f", peak {own['peak_gib']:.1f} GiB (planned {own['planned_gib']:.1f})"
        )
        times = " + ".join(f"{seconds:.3f}" for seconds in own["seconds"].values())
        lines.append(f"  {arm:<34} {times} s, {own['tokens_a_second']:,.0f} tokens/s{share}{memory}")
    ratios = (("SD-Search", "GRPO"), ("SD-Search, stage 2, whole logits", "SD-Search, stage 2"))
    for one, other in ratios:
        if "seconds" in found.get(one, {}) and "seconds" in found.get(other, {}):
            ratio = sum(found[one]["seconds"].values()) / sum(found[other]["seconds"].values())
            lines.append(f"  {one} over {other}: {ratio - 1:+.1%}")
    return "\n".join(lines)


def main() -> None:
    """Exit status 1 if an arm failed, 2 if this machine cannot measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "runs/gpu_train.json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("SHAPE", "ARM", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.measure:
        name, arm, output = options.measure
        with tempfile.TemporaryDirectory() as directory:
            dtype = "float32" if missing() else "bfloat16"
            write_random_model(Path(directory) / "model", SHAPES[name], tiny=options.tiny, dtype=dtype)
            chosen = (ARMS | WHOLE_LOGITS)[arm]
            Path(output).write_text(
                json.dumps(measure(SHAPES[name], Path(directory) / "model", tiny=options.tiny, **chosen))
            )
        return
    if lacking := missing():
        print(f"gpu-check-train needs {lacking}; nothing was measured", file=sys.stderr)
        if not options.tiny:
            raise SystemExit(2)
    rate = matmul_tflops(tiny=options.tiny)
    results: dict[str, dict] = {}
    for name in options.shapes:
        arms = ARMS | (WHOLE_LOGITS if name == "0.5b" else {})
        results[name] = {arm: run_arm(name, arm, tiny=options.tiny) for arm in arms}
        print(describe(name, results[name], rate), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"matmul_tflops": rate, "shapes": results}, indent=2) + "\n")
    if any("failed" in own for arms in results.values() for own in arms.values()):
        raise SystemExit("an arm failed")


if __name__ == "__main__":
    main()
