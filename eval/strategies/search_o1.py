"""Search-o1: search within the reasoning, and a second prompt that condenses what was found (Li et al.,
2025)."""

from __future__ import annotations

from eval.strategies.attempt import Context, Conversation
from eval.strategies.reading import ANSWER_REQUEST, ANSWER_TAGS, answer_of, between

QUERY_TAGS = ("<|begin_search_query|>", "<|end_search_query|>")
RESULT_TAGS = ("<|begin_search_result|>", "<|end_search_result|>")
PROMPT = (
    "Answer the question below, thinking step by step. Whenever you lack knowledge, search: write the query"
    f" between {QUERY_TAGS[0]} and {QUERY_TAGS[1]}; what helps of the passages found comes back between"
    f" {RESULT_TAGS[0]} and {RESULT_TAGS[1]}. You may search up to {{max_searches}} times."
    f" {ANSWER_REQUEST}\nQuestion: {{question}}\n"
)
CONDENSE = (
    "Read the passages found for a search query and say, in a few sentences, what in them helps the reasoning"
    ' on. If nothing does, write "No helpful information found."\n\nReasoning so far:\n{reasoning}\n\nQuery:'
    " {query}\n\n{passages}\nWhat helps:"
)


async def search_o1(attempt: Conversation) -> str | None:
    """Reason; at a query search, condense the passages in a context of their own, and reason on with what
    they yield.

    After max_search_turns searches the reasoning goes on without one.
    """
    context = attempt.begin(PROMPT.format(max_searches=attempt.max_searches, question=attempt.question))
    for _ in range(attempt.max_searches):
        text = await context.write((QUERY_TAGS[1], ANSWER_TAGS[1]))
        query = between(text, *QUERY_TAGS)
        if query is None:
            break
        result = await _condensed(attempt, context, query)
        context.read(f"\n{RESULT_TAGS[0]} {result} {RESULT_TAGS[1]}\n")
    else:
        text = await context.write((ANSWER_TAGS[1],))
    answer = answer_of(text)
    if answer is None:
        attempt.mark_malformed()
    return answer


async def _condensed(attempt: Conversation, context: Context, query: str) -> str:
    passages = await attempt.search(query)
    prompt = CONDENSE.format(reasoning=context.text.strip(), query=query, passages=passages)
    return " ".join((await attempt.begin(prompt).write(())).split())
