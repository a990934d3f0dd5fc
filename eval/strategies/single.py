"""Strategies that write once: the answer alone, a chain of thought, an answer over retrieved passages."""

from __future__ import annotations

from eval.strategies.attempt import Conversation
from eval.strategies.reading import ANSWER_REQUEST, ANSWER_TAGS, answer_of

DIRECT = f"Answer the question below from what you know. {ANSWER_REQUEST}\nQuestion: {{question}}\n"
CHAIN_OF_THOUGHT = (
    "Answer the question below. First think step by step between <think> and </think>. "
    f"{ANSWER_REQUEST}\nQuestion: {{question}}\n"
)
RAG = (
    f"Answer the question below with the help of these passages. {ANSWER_REQUEST}\n\n{{passages}}\nQuestion:"
    " {question}\n"
)


async def direct(attempt: Conversation) -> str | None:
    """The model's own knowledge, without a thought."""
    return await _answer(attempt, DIRECT.format(question=attempt.question))


async def chain_of_thought(attempt: Conversation) -> str | None:
    """Zero-shot chain of thought (Wei et al., 2022; Kojima et al., 2022)."""
    return await _answer(attempt, CHAIN_OF_THOUGHT.format(question=attempt.question))


async def rag(attempt: Conversation) -> str | None:
    """One search for the question itself, then an answer over what it found (Lewis et al., 2020)."""
    passages = await attempt.search(attempt.question)
    return await _answer(attempt, RAG.format(passages=passages, question=attempt.question))


async def _answer(attempt: Conversation, prompt: str) -> str | None:
    answer = answer_of(await attempt.begin(prompt).write(ANSWER_TAGS[1:]))
    if answer is None:
        attempt.mark_malformed()
    return answer
