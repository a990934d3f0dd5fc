"""Values of distill.* that do not go together are refused before the run, by the names of both keys."""

import pytest

from megatron_sd.config.load import load
from megatron_sd.errors import ConfigError
from tests.config.test_config import REQUIRED

NO_POLICY = ("--policy_loss.weight=0",)


def message(*argv):
    with pytest.raises(ConfigError) as caught:
        load([*REQUIRED, *argv])
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ("--distill.support=student",),
            "distill.support: found student with distill.top_k none, expected a top_k",
        ),
        (
            (*NO_POLICY, "--distill.block=none"),
            "policy_loss.weight: found 0 with distill.block none, expected more than 0, or a block",
        ),
        (
            NO_POLICY,
            "distill.measure_every: found 25 with policy_loss.weight 0, expected 0 with distill.alpha.mode",
        ),
        (
            ("--distill.block=plain",),
            "distill.teacher: found live with distill.block plain, expected other, frozen or ema",
        ),
        (
            ("--distill.teacher=other",),
            "distill.teacher_path: found none with distill.teacher other, expected the directory of the",
        ),
        (
            ("--distill.teacher_path=somewhere",),
            "distill.teacher_path: found 'somewhere' with distill.teacher live, expected none, or teacher",
        ),
        (
            ("--distill.divergence=sampled", "--distill.top_k=5"),
            "distill.top_k: found 5 with distill.divergence sampled, expected none: it looks at one token",
        ),
        (
            ("--distill.divergence=sampled", "--distill.temperature=1.1"),
            "distill.temperature: found 1.1 with distill.divergence sampled, expected 1.0",
        ),
        (
            (*NO_POLICY, "--distill.measure_every=0"),
            "distill.alpha.warmup_steps: found 50 with policy_loss.weight 0, expected 0: nothing would be",
        ),
        (("--policy_loss.weight=1.5",), "policy_loss.weight: found 1.5, expected between 0 and 1"),
        (("--distill.importance_cap=0",), "distill.importance_cap: found 0.0, expected more than 0"),
        (("--distill.entry_clip=0",), "distill.entry_clip: found 0.0, expected more than 0"),
        (
            ("--distill.entry_clip=0.05", "--update.tensor_parallel_size=2"),
            "distill.entry_clip: found 0.05 with update.tensor_parallel_size above 1, expected none",
        ),
    ],
)
def test_what_is_refused(argv, words):
    assert message(*argv).startswith(words)


def test_what_goes_together():
    own = load([*REQUIRED, "--distill.support=student", "--distill.top_k=20", "--distill.importance_cap=2"])
    assert (own.distill.support, own.distill.importance_cap) == ("student", 2.0)
    alone = ("--distill.measure_every=0", "--distill.alpha.warmup_steps=0")
    assert load([*REQUIRED, *NO_POLICY, *alone]).policy_loss.weight == 0.0
