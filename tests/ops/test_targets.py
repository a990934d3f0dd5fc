"""What the student is pulled to: the teacher, or a control that has its form and not its knowledge."""

from typing import get_args, get_type_hints

import torch

from megatron_sd.config import DistillConfig
from megatron_sd.ops.head.one_pass import linear_jsd
from megatron_sd.ops.head.targets import TARGETS, target_logits
from megatron_sd.ops.jsd_reference import divergence_rows
from tests.ops.test_linear_jsd import curved_loss, inputs, options

LOGITS = torch.randn(5, 31, generator=torch.Generator().manual_seed(3))


def test_every_target_of_the_configuration_exists():
    assert set(get_args(get_type_hints(DistillConfig)["target"])) == set(TARGETS)


def test_the_teacher_is_taken_as_it_is():
    assert TARGETS["teacher"](LOGITS) is LOGITS


def test_uniform_gives_every_token_the_same_probability():
    probabilities = torch.softmax(TARGETS["uniform"](LOGITS), -1)
    torch.testing.assert_close(probabilities, torch.full((5, 31), 1 / 31))


def test_a_shuffled_vocabulary_keeps_entropy_and_moves_tokens_alike_in_every_row():
    shuffled = TARGETS["shuffled_vocabulary"](LOGITS)
    assert torch.equal(shuffled.sort(-1).values, LOGITS.sort(-1).values)
    origin = [[(LOGITS[row] == value).nonzero().item() for value in shuffled[row]] for row in range(5)]
    assert all(own == origin[0] for own in origin), "one permutation"
    assert sum(place == token for place, token in enumerate(origin[0])) < 5
    assert torch.equal(TARGETS["shuffled_vocabulary"](LOGITS[2:4]), shuffled[2:4]), "the same at every call"


def test_a_difference_is_added_to_the_students_logits():
    student, teacher = LOGITS.flip(0), (LOGITS - LOGITS.flip(0)).bfloat16()
    kept = teacher.clone()
    for name, target in TARGETS.items():
        added = target_logits(teacher.clone(), student, name, is_difference=True)
        assert torch.equal(added, target(kept.float() + student)) and added.dtype == torch.float32
        assert torch.equal(target_logits(teacher, student, name, is_difference=False), target(kept.float()))


def test_the_head_pulls_towards_the_target():
    """Values and gradient of the whole pass, against the divergence of plain logits."""
    hidden, teacher, weight, bias, rows = inputs()
    student_logits = torch.nn.functional.linear(hidden, weight, bias).detach()[rows.query_rows]
    teacher_logits = torch.nn.functional.linear(teacher, weight, bias).detach()
    for name, target in TARGETS.items():
        chosen = options(target=name)
        values = linear_jsd(hidden, teacher, (weight, bias), rows, row_loss=curved_loss, options=chosen)
        expected = divergence_rows(
            student_logits.double(),
            target(teacher_logits).double(),
            chosen.divergence,
        ).values
        torch.testing.assert_close(values.divergences.double(), expected, rtol=1e-4, atol=1e-6)
    entropies = linear_jsd(
        hidden, teacher, (weight, bias), rows, row_loss=None, options=options(target="uniform")
    ).teacher_entropies
    torch.testing.assert_close(
        entropies, torch.full_like(entropies, torch.tensor(weight.shape[0]).log().item())
    )


def test_a_teacher_with_a_head_of_its_own_is_read_through_it():
    hidden, teacher, weight, bias, rows = inputs()
    own = weight.detach().flip(0) * 0.7, bias.detach() + 0.1
    teacher_logits = torch.nn.functional.linear(teacher, *own)
    student_logits = torch.nn.functional.linear(hidden, weight, bias).detach()[rows.query_rows]
    expected = divergence_rows(student_logits.double(), teacher_logits.double(), options().divergence).values
    for teacher_logits_mode in ("delta", "float32", "same_dtype"):
        chosen = options(teacher_logits=teacher_logits_mode)
        call = {"row_loss": curved_loss, "options": chosen}
        values = linear_jsd(hidden, teacher, (weight, bias), rows, **call, teacher_head=own)
        torch.testing.assert_close(values.divergences.double(), expected, rtol=1e-4, atol=1e-6)
        shared = linear_jsd(hidden, teacher, (weight, bias), rows, **call)
        again = linear_jsd(
            hidden, teacher, (weight, bias), rows, **call, teacher_head=(weight.detach(), bias.detach())
        )
        torch.testing.assert_close(again.divergences, shared.divergences, rtol=1e-4, atol=1e-6)
