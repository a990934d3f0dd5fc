"""IRCoT: every sentence of a chain of thought is the next query (Trivedi et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from eval.strategies.attempt import Context, Conversation
from eval.strategies.reading import after
from megatron_sd.records import Hit, TokenIds

PROMPT = (
    "Answer the question below step by step, with the help of these passages. Write one short sentence a"
    ' line. When you know enough, write "So the answer is:" and the answer alone.\n\n{passages}\nQuestion:'
    " {question}\nThoughts:\n"
)
CONCLUSION = "So the answer is:"


async def ircot(attempt: Conversation) -> str | None:
    """Search for the question; then think a sentence, search for it, and think on over all passages found
    so far.

    The newest passages stand first, and stay where room is short. After max_search_turns searches, or at an
    empty thought, the model concludes.
    """
    await attempt.search(attempt.question)
    found, thoughts = attempt.hits, ()
    for _ in range(attempt.max_searches - 1):
        context = _context(attempt, found, thoughts)
        thought = await context.write(("\n",))
        answer = after(thought, CONCLUSION)
        if answer or not thought.strip():
            break
        thoughts = context.written
        await attempt.search(thought)
        found = _joined(attempt.hits, found)
    else:
        answer = None
    return answer or await _conclusion(_context(attempt, found, thoughts))


async def _conclusion(context: Context) -> str:
    context.read(CONCLUSION)
    return (await context.write(("\n",))).strip().removesuffix(".")


def _context(attempt: Conversation, found: Sequence[Hit], thoughts: TokenIds) -> Context:
    return attempt.begin(PROMPT.format(passages=attempt.passages(found), question=attempt.question), thoughts)


def _joined(newest: Sequence[Hit], found: Sequence[Hit]) -> tuple[Hit, ...]:
    """The newest passages, then the others that are not among them."""
    known = {hit.passage.id for hit in newest}
    return (*newest, *(hit for hit in found if hit.passage.id not in known))
