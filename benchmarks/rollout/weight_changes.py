"""How many bfloat16 weights of a real model one AdamW step changes: float32 masters, gradients on text, warm
moments. The model computes in float32 with the bfloat16 weights, which many processors do ten times as fast.

    python -m benchmarks.rollout.weight_changes MODEL_DIR TEXT... [--rate 1e-6 1e-5] [--steps 3] [--write DIR]

Masters that were just read from a bfloat16 file lie in the middle of what rounds to them, and take a while to
leave it. `settled` is the same step from masters anywhere in there, as after many steps. With --write the
weights around the last step go to DIR, for benchmarks.rollout.publish_changes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sd.config import OptimizerConfig

SEQUENCE_TOKENS, SEQUENCES = 256, 2  # of a step
HALF_STEP = 1 << 15  # of a bfloat16, in units of the float32 numbers


@dataclass
class Weight:
    """A parameter, its float32 master and what steps it."""

    parameter: torch.nn.Parameter
    master: Tensor
    optimizer: torch.optim.AdamW


def bits(values: Tensor) -> Tensor:
    """The same memory of a bfloat16 tensor, as integers."""
    return values.view(torch.int16)


def settled(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 numbers, each anywhere in what rounds to its bfloat16; a zero stays."""
    numbers = values.float().view(torch.int32)
    shifts = torch.randint(-HALF_STEP + 1, HALF_STEP, values.shape, generator=generator, dtype=torch.int32)
    return torch.where(values == 0, numbers, numbers + shifts).view(torch.float32)


def begin(model: torch.nn.Module, rate: float) -> dict[str, Weight]:
    """By name; one optimiser a weight, so that one float32 gradient exists at a time."""
    config, found = OptimizerConfig(), {}
    for name, parameter in model.named_parameters():
        master = parameter.detach().clone()
        own = {"betas": config.betas, "weight_decay": config.weight_decay, "foreach": False}
        found[name] = Weight(parameter, master, torch.optim.AdamW([master], lr=rate, **own))
    return found


def step(weight: Weight, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One update. What the parameter was, and what it would be from a settled master."""
    was, before = weight.parameter.detach().bfloat16(), weight.master.clone()
    weight.master.grad, weight.parameter.grad = weight.parameter.grad, None
    weight.optimizer.step()
    weight.master.grad = None
    weight.parameter.data.copy_(weight.master.bfloat16())
    return was, (settled(was, generator) + (weight.master - before)).bfloat16()


def batches(model_dir: Path, texts: Sequence[Path], num_steps: int) -> Iterator[Tensor]:
    """[SEQUENCES, SEQUENCE_TOKENS] ids, one batch a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("\n".join(path.read_text(encoding="utf-8") for path in texts))["input_ids"]
    size = SEQUENCES * SEQUENCE_TOKENS
    if len(ids) < num_steps * size:
        raise SystemExit(f"found {len(ids)} tokens of text, expected {num_steps * size}: pass more files")
    for n in range(num_steps):
        yield torch.tensor(ids[n * size : (n + 1) * size]).view(SEQUENCES, SEQUENCE_TOKENS)


def measure(model_dir: Path, texts: Sequence[Path], rate: float, num_steps: int, write: Path | None) -> None:
    """Print the share of changed elements after every step, and write the last step's weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.gradient_checkpointing_enable()
    weights, generator = begin(model, rate), torch.Generator().manual_seed(0)
    around: dict[str, dict[str, Tensor]] = {"before": {}, "after": {}, "settled": {}}
    for n, ids in enumerate(batches(model_dir, texts, num_steps), start=1):
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        counts, total = [0, 0], 0
        for name, weight in weights.items():
            was, from_settled = step(weight, generator)
            now, total = weight.parameter.detach().bfloat16(), total + was.numel()
            for place, values in enumerate((now, from_settled)):
                counts[place] += int(torch.count_nonzero(bits(values) != bits(was)))
            if n == num_steps and write is not None:
                around["before"][name], around["after"][name], around["settled"][name] = (
                    was,
                    now,
                    from_settled,
                )
        shares = ", ".join(f"{name} {count / total:.4%}" for name, count in zip(("read", "settled"), counts))
        print(
            f"rate {rate:g}, step {n}: changed {shares} of {total} elements; loss {loss.item():.3f},"
            f" {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    for name, tensors in around.items() if write is not None else ():
        save_file(tensors, write / f"{name}_{rate:g}.safetensors")


def main() -> None:
    """One run a rate, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("texts", nargs="*", type=Path)
    parser.add_argument("--rate", nargs="+", type=float, default=[1e-6, 1e-5])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    if arguments.model is None:
        print("not measured: it needs the directory of a pretrained model, and text")
        return
    for rate in arguments.rate:
        measure(arguments.model, arguments.texts, rate, arguments.steps, arguments.write)


if __name__ == "__main__":
    main()
