"""`sd-search gate` sampling with a real vLLM server, and going on where it was killed."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.world.world import WorldConfig
from eval.gate.draws import DRAWS_NAME
from eval.samples import read_lines
from launch.programs import make_world
from megatron_sd.rollout.bank import rollout_of

MODEL = Path(str(files("data_prep"))) / "coldstart_model"


def place(line: str) -> tuple[int, int]:
    slice_ = json.loads(line)
    return slice_["draw"], slice_["start"]


@pytest.mark.ranks
def test_the_gate_on_vllm(tmp_path):
    world, output = tmp_path / "world", tmp_path / "gate"
    make_world(WorldConfig(output=str(world), num_train_questions=20, num_eval_questions=8))
    command = [
        *(sys.executable, "-m", "launch.cli", "gate"),
        f"--model.path={MODEL}",
        "--model.dtype=float32",
        f"--retriever.corpus={world / 'corpus'}",
        "--retriever.top_k=1",
        f"--questions={world / 'questions.jsonl'}",
        f"--output={output}",
        "--limit=4",
        "--protocol.preset=compact",
        "--rollout.engine=vllm",
        "--rollout.vllm.kv_cache_gib=0.25",
        "--rollout.questions_per_step=2",
        "--rollout.group_size=3",
        "--rollout.max_rollout_tokens=640",
        "--rollout.max_turn_tokens=24",
        "--rollout.max_observation_tokens=48",
    ]

    def run() -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert finished.returncode == 1, finished.stdout[-3000:] + finished.stderr[-3000:]
        assert "the gate is closed: too few questions have rollouts with both outcomes" in finished.stderr
        return (output / "gate.json").read_text()

    run()
    lines = (output / DRAWS_NAME).read_text().splitlines()
    (output / DRAWS_NAME).write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])  # as a kill leaves it
    report = run()
    again = (output / DRAWS_NAME).read_text().splitlines()
    assert again[:-2] == lines[:-2]
    assert [place(line) for line in again] == [place(line) for line in lines]

    assert json.loads(report)["overall"]["linked"]["num_questions"] > 0
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    slices = list(read_lines(output / DRAWS_NAME))
    rollouts = [rollout_of(fields) for own in slices for group in own["groups"] for fields in group]
    assert all(len(group) == 3 for own in slices for group in own["groups"])
    for rollout in rollouts[::7]:
        turn = rollout.turns[0]
        ids = torch.tensor([[*rollout.prompt_ids, *turn.completion_ids]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(rollout.prompt_ids) - 1
        expected = logprobs[range(start, ids.shape[1] - 1), ids[0, start + 1 :]]
        torch.testing.assert_close(torch.tensor(turn.completion_logprobs), expected, atol=1e-4, rtol=0)
