import asyncio

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_sd.errors import DataError, RolloutError
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.embedded.weights import load_model
from tests.rollout.fakes import byte_level_tokenizer, codec, engine, model, request, serve


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2-untied"])
def test_an_update_changes_what_is_sampled(kind):
    own, other = engine(kind), model(kind, seed=1)
    before = serve(own, request())[0]
    own.begin_update()
    own.load_bucket(list(other.named_parameters())[:3])
    own.load_bucket((name, value.double()) for name, value in list(other.named_parameters())[3:])
    own.finish_update(5)
    after = serve(own, request())[0]
    assert (before.policy_version, after.policy_version) == (0, 5) and before.ids != after.ids
    assert after.ids == serve(TorchEngine(model(kind, seed=1), codec(), max_rows=2), request())[0].ids


def test_an_update_clears_the_cache():
    own = engine()

    async def run():
        first = await own.generate(request())
        own.begin_update()
        own.load_bucket(model(seed=1).named_parameters())
        own.finish_update(1)
        return first, await own.generate(request(prompt=(5, 6, 7, *first.ids)))

    first, second = asyncio.run(run())
    fresh = TorchEngine(model(seed=1), codec(), max_rows=2)
    assert second.ids == serve(fresh, request(prompt=(5, 6, 7, *first.ids)))[0].ids


def test_a_tied_head_may_be_sent_under_either_name_but_not_with_two_values():
    own, other = engine(), model(seed=1)
    weights = dict(other.named_parameters())
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    own.begin_update()
    own.load_bucket(weights.items())
    with pytest.raises(RolloutError, match="different values"):
        own.load_bucket([("model.embed_tokens.weight", torch.zeros(448, 32))])
    own.finish_update(1)
    assert serve(own, request())[0].ids == serve(TorchEngine(other, codec(), max_rows=2), request())[0].ids


def test_updates_that_cannot_be_right_are_refused():
    own = engine()
    with pytest.raises(RolloutError, match="begin_update"):
        own.load_bucket([])
    own.begin_update()
    with pytest.raises(RolloutError, match="model.unknown"):
        own.load_bucket([("model.unknown", torch.zeros(1))])
    with pytest.raises(RolloutError, match=r"shape \(2,\)"):
        own.load_bucket([("model.norm.weight", torch.zeros(2))])
    with pytest.raises(RolloutError, match="lacks"):
        own.finish_update(1)
    with pytest.raises(RolloutError, match="finish_update"):
        serve(own, request())


def test_no_update_while_completions_are_in_flight():
    own = engine()

    async def run():
        task = asyncio.create_task(own.generate(request()))
        await asyncio.sleep(0)
        with pytest.raises(RolloutError, match="1 completions are in flight"):
            own.begin_update()
        await task
        own.begin_update()

    asyncio.run(run())


def test_model_of_a_directory(tmp_path):
    model().save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(loaded, Qwen2ForCausalLM)
    assert (
        serve(TorchEngine(loaded, codec(), max_rows=2), request())[0].ids == serve(engine(), request())[0].ids
    )
    with pytest.raises(DataError, match="absent"):
        load_model(str(tmp_path / "absent"), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["qwen2-tied", "qwen2-untied"])
def test_an_engine_at_rest_holds_no_weights_and_samples_on_after_an_update(kind):
    own, other = engine(kind), model(kind, seed=1)
    parameters = [*own._weights._parameters.values()]
    assert serve(own, request())[0].ids
    own.rest()
    own.rest()  # once more is nothing more
    assert {parameter.numel() for parameter in parameters} == {0}
    with pytest.raises(RolloutError, match="call finish_update first"):
        serve(own, request())
    own.begin_update()
    own.load_bucket(other.named_parameters())
    own.finish_update(5)
    found = serve(own, request())[0]
    assert found.ids == serve(TorchEngine(model(kind, seed=1), codec(), max_rows=2), request())[0].ids
    assert found.policy_version == 5


def test_no_rest_while_completions_are_in_flight():
    own = engine()

    async def run():
        task = asyncio.create_task(own.generate(request()))
        await asyncio.sleep(0)
        with pytest.raises(RolloutError, match="1 completions are in flight"):
            own.rest()
        return await task

    assert asyncio.run(run()).ids
