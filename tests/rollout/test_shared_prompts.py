import asyncio

import numpy as np
import pytest
import torch

from megatron_sd.errors import RolloutError
from megatron_sd.rollout.embedded.engine import TorchEngine
from tests.rollout.fakes import (
    KINDS,
    codec,
    engine,
    full_forward_logprobs,
    model,
    record_feeds,
    request,
    serve,
)

PROMPT = tuple(range(3, 33))


def groups(**changes):
    """Three groups of different sizes and prompts, and a conversation on its own."""
    prompts = [PROMPT, PROMPT[:11], tuple(range(50, 70)), (9, 9)]
    members = [0, 1, 0, 2, 0, 1, 3, 2, 0]  # not in group order
    return [
        request(str(n), prompts[g], seed=n, max_new_tokens=4 + 3 * n % 11, **changes)
        for n, g in enumerate(members)
    ]


def test_equal_prompts_are_computed_once():
    own = engine()
    fed = record_feeds(own)
    completions = serve(own, *groups())
    assert [int(valid.sum()) for valid in fed[:2]] == [30 + 11 + 20, 2]
    assert len({c.ids[:4] for c in completions}) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_with_shared_prompts_equal_one_full_forward(kind):
    many = groups()
    for one, completion in zip(many, serve(engine(kind), *many)):
        expected = full_forward_logprobs(kind, one.prompt_ids, completion.ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_sharing_changes_no_token():
    many = groups()
    alone = [serve(engine(), one)[0].ids for one in many]
    assert [c.ids for c in serve(engine(), *many)] == alone
    assert [c.ids for c in serve(engine(max_rows=3), *many)] == alone
    eager = model()
    eager.set_attn_implementation("eager")
    assert [c.ids for c in serve(TorchEngine(eager, codec(), max_rows=9), *many)] == alone


def test_a_row_of_shared_prompts_serves_the_next_group_when_its_own_is_gone():
    own = engine()

    async def run():
        first, second = groups()[:5:2], [request(f"b{n}", PROMPT[5:], seed=n) for n in range(3)]
        await asyncio.gather(*(own.generate(r) for r in first))
        for r in first[:2]:
            own.release(r.session)
        staying = await asyncio.gather(*(own.generate(r) for r in second))
        assert set(own._decoder.lanes.prompt_row[own._decoder.lanes.shared > 0]) == {0, 1}
        own.release(first[2].session)
        last = await asyncio.gather(*(own.generate(request(f"c{n}", PROMPT[:7], seed=n)) for n in range(2)))
        assert set(own._decoder.lanes.prompt_row[own._decoder.lanes.shared > 0]) == {0, 1}
        return staying + last

    expected = [
        serve(engine(), request("x", p, seed=n))[0].ids
        for p, count in ((PROMPT[5:], 3), (PROMPT[:7], 2))
        for n in range(count)
    ]
    assert [c.ids for c in asyncio.run(run())] == expected


def test_a_conversation_that_starts_over_leaves_its_shared_prompt():
    own = engine()

    async def run():
        await asyncio.gather(own.generate(request("a", PROMPT)), own.generate(request("b", PROMPT)))
        shorter = await own.generate(request("a", PROMPT[:5]))
        assert own._decoder.lanes.shared[own._sessions["a"].row] == 0
        return shorter

    assert asyncio.run(run()).ids == serve(engine(), request("a", PROMPT[:5]))[0].ids


def test_a_broken_shared_prompt_fails_its_group_and_leaves_no_trace():
    own = engine("qwen2-untied")
    expected = [c.ids for c in serve(own, *groups()[:2])]
    with torch.no_grad():
        own._decoder._model.get_input_embeddings().weight[400] = float("nan")
    bad = [request(f"bad{n}", (*PROMPT, 400), seed=n) for n in range(3)]

    async def run():
        return await asyncio.gather(*(own.generate(r) for r in (*bad, *groups()[:2])), return_exceptions=True)

    *errors, first, second = asyncio.run(run())
    assert all(isinstance(error, RolloutError) for error in errors) and [first.ids, second.ids] == expected
    assert all(
        torch.isfinite(t).all()
        for t in (*own._decoder._cache.rows.tensors, *own._decoder._cache.prompts.tensors)
    )


def test_the_model_still_runs_without_the_cache():
    made = model()
    before = made(torch.tensor([PROMPT])).logits
    TorchEngine(made, codec(), max_rows=2)
    torch.testing.assert_close(made(torch.tensor([PROMPT])).logits, before)


def test_a_model_that_drops_the_options_of_its_attention_fails_loudly():
    own = engine()
    for layer in own._decoder._model.model.layers:
        attend = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, row_cache=None, attend=attend, **o: attend(*a, **o)
    with pytest.raises(RuntimeError, match="size of tensor|expanded size|must match"):
        serve(own, *groups())


def test_bfloat16_weights_sample_under_their_own_distribution():
    made = model().bfloat16()
    (completion,) = serve(TorchEngine(made, codec(), max_rows=2), request(prompt=range(3, 30)))
    with torch.no_grad():
        logits = model().bfloat16()(torch.tensor([[*range(3, 30), *completion.ids]])).logits[0, 26:-1].float()
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=0.15)
