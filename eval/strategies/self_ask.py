"""Self-Ask: follow-up questions, each answered over passages, then the final answer (Press et al., 2023).
Zero-shot."""

from __future__ import annotations

from eval.strategies.attempt import Conversation
from eval.strategies.reading import after

PROMPT = (
    "Answer the question below by asking yourself simpler follow up questions, one at a time. For"
    " example:\nAre follow up questions needed here: Yes.\nFollow up: Who wrote the novel Ilse?\nIntermediate"
    " answer: Rosa Kern.\nFollow up: Where does Rosa Kern come from?\nIntermediate answer: Graz.\nSo the"
    " final answer is: Graz\n\nQuestion: {question}\n"
)
OPENING = "Are follow up questions needed here:"
FOLLOW_UP = "Follow up:"
INTERMEDIATE = "Intermediate answer:"
CONCLUSION = "So the final answer is:"


async def self_ask(attempt: Conversation) -> str | None:
    """Ask, search for what was asked, answer it from the passages, and ask again; conclude after
    max_search_turns questions."""
    context = attempt.begin(PROMPT.format(question=attempt.question))
    context.read(OPENING)
    line = await context.write(("\n",))
    if after(line, FOLLOW_UP) is None and after(line, CONCLUSION) is None:  # "Yes."
        line = await context.write(("\n",))
    for _ in range(attempt.max_searches):
        question = after(line, FOLLOW_UP)
        if not question:
            break
        context.read(f"{await attempt.search(question)}{INTERMEDIATE}")
        await context.write(("\n",))
        line = await context.write(("\n",))
    answer = after(line, CONCLUSION)
    if not answer:
        attempt.mark_malformed()
        context.read(CONCLUSION)
        answer = (await context.write(("\n",))).strip().removesuffix(".")
    return answer
