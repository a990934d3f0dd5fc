"""The divergence's forms in the relatives of SD-Search: whose tokens are kept, cut summands, Hinton's scale.
Cases are worked by hand."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_sd.errors import ConfigError
from megatron_sd.ops.divergence import ROW_DIVERGENCES
from megatron_sd.ops.head.vocab_parallel import VocabShard, vocab_parallel_divergence
from megatron_sd.ops.jsd import jsd_rows
from megatron_sd.ops.jsd_reference import divergence_rows
from megatron_sd.ops.native.structs import divergence_obstacle
from tests.ops.divergences import JSD, each_of
from tests.ops.test_jsd import logits, value_and_gradient

TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
FORWARD = replace(JSD, kind="forward_kl")
REVERSE = replace(JSD, kind="reverse_kl")
OF_STUDENT = replace(JSD, support="student", top_k=1)


def value(divergence, student=STUDENT, teacher=TEACHER):
    return divergence_rows(student, teacher, divergence).values.item()


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (FORWARD, 0.08512),
        (REVERSE, 0.09203),
        (JSD, 0.02190),
        (replace(JSD, beta=0.1), 0.00769),
        (replace(JSD, beta=0.9), 0.00818),
        (replace(OF_STUDENT, tail_bucket=True), 0.02101),
        (replace(FORWARD, top_k=2), 0.05381),
        (replace(FORWARD, top_k=2, support="student"), 0.05381),
        (replace(FORWARD, entry_clip=0.05), -0.1004),
        (replace(JSD, entry_clip=0.05), 0.02190),
        (replace(JSD, entry_clip=0.008), 0.0210),
    ],
    ids=str,
)
def test_the_case_that_all_share(divergence, expected):
    """T = (.7, .2, .1), S = (.5, .3, .2). JSD's summands are (.0084, .0050, .0085): at .008 two are cut."""
    assert value(divergence) == pytest.approx(expected, abs=1e-4)


def test_hinton_at_a_temperature_of_two():
    """T = (2, 0), S = (0, 0): p = (.7311, .2689), KL .1109, times 4 .4438, gradient 2 (q - p)."""
    teacher, student = torch.tensor([[2.0, 0.0]]).double(), torch.zeros(1, 2).double()
    plain = replace(FORWARD, temperature=2.0)
    assert value(plain, student, teacher) == pytest.approx(0.1109, abs=1e-4)
    scaled = replace(plain, scale_by_temperature_squared=True)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, scaled), student)
    assert found.item() == pytest.approx(0.4438, abs=1e-4)
    assert gradient[0].tolist() == pytest.approx([-0.4621, 0.4621], abs=1e-4)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_the_scale_is_the_same_through_every_door(impl):
    """The native code knows no scale, a sharded vocabulary neither: it is put on their values."""
    student, teacher = logits(4, 50, dtype=torch.float32), logits(4, 50, seed=1, dtype=torch.float32)
    rows = (torch.arange(4), torch.arange(4), torch.ones(4))
    plain = replace(FORWARD, temperature=2.0)
    scaled = replace(plain, scale_by_temperature_squared=True)
    results = [
        value_and_gradient(lambda s, d=d: jsd_rows(s, teacher, *rows, divergence=d, impl=impl), student)
        for d in (plain, scaled)
    ]
    for part, larger in zip(*results, strict=True):
        torch.testing.assert_close(larger, 4.0 * part)
    alone = VocabShard(start=0, num_real=50, gather=lambda own: own[None])
    torch.testing.assert_close(vocab_parallel_divergence(student, teacher, alone, scaled), results[1][0])


def written_out(student, teacher, divergence):
    """The cut sum by its definition; autograd gives the gradient."""
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    m = divergence.beta * p + (1 - divergence.beta) * q
    summands = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "mse": (p - q).square(),
        "jsd": divergence.beta * p * (p / m).log() + (1 - divergence.beta) * q * (q / m).log(),
    }
    return summands[divergence.kind].clamp(max=divergence.entry_clip).sum(-1)


@each_of(ROW_DIVERGENCES)
@pytest.mark.parametrize("clip", [1e-4, 3e-3, 0.05])
def test_cut_summands_have_no_gradient(divergence, clip):
    student, teacher = logits(6, 40, seed=1), logits(6, 40, seed=2)
    divergence = replace(divergence, beta=0.3, entry_clip=clip)
    expected, expected_gradient = value_and_gradient(lambda s: written_out(s, teacher, divergence), student)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(6).double(), rtol=0, atol=1e-12)


@each_of(ROW_DIVERGENCES)
def test_a_clip_that_cuts_nothing_changes_no_bit(divergence):
    student, teacher = logits(6, 40, seed=1, dtype=torch.float32), logits(6, 40, seed=2, dtype=torch.float32)
    whole = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    loose = replace(divergence, entry_clip=100.0)
    found = value_and_gradient(lambda s: divergence_rows(s, teacher, loose), student)
    assert all(map(torch.equal, found, whole))


@each_of(ROW_DIVERGENCES)
@pytest.mark.parametrize("tail_bucket", [False, True])
def test_the_students_tokens_are_read_from_both(divergence, tail_bucket):
    """As the teacher's support, of the tokens that the student finds likeliest; they have no gradient of
    their own."""
    student, teacher = logits(6, 40, seed=1), logits(6, 40, seed=2)
    divergence = replace(divergence, top_k=4, support="student", tail_bucket=tail_bucket)
    support = student.topk(4, -1).indices

    def definition(s):
        q, p = (torch.softmax(matrix, -1).gather(-1, support) for matrix in (s, teacher))
        if tail_bucket:
            q, p = (torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1) for own in (q, p))
        else:
            q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
        whole = replace(divergence, entry_clip=math.inf)
        return written_out(q.log(), p.log(), whole)

    expected, expected_gradient = value_and_gradient(definition, student)
    result = divergence_rows(student, teacher, divergence)
    found, gradient = value_and_gradient(lambda s: divergence_rows(s, teacher, divergence), student)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    outside = 1 - torch.softmax(student, -1).gather(-1, support).sum(-1)
    torch.testing.assert_close(result.truncated_mass, outside, rtol=1e-10, atol=1e-13)
    other = divergence_rows(student, teacher, replace(divergence, support="teacher")).values
    assert not torch.allclose(found, other)


def test_what_the_native_code_and_shards_have_not():
    clipped = replace(FORWARD, entry_clip=0.05)
    assert divergence_obstacle(clipped) == "entry_clip=0.05"
    alone = VocabShard(start=0, num_real=3, gather=lambda own: own[None])
    with pytest.raises(ConfigError, match=r"distill.entry_clip is 0.05, expected null where the vocabulary"):
        vocab_parallel_divergence(STUDENT, TEACHER, alone, clipped)


def test_values_that_do_not_go_together():
    with pytest.raises(ConfigError, match="distill.support is 'student' with distill.top_k null"):
        replace(JSD, support="student")
    with pytest.raises(ConfigError, match="distill.support is 'ours', expected one of"):
        replace(JSD, support="ours", top_k=3)
    with pytest.raises(ConfigError, match="distill.entry_clip is 0.0, expected more than 0"):
        replace(JSD, entry_clip=0.0)
