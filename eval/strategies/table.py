"""The strategies by name: what `sd-search eval --strategy` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eval.metrics import answered_in_form
from eval.strategies.attempt import Solve, Tools
from eval.strategies.ircot import ircot
from eval.strategies.react import react
from eval.strategies.runner import PromptedStrategy, Strategy
from eval.strategies.search_o1 import search_o1
from eval.strategies.self_ask import self_ask
from eval.strategies.single import chain_of_thought, direct, rag
from eval.strategies.thinker import thinker
from megatron_sd.building.rollout_side import RolloutSide
from megatron_sd.records import Rollout
from megatron_sd.search.rewards.form import format_valid

AGENT = "agent"
PROMPTED: Mapping[str, Solve] = {
    "direct": direct,
    "cot": chain_of_thought,
    "rag": rag,
    "ircot": ircot,
    "search_o1": search_o1,
    "react": react,
    "self_ask": self_ask,
    "thinker": thinker,
}


def build_strategy(name: str, side: RolloutSide, *, top_k: int, seed: int) -> Strategy:
    """The trained search agent (`agent`: the rollouter itself) or a prompted strategy on the same engine
    and retriever."""
    if name == AGENT:
        return side.rollouter
    tools = Tools(engine=side.engine, retriever=side.retriever, environment=side.environment, top_k=top_k)
    return PromptedStrategy(PROMPTED[name], tools, seed=seed, work=side.work)


def form_of(name: str) -> Callable[[Rollout], float]:
    """What a strategy's valid form is: the agent's protocol, or an answer in the form that the prompts
    asked for."""
    return format_valid if name == AGENT else answered_in_form
