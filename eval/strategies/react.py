"""ReAct: thoughts, actions and observations in turn (Yao et al., 2023). Zero-shot; a search returns
passages."""

from __future__ import annotations

import re

from eval.strategies.attempt import Conversation

PROMPT = (
    "Answer the question below in steps of Thought, Action and Observation. An action is Search[query], which"
    " returns passages, or Finish[answer], which ends with the answer alone. For example:\nThought 1: I need"
    " the birthplace of the author of Ilse.\nAction 1: Search[author of the novel Ilse]\nObservation 1: [1]"
    " Ilse (novel): Ilse is a novel by Rosa Kern of Graz.\nThought 2: The author comes from Graz.\nAction 2:"
    " Finish[Graz]\n\nQuestion: {question}\n"
)
NO_ACTION = "That was neither Search[query] nor Finish[answer].\n"
_ACTION = re.compile(r"(Search|Finish)\[([^\[\]]*)\]")


async def react(attempt: Conversation) -> str | None:
    """Think and act until Finish; at most max_search_turns steps and one last, in which only Finish
    counts."""
    context = attempt.begin(PROMPT.format(question=attempt.question))
    context.read("Thought 1:")
    for number in range(1, attempt.max_searches + 2):
        action = _ACTION.search(await context.write(("]",)))
        if action and action[1] == "Finish":
            return action[2]
        if action:
            observation = await attempt.search(action[2]) if number <= attempt.max_searches else ""
        else:
            attempt.mark_malformed()
            observation = NO_ACTION
        if number <= attempt.max_searches:
            context.read(f"\nObservation {number}: {observation}Thought {number + 1}:")
    return None
