"""The check of training on a GPU, at toy sizes on a CPU: its logic, not its figures."""

import subprocess
import sys

import pytest
import torch

from benchmarks.training.gpu_train import (
    ARMS,
    SHAPES,
    WHOLE_LOGITS,
    Lengths,
    describe,
    measure,
    samples,
    write_random_model,
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Arm -> what was measured."""
    model = tmp_path_factory.mktemp("toy") / "model"
    write_random_model(model, SHAPES["0.5b"], tiny=True, dtype="float32")
    return {
        arm: measure(SHAPES["0.5b"], model, tiny=True, **chosen)
        for arm, chosen in (ARMS | WHOLE_LOGITS).items()
    }


def test_whole_logits_take_the_step_of_the_one_pass(figures):
    fused, whole = (figures[name]["grad_norm"] for name in WHOLE_LOGITS)
    assert fused == pytest.approx(whole, rel=5e-6)
    assert figures["SD-Search"]["grad_norm"] == pytest.approx(fused, rel=5e-6), "at stage 3 as at stage 2"
    assert figures["GRPO"]["grad_norm"] != pytest.approx(fused, rel=5e-6), "1e-5 apart"


def test_the_teacher_reads_each_prompt_once_and_every_rollout(figures):
    grpo, distilled = figures["GRPO"], figures["SD-Search"]
    assert grpo["tokens"] == distilled["tokens"] == 5 * (20 + 4 * (9 + 50) + 6)
    assert grpo["teacher_tokens"] == 0
    continuation = 1 + 3 * (9 + 50) + 7  # the prompt's last token, then all before the last query token
    assert distilled["teacher_tokens"] == 35 + 20 - 1 + 5 * continuation


def test_the_table_says_what_sd_search_costs_over_grpo(figures):
    table = describe("0.5b", figures, rate=None)
    assert "SD-Search over GRPO: " in table and "whole logits over SD-Search, stage 2: " in table
    assert "failed: boom" in describe("0.5b", {"GRPO": {"failed": "boom"}}, rate=None)


def test_realistic_rollouts():
    (sample, *_) = samples(1, 1000, lengths=Lengths())
    assert (len(sample.ids), len(sample.query_positions)) == (200 + 4 * 590 + 60, 48)
    assert sample.loss_mask[sample.query_positions].all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_why_it_measures_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.gpu_train"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "gpu-check-train needs a CUDA device that torch sees" in done.stderr
