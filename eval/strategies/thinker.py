"""Thinker: a plan of sub-questions, each answered from what the model knows or from passages, then the answer
(after KAG-Thinker, arXiv 2506.17728). Prompts alone: its authors train on such plans."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from eval.strategies.attempt import Conversation

PLAN = (
    "Break the question below into the fewest simpler questions that lead to its answer, a line each. Write #1"
    " for the answer of Step1. The last step gives the answer. For example:\nQuestion: Where does the author of"
    " the novel Ilse come from?\nStep1: Who wrote the novel Ilse?\nStep2: Where does #1 come from?\n\nQuestion:"
    " {question}\n"
)
STEP = (
    "Answer the question if you are sure of the answer, with the answer alone inside \\boxed{{}}, for example"
    " \\boxed{{Graz}}. If you are not sure, write: I must search.\n\n{known}Question: {step}\n"
)
REFERENCES = "\n<references>\n{passages}</references>\nAnswer with the answer alone inside \\boxed{{}}.\n"
CONCLUSION = (
    "Answer the question from what was found out, with the answer alone inside \\boxed{{}}, for example"
    " \\boxed{{Graz}}.\n\n{known}Question: {question}\nLast step: {step}\n"
)
BOX = "\\boxed{"
_STEP = re.compile(r"^\s*Step\s*(\d+)\s*:\s*(\S.*?)\s*$", re.MULTILINE)
_REFERENCE = re.compile(r"#(\d+)")


async def thinker(attempt: Conversation) -> str | None:
    """Plan, answer each step but the last, then conclude. A step is searched for when the model does not
    answer it, while searches are left. A plan that cannot be read is one step: the question."""
    plan = await attempt.begin(PLAN.format(question=attempt.question)).write(())
    steps = steps_of(plan)
    if not steps:
        attempt.mark_malformed()
        steps = [attempt.question, attempt.question]
    answers: dict[int, str] = {}
    searches = 0
    for number, text in enumerate(steps[:-1], start=1):
        step = filled(text, answers)
        context = attempt.begin(STEP.format(known=_known(steps, answers), step=step))
        answer = boxed(await context.write(()))
        if answer is None and searches < attempt.max_searches:
            searches += 1
            context.read(REFERENCES.format(passages=await attempt.search(step)))
            answer = boxed(await context.write(()))
        if answer is None:
            attempt.mark_malformed()
        answers[number] = answer or "unknown"
    known, last = _known(steps, answers), filled(steps[-1], answers)
    conclusion = CONCLUSION.format(known=known, question=attempt.question, step=last)
    return boxed(await attempt.begin(conclusion).write(()))


def steps_of(plan: str) -> list[str]:
    """The steps' questions in order; empty unless they are numbered from 1 without a gap."""
    found = [(int(number), text) for number, text in _STEP.findall(plan)]
    in_order = [number for number, _ in found] == list(range(1, len(found) + 1))
    return [text for _, text in found] if in_order else []


def filled(step: str, answers: Mapping[int, str]) -> str:
    """The step with earlier answers in place of #1, #2, ...; a number that has none stays."""
    return _REFERENCE.sub(lambda found: answers.get(int(found.group(1)), found.group()), step)


def boxed(text: str) -> str | None:
    """What stands in the last closed box, braces within it counted; None without one, or an empty one."""
    found = None
    for part in text.split(BOX)[1:]:
        depth = 1
        for place, character in enumerate(part):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                found = part[:place].strip()
                break
    return found or None


def _known(steps: Sequence[str], answers: Mapping[int, str]) -> str:
    return "".join(f"{filled(steps[number - 1], answers)} {answer}\n" for number, answer in answers.items())
