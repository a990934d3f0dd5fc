"""Prompts that begin alike: their opening is computed once, and nothing that is sampled changes."""

import asyncio

import numpy as np
import pytest
import torch

from megatron_sd.errors import RolloutError
from megatron_sd.rollout.embedded.opening import MIN_TOKENS, common_length
from tests.rollout.fakes import KINDS, engine, full_forward_logprobs, record_feeds, request, serve

RULES = tuple(np.random.default_rng(0).integers(3, 400, size=MIN_TOKENS + 22).tolist())
OTHER_RULES = (9, *RULES)


def asked(*tails: tuple[int, ...], rules=RULES, copies: int = 1):
    """Requests of `copies` rollouts for each question; a question is what follows the rules."""
    return [
        request(f"{rules[0]}/{tail}/{n}", (*rules, *tail), seed=n) for tail in tails for n in range(copies)
    ]


def computed(fed) -> list[list[int]]:
    """Tokens computed for each row, of the passes that are no decoding."""
    return [sorted(valid.sum(1).tolist()) for valid in fed if valid.shape[1] > 1]


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_one_full_forward(kind, copies):
    many = asked((5, 6, 7), (5, 8), (30, 31, 32, 33), copies=copies)
    for one, completion in zip(many, serve(engine(kind), *many)):
        expected = full_forward_logprobs(kind, one.prompt_ids, completion.ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_what_prompts_share_is_computed_once():
    own = engine()
    fed = record_feeds(own)
    many = asked((5, 6, 7), (40, 8), (30, 31, 32, 33), copies=2)
    alone = [serve(engine(), one)[0].ids for one in many]
    assert [c.ids for c in serve(own, *many)] == alone
    assert computed(fed) == [[len(RULES)], [2, 3, 4]]


def test_later_prompts_begin_with_the_opening_that_is_held_and_turns_go_on():
    own = engine()
    fed = record_feeds(own)

    async def run():
        first = await own.generate(asked((5, 6, 7))[0])
        second = await own.generate(asked((40, 8))[0])
        turn = (*RULES, 40, 8, *second.ids, 77, 78)
        return first, second, await own.generate(request(f"{RULES[0]}/(40, 8)/0", turn, seed=1)), turn

    *_, third, turn = asyncio.run(run())
    # a lone prompt: all but its last token, then that token, a step of one
    assert computed(fed) == [[len(RULES) + 2], [2], [3]]
    np.testing.assert_allclose(
        third.logprobs, full_forward_logprobs("qwen2-tied", turn, third.ids), atol=1e-4
    )


def test_a_lone_prompt_of_other_rules_takes_over_and_short_openings_are_not_held():
    own = engine()
    fed = record_feeds(own)

    async def run():
        for one in (*asked((5, 6)), *asked((5, 6), rules=OTHER_RULES), *asked((7, 8), rules=OTHER_RULES)):
            await own.generate(one)

    asyncio.run(run())
    assert computed(fed) == [[len(RULES) + 1], [len(OTHER_RULES) + 1], [2]]
    fed.clear()
    serve(own, *asked((5, 6), (7, 8), rules=RULES[:90]))
    assert computed(fed) == [[92, 92]]


def test_a_longer_shared_opening_replaces_a_shorter_one():
    """As hindsight blocks of one question do, after prompts without."""
    own = engine()
    fed = record_feeds(own)
    block = tuple(np.random.default_rng(1).integers(3, 400, size=MIN_TOKENS).tolist())

    async def run():
        await asyncio.gather(*(own.generate(r) for r in asked((5, 6), (7, 8))))
        await asyncio.gather(*(own.generate(r) for r in asked((*block, 5), (*block, 7))))
        await own.generate(asked((*block, 11, 12))[0])

    asyncio.run(run())
    assert computed(fed) == [[len(RULES)], [2, 2], [len(RULES) + len(block)], [2]]


def test_nothing_is_held_beyond_an_update():
    own = engine()
    many = asked((5, 6, 7), (40, 8))
    before = [c.ids for c in serve(own, *many)]
    own.begin_update()
    own.load_bucket([(name, weight * 1.5) for name, weight in own._decoder._model.named_parameters()])
    own.finish_update(1)
    fed = record_feeds(own)
    assert [c.ids for c in serve(own, *many)] != before
    assert computed(fed)[0] == [len(RULES)]


def test_a_broken_opening_fails_its_prompts_and_leaves_no_trace():
    own = engine("qwen2-untied")
    sound = asked((5, 6), (7, 8))
    expected = [c.ids for c in serve(own, *sound)]
    with torch.no_grad():
        own._decoder._model.get_input_embeddings().weight[400] = float("nan")
    broken = asked((5, 6), (7, 8), rules=(*RULES, 400))

    async def run():
        errors = await asyncio.gather(*(own.generate(r) for r in broken), return_exceptions=True)
        return errors, await asyncio.gather(*(own.generate(r) for r in sound))

    errors, completions = asyncio.run(run())
    assert all(isinstance(error, RolloutError) for error in errors)
    assert [c.ids for c in completions] == expected
    assert all(torch.isfinite(t).all() for t in own._decoder._opening.store.tensors)


def test_common_length():
    pairs = [((), (1,)), ((1, 2), (1, 2, 3)), ((1, 2, 3), (1, 4, 3)), ((2,), (1,))]
    assert [common_length(*pair) for pair in pairs] == [0, 2, 1, 0]
