"""First turns of rollouts of a real model: the embedded engine against transformers' batched generate, and
against vLLM.

    python -m benchmarks.rollout.generate MODEL_DIR [--sides embedded transformers vllm] [--json FILE]
                                          [--dtype bfloat16] [--questions 160]

40 questions, each once and all at one time, in the prompt `few_shot` and the model's chat template, float32,
temperature 1; a completion ends at a closing tag, at the end of sequence, or after 64 tokens. Each side has
a process of its own, one after the other, and all the machine's threads. Loading is not counted. Seconds are for a sampled
token, so a side gains nothing by short completions. vLLM is measured where it is installed (make
.venv-vllm/ready).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.baseline import Comparison, report
from megatron_sd.building.rollout_side import build_engine
from megatron_sd.config import ModelConfig, ProtocolConfig, RolloutConfig, VllmConfig
from megatron_sd.distributed.world import lone_world
from megatron_sd.pretrained.loading import load_causal_lm
from megatron_sd.rollout.engine import GenerationRequest
from megatron_sd.search.chat_template import ChatArguments
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import TextCodec, load_codec

SIDES = ("embedded", "transformers", "vllm")
MAX_NEW_TOKENS = 64
QUESTION = "In which city was the founder of company number {} born, and what is it the capital of?"
STOP = ("</search>", "</answer>")
MARK = "FIGURES "


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every side does."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    num_questions: int = 40


def prompts_of(codec: TextCodec, num_questions: int) -> list[tuple[int, ...]]:
    """Token ids of all prompts."""
    environment = Environment(codec, build_protocol(ProtocolConfig(preset="few_shot")), RolloutConfig())
    return [environment.prompt_ids(QUESTION.format(n)) for n in range(num_questions)]


def with_transformers(model_dir: str, codec: TextCodec, asked: Asked) -> Callable[[], int]:
    """One call of generate with all prompts, padded on the left; counted are tokens up to a row's end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = load_causal_lm(model_dir, dtype=getattr(torch, asked.dtype), attention="sdpa").eval()
    prompts = [list(ids) for ids in prompts_of(codec, asked.num_questions)]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    width = batch["input_ids"].shape[1]

    def generate() -> int:
        torch.manual_seed(0)
        limits = {"max_new_tokens": MAX_NEW_TOKENS, "stop_strings": list(STOP), "tokenizer": tokenizer}
        with torch.inference_mode():
            out = model.generate(**batch, **limits, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        padding = (out[:, width:] == tokenizer.pad_token_id).int().cumsum(1) > 0
        return int((~padding).sum())

    return generate


def with_engine(
    model_dir: str, codec: TextCodec, kind: str, asked: Asked, *, closing: contextlib.ExitStack
) -> Callable[[], int]:
    """All prompts at once to one of our engines."""
    output = Path(closing.enter_context(tempfile.TemporaryDirectory()))
    rollout = RolloutConfig(
        engine="torch" if kind == "embedded" else "vllm",
        max_concurrent_sequences=max(asked.num_questions, RolloutConfig.max_concurrent_sequences),
        vllm=VllmConfig(kv_cache_gib=2, threads_per_worker=os.cpu_count() or 1),
    )
    engine = build_engine(
        ModelConfig(path=model_dir, dtype=asked.dtype), rollout, codec, lone_world(), output=output
    )
    closing.callback(getattr(engine, "close", lambda: None))

    async def serve() -> int:
        requests = [
            GenerationRequest(
                session=str(n),
                prompt_ids=ids,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=1.0,
                seed=n,
                stop=STOP,
            )
            for n, ids in enumerate(prompts_of(codec, asked.num_questions))
        ]
        completions = await asyncio.gather(*(engine.generate(request) for request in requests))
        for request in requests:
            engine.release(request.session)
        return sum(len(completion.ids) for completion in completions)

    return lambda: asyncio.run(serve())


def measure_here(model_dir: str, side: str, asked: Asked) -> None:
    """One process of a side: a run, then its figures as a line."""
    codec = load_codec(model_dir, ChatArguments())
    with contextlib.ExitStack() as closing:
        run = (
            with_transformers(model_dir, codec, asked)
            if side == "transformers"
            else with_engine(model_dir, codec, side, asked, closing=closing)
        )
        started = time.perf_counter()
        num_tokens = run()
        seconds = time.perf_counter() - started
    print("\n" + MARK + json.dumps({"seconds": seconds, "tokens": num_tokens}), flush=True)


def measure(model_dir: str, side: str, asked: Asked) -> float:
    """Milliseconds a sampled token."""
    options = ["--dtype", asked.dtype, "--questions", str(asked.num_questions)]
    command = [sys.executable, "-m", __spec__.name, model_dir, "--here", side, *options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [
        json.loads(line.removeprefix(MARK)) for line in finished.stdout.splitlines() if line.startswith(MARK)
    ]
    if finished.returncode or not found:
        raise SystemExit(f"{side} did not come to its end:\n{finished.stdout}{finished.stderr}")
    seconds, tokens = found[0]["seconds"], found[0]["tokens"]
    print(f"{side:>12}: {tokens} tokens in {seconds:6.1f} s, {tokens / seconds:6.1f} a second", flush=True)
    return 1000 * seconds / tokens


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="directory of a pretrained model")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[s for s in SIDES if s != "vllm" or find_spec("vllm")]
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Asked.dtype)
    parser.add_argument("--questions", type=int, default=Asked.num_questions)
    parser.add_argument("--here", choices=SIDES, help="of one process, started by this program")
    parser.add_argument("--json", type=Path, help="merge the figures into this file")
    arguments = parser.parse_args()
    if arguments.model is None:
        print("not measured: it needs the directory of a pretrained model")
        return
    asked = Asked(dtype=arguments.dtype, num_questions=arguments.questions)
    if arguments.here:
        measure_here(arguments.model, arguments.here, asked)
        return
    found = {side: measure(arguments.model, side, asked) for side in arguments.sides}
    others = [side for side in arguments.sides if side != "embedded"]
    comparisons = [
        Comparison(
            name="first turns", ours=found["embedded"], theirs=found[side], unit="ms/token", against=side
        )
        for side in others
        if "embedded" in found
    ]
    report("generate", comparisons, arguments.json)


if __name__ == "__main__":
    main()
