"""The hindsight block's variants: the paper's, its ablations, and the controls that a claim needs
(docs/method.md, section 3).

Each is one small function `(BlockContext) -> str`, and a name in BLOCKS. A control changes one thing and
keeps the rest: who is listed, which outcome stands beside whom, or whether the text says anything at all.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_sd.algorithm.hindsight import (
    HEADLINE,
    RENDERERS,
    AttemptLine,
    BlockBuilder,
    BlockContext,
    attempt_of,
    attempts_of,
    is_correct,
    quoted,
)
from megatron_sd.own_code.example_rollouts import example_groups
from megatron_sd.own_code.seam import Seam, fault_of_type
from megatron_sd.records import Rollout

FILLER = "the"  # one token in every tokenizer of ours, and no news
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by did do does for from has have how in is it its of on or that the their to was were"
        " what when where which who whom whose why with",
    )
)


def paper_block(context: BlockContext) -> str:
    """Queries and outcome of every rollout of the question, the focal one included."""
    return context.render(context.attempts)


def leave_one_out_block(context: BlockContext) -> str:
    """The paper's block without the focal rollout, whose queries the teacher could otherwise copy."""
    return context.render([attempt_of(rollout, context.correct_above) for rollout in context.siblings])


def single_block(context: BlockContext) -> str:
    """One attempt, the focal rollout's own (the paper does not say which one its ablation keeps)."""
    if context.own.stop_reason.is_infrastructure:
        return ""
    return context.render([attempt_of(context.own, context.correct_above)])


def only_correct_block(context: BlockContext) -> str:
    """The CORRECT attempts alone; empty when there is none."""
    return context.render([attempt for attempt in context.attempts if attempt.correct])


def only_correct_shuffled_block(context: BlockContext) -> str:
    """As many attempts, drawn at random, all of them called CORRECT: the control of only_correct."""
    return context.render([attempt for attempt in _shuffled(context) if attempt.correct])


def settled_block(context: BlockContext) -> str:
    """The paper's block with each attempt's last query about each thing that it asked for (ours). A query
    that was asked again in other words did not find what it was for; in a CORRECT attempt the label would
    praise it."""
    return context.render([_settled(attempt) for attempt in context.attempts])


def settled_shuffled_block(context: BlockContext) -> str:
    """`settled` with its labels permuted among the attempts: a control."""
    return context.render([_settled(attempt) for attempt in _shuffled(context)])


def settled_wrong_question_block(context: BlockContext) -> str:
    """`settled` of another question of the step: a control. Empty when the step has one question only."""
    return context.render([_settled(attempt) for attempt in _of_another_question(context)])


def no_labels_block(context: BlockContext) -> str:
    """The paper's block without outcome labels."""
    return context.render([replace(attempt, correct=None) for attempt in context.attempts])


def shuffled_block(context: BlockContext) -> str:
    """The paper's block with its labels permuted among the attempts: a control."""
    return context.render(_shuffled(context))


def inverted_block(context: BlockContext) -> str:
    """The paper's block with every label turned round: a control that must do harm to a reader."""
    return context.render([replace(attempt, correct=not attempt.correct) for attempt in context.attempts])


def flat_pool_block(context: BlockContext) -> str:
    """All queries in one line, in alphabetical order, and how many attempts ended how: nobody can tell
    whose query was whose."""
    attempts = context.attempts
    queries = sorted(quoted(query) for attempt in attempts for query in attempt.queries)
    if not queries:
        return ""
    num_correct = sum(bool(attempt.correct) for attempt in attempts)
    outcomes = f"{num_correct} CORRECT, {len(attempts) - num_correct} INCORRECT"
    return f"{HEADLINE}\nQueries: {', '.join(queries)}\nOutcomes: {outcomes}\n"


def wrong_question_block(context: BlockContext) -> str:
    """The block of another question of the step: a control. Empty when the step has one question only."""
    return context.render(_of_another_question(context))


def dummy_block(context: BlockContext) -> str:
    """The paper's block with every word replaced by the same one: as long, and without content."""
    return re.sub(r"\w+", FILLER, paper_block(context))


def turn_causal_block(context: BlockContext) -> str:
    """For each turn of the focal rollout, what its siblings had asked up to that turn, with how they ended.

    The focal rollout is left out, and so is everything that a sibling asked in a later turn.
    """
    seen = [replace(rollout, turns=rollout.turns[: context.turn + 1]) for rollout in context.siblings]
    return context.render([attempt_of(rollout, context.correct_above) for rollout in seen])


def with_documents_block(context: BlockContext) -> str:
    """The paper's block with the passages that each query found, uncut: long, and it shows the answer."""
    usable = context.groups[context.group].usable
    pairs = zip(context.attempts, usable, strict=True)
    return context.render([replace(attempt, passages=_passages(rollout)) for attempt, rollout in pairs])


def solution_block(context: BlockContext) -> str:
    """The first CORRECT sibling's whole rollout: what it searched for, what it found, what it answered; empty
    where no sibling is CORRECT (SDPO, arXiv 2601.20802, whose code leaves thoughts out, too)."""
    found = (rollout for rollout in context.siblings if is_correct(rollout, context.correct_above))
    solved = next(found, None)
    if solved is None:
        return ""
    searches = [
        f"Search: {quoted(query)}\nFound: {' '.join(map(quoted, passages)) or 'nothing'}\n"
        for query, passages in zip(solved.queries, _passages(solved), strict=True)
    ]
    answer = f"Answer: {quoted(solved.answer or '')}\n"
    return f"A correct solution:\n{''.join(searches)}{answer}Correctly solve the original question.\n"


def reference_block(context: BlockContext) -> str:
    """The question's accepted answers: of a reference solution, which OPSD (arXiv 2601.18734) shows, what our
    questions have."""
    answers = context.groups[context.group].question.golden_answers
    if not answers:
        return ""
    shown = " or ".join(map(quoted, answers))
    return f"The reference answer: {shown}\nNow solve the question yourself, step by step.\n"


def no_block(_: BlockContext) -> str:
    """No hindsight. As `plain` the teacher reads the student's prompt (GKD, arXiv 2306.13649); as `none`
    nobody reads anything: plain GRPO."""
    return ""


BLOCKS: dict[str, BlockBuilder] = {
    "paper": paper_block,
    "leave_one_out": leave_one_out_block,
    "single": single_block,
    "only_correct": only_correct_block,
    "only_correct_shuffled": only_correct_shuffled_block,
    "settled": settled_block,
    "settled_shuffled": settled_shuffled_block,
    "settled_wrong_question": settled_wrong_question_block,
    "no_labels": no_labels_block,
    "shuffled": shuffled_block,
    "inverted": inverted_block,
    "flat_pool": flat_pool_block,
    "wrong_question": wrong_question_block,
    "dummy": dummy_block,
    "turn_causal": turn_causal_block,
    "with_documents": with_documents_block,
    "solution": solution_block,
    "reference": reference_block,
    "plain": no_block,
    "none": no_block,
}
BLOCK_SEAM = Seam(
    key="distill.block",
    form="block(context: BlockContext) -> str",
    table=BLOCKS,
    example=lambda: (_example_context(),),
    fault=lambda text, *_: fault_of_type(text, str),
)
BY_TURN = frozenset({"turn_causal"})  # blocks that differ from turn to turn of a rollout
PLAIN = frozenset({"plain"})  # blocks without a text, behind which a teacher with other weights reads


def _example_context() -> BlockContext:
    render = RENDERERS["outcome_last"]
    return BlockContext(groups=example_groups(), group=0, focal=0, correct_above=0.0, seed=0, render=render)


def _shuffled(context: BlockContext) -> list[AttemptLine]:
    """The group's attempts with their labels permuted; the same draw for all rollouts of the group."""
    attempts = context.attempts
    labels = [attempt.correct for attempt in attempts]
    context.rng.shuffle(labels)
    return [replace(attempt, correct=label) for attempt, label in zip(attempts, labels, strict=True)]


def _of_another_question(context: BlockContext) -> list[AttemptLine]:
    """The attempts at another question, one draw for all rollouts of the group; none when there is no
    other."""
    others = [i for i in range(len(context.groups)) if i != context.group]
    if not others:
        return []
    return attempts_of(context.groups[context.rng.choice(others)], context.correct_above)


def _settled(attempt: AttemptLine) -> AttemptLine:
    queries = attempt.queries
    last = [q for i, q in enumerate(queries) if not any(_asks_again(later, q) for later in queries[i + 1 :])]
    return replace(attempt, queries=tuple(last))


def _asks_again(later: str, earlier: str) -> bool:
    """Whether two queries share at least half of the content words of the one that has fewer."""
    one, other = _content_words(later), _content_words(earlier)
    fewer = min(len(one), len(other))
    return later == earlier or (fewer > 0 and 2 * len(one & other) >= fewer)


def _content_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower())) - FUNCTION_WORDS


def _passages(rollout: Rollout) -> tuple[tuple[str, ...], ...]:
    """The texts that each query of the rollout found."""
    searches = (turn for turn in rollout.turns if turn.query is not None)
    return tuple(tuple(f"{h.passage.title} {h.passage.text}".strip() for h in turn.hits) for turn in searches)
