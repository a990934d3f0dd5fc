import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config

from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.engine import Completion
from tests.rollout.fakes import (
    KINDS,
    SHAPE,
    codec,
    engine,
    full_forward_logprobs,
    model,
    record_feeds,
    request,
    serve,
)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(random.integers(3, 400, size=random.integers(1, 40)).tolist()) for _ in range(count)]


# ---- what is sampled ----


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_one_full_forward(kind):
    """Ragged prompts in one batch, decoded through the cache, against a plain forward pass over the
    finished sequence."""
    many = prompts(6)
    completions = serve(engine(kind), *(request(str(n), p, seed=n) for n, p in enumerate(many)))
    for prompt, completion in zip(many, completions):
        assert completion.finish == ("eos" if completion.ids[-1] == 0 else "length")
        assert len(completion.ids) == 12 or completion.finish == "eos"
        np.testing.assert_allclose(
            completion.logprobs, full_forward_logprobs(kind, prompt, completion.ids), atol=1e-4
        )


def test_logprobs_are_under_the_sampling_distribution():
    (completion,) = serve(engine(), request(temperature=0.7))
    expected = full_forward_logprobs("qwen2-tied", (5, 6, 7), completion.ids, temperature=0.7)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_greedy_takes_the_most_likely_token():
    (completion,) = serve(engine(), request(temperature=0.0))
    with torch.no_grad():
        logits = model()(torch.tensor([[5, 6, 7, *completion.ids]])).logits[0, 2:-1]
    assert list(completion.ids) == logits.argmax(-1).tolist()
    np.testing.assert_allclose(
        completion.logprobs, full_forward_logprobs("qwen2-tied", (5, 6, 7), completion.ids), atol=1e-4
    )


def test_tokens_do_not_depend_on_the_batch():
    """The same rollout alone, among others, and among others in another order."""
    many = [request(str(n), p, seed=n) for n, p in enumerate(prompts(9))]
    together = {r.session: c.ids for r, c in zip(many, serve(engine(), *many))}
    backwards = {r.session: c.ids for r, c in zip(many[::-1], serve(engine(), *many[::-1]))}
    crowded = {r.session: c.ids for r, c in zip(many, serve(engine(max_rows=2), *many))}
    alone = {r.session: serve(engine(), r)[0].ids for r in many}
    assert together == backwards == crowded == alone


def test_seed_and_position_decide_the_noise():
    same, other = request("a", seed=1), request("b", seed=2)
    first, second, third = serve(engine(), same, other, replace(same, session="c"))
    assert first.ids == third.ids != second.ids


def test_a_run_repeated_is_bit_identical():
    many = [request(str(n), p, seed=n) for n, p in enumerate(prompts(5))]
    assert serve(engine(), *many) == serve(engine(), *many)


# ---- turns ----


async def converse(own: TorchEngine, name: str, pauses: Sequence[int], seed: int = 3) -> list[Completion]:
    """A conversation of several turns; between two of them an observation of 1 to 20 tokens, and some idle
    loop passes."""
    ids, turns = (9, 8, 7, *range(20, 20 + seed)), []
    for turn, pause in enumerate(pauses):
        turns.append(await own.generate(request(name, ids, seed=seed, max_new_tokens=5 + (seed + turn) % 9)))
        ids = (*ids, *turns[-1].ids, *range(100 + turn, 101 + turn + (7 * seed) % 20))
        for _ in range(pause):
            await asyncio.sleep(0)
    own.release(name)
    return turns


@pytest.mark.parametrize(("max_rows", "longest_pause"), [(32, 12), (5, 12), (3, 60)])
def test_cache_reuse_equals_prefilling_again(max_rows, longest_pause):
    """Conversations with different pauses: rows park, return, move and are evicted. Against a full prefill
    every turn."""

    async def run(own):
        pauses = np.random.default_rng(0).integers(0, longest_pause, size=(14, 4)).tolist()
        return await asyncio.gather(*(converse(own, str(n), p, seed=n) for n, p in enumerate(pauses)))

    def ids(own):
        return [[turn.ids for turn in turns] for turns in asyncio.run(run(own))]

    expected = ids(engine(reuse_cache=False))
    assert ids(engine(max_rows=max_rows)) == expected


def test_only_the_new_tokens_of_a_turn_are_fed():
    own = engine()
    fed = record_feeds(own)

    async def run():
        first = await own.generate(request(prompt=range(3, 40)))
        await own.generate(request(prompt=(*range(3, 40), *first.ids, 50, 51, 52)))
        # no extension: all of it again
        last = await own.generate(request(prompt=(*range(3, 39), 200), max_new_tokens=1))
        # all cached: the last token again
        again = await own.generate(request(prompt=(*range(3, 39), 200), max_new_tokens=1))
        assert again.ids == last.ids

    asyncio.run(run())
    assert [int(valid.sum()) for valid in fed] == [37] + [1] * 11 + [4] + [1] * 11 + [37, 1]


def test_requests_join_while_others_decode():
    own = engine()

    async def run():
        early = asyncio.create_task(own.generate(request("early", max_new_tokens=40)))
        while own._decoder.lanes.count[0] < 10:
            await asyncio.sleep(0)
        late = await own.generate(request("late", (9, 9), max_new_tokens=5))
        assert not early.done()
        return await early, late

    early, late = asyncio.run(run())
    assert early.ids == serve(engine(), request("early", max_new_tokens=40))[0].ids
    assert late.ids == serve(engine(), request("late", (9, 9), max_new_tokens=5))[0].ids


def test_idle_rows_are_compacted():
    own = engine()

    async def run():
        await asyncio.gather(
            *(own.generate(request(str(n), max_new_tokens=2 + 20 * (n > 7), seed=n)) for n in range(10))
        )
        assert sorted(own._sessions[name].row for name in ("8", "9")) == [0, 1]

    asyncio.run(run())


def test_completions_of_one_token_do_not_starve_those_without_a_row():
    many = [request(str(n), max_new_tokens=1, seed=n) for n in range(5)]

    async def run():
        own = engine(max_rows=1)
        return await asyncio.wait_for(asyncio.gather(*(own.generate(r) for r in many)), timeout=10)

    assert [len(c.ids) for c in asyncio.run(run())] == [1] * 5


def test_a_session_that_never_returns_does_not_block_the_others():
    async def run(own):
        await own.generate(request("parked"))
        return await asyncio.wait_for(own.generate(request("next")), timeout=10)

    assert asyncio.run(run(engine(max_rows=1))).ids == serve(engine(), request())[0].ids


# ---- endings ----


def test_a_stop_string_ends_the_completion_with_its_token_whole():
    (free,) = serve(engine(), request(max_new_tokens=40))
    text = codec().bytes_of(free.ids)
    offsets = codec().offsets(free.ids)
    middle = (offsets[11] + offsets[12] + 1) // 2  # ends inside token 11 or at its end
    stop = text[offsets[9] : middle].decode("latin-1")
    own = engine()
    own._stops._stops.append([text[offsets[9] : middle]])  # raw bytes need not be UTF-8
    own._stops._numbers[(stop,)] = 0
    own._stops.lookup = np.ones((1, 448), dtype=bool)
    (stopped,) = serve(own, request(max_new_tokens=40, stop=(stop,)))
    first = text.find(text[offsets[9] : middle]) + middle - offsets[9]
    assert (
        stopped.finish == "stop"
        and stopped.ids == free.ids[: next(n for n in range(41) if offsets[n] >= first)]
    )


def test_end_of_sequence():
    (free,) = serve(engine(), request(max_new_tokens=40))
    made = model()
    made.generation_config.eos_token_id = [free.ids[6]]
    (ended,) = serve(TorchEngine(made, codec(), max_rows=4), request(max_new_tokens=40))
    assert ended.finish == "eos" and ended.ids == free.ids[: free.ids.index(free.ids[6]) + 1]


def test_limits_of_a_request():
    own = engine()
    (last,) = serve(own, request(prompt=[5] * 505, max_new_tokens=60))
    assert len(last.ids) == 7 and last.finish == "length"  # 512 positions
    for bad, words in (
        (request(prompt=[]), "0 prompt tokens"),
        (request(prompt=[5] * 512), "512 positions"),
        (request(max_new_tokens=0), "at least 1"),
        (request(prompt=[5, 448]), "vocabulary"),
    ):
        with pytest.raises(RolloutError, match=words):
            serve(own, bad)
    with pytest.raises(RolloutError, match="two completions at once"):
        serve(own, request("same"), request("same"))


def test_models_with_other_layers_are_refused_and_windows_bound_the_length():
    config = Qwen2Config(**SHAPE, num_key_value_heads=4, layer_types=["full_attention", "linear_attention"])
    made = model()
    made.config = config
    with pytest.raises(ConfigError, match="linear_attention"):
        TorchEngine(made, codec(), max_rows=2)
    window = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=64))
    with pytest.raises(RolloutError, match="64 positions"):
        serve(TorchEngine(window, codec(), max_rows=2), request(prompt=[5] * 64))


def test_a_longrope_model_is_held_to_the_length_within_which_keys_stay_as_they_are():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + n for n in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 40, **factors}
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    known = {
        "vocab_size": 448,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "original_max_position_embeddings": 40,
    }
    torch.manual_seed(0)
    made = Phi3ForCausalLM(Phi3Config(**small, **known, rope_parameters=rope)).eval()
    prompt = tuple(range(5, 25))
    (done,) = serve(TorchEngine(made, codec(), max_rows=2), request(prompt=prompt, max_new_tokens=30))
    assert 0 < len(done.ids) <= 20
    with torch.no_grad():
        logits = made(torch.tensor([[*prompt, *done.ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = logits[range(len(done.ids)), list(done.ids)]
    np.testing.assert_allclose(done.logprobs, expected.numpy(), atol=1e-4)
    with pytest.raises(RolloutError, match="40 positions"):
        serve(TorchEngine(made, codec(), max_rows=2), request(prompt=range(5, 45)))


def test_non_finite_logits_fail_their_session_and_leave_no_trace():
    own = engine("qwen2-untied")
    before = serve(own, request("good"))[0].ids
    weight = own._decoder._model.get_input_embeddings().weight
    with torch.no_grad():
        weight[400] = float("nan")

    async def run():
        return await asyncio.gather(
            own.generate(request("bad", (400, 5))), own.generate(request("good")), return_exceptions=True
        )

    error, good = asyncio.run(run())
    assert isinstance(error, RolloutError) and "'bad'" in str(error) and "not finite" in str(error)
    assert good.ids == before
    assert all(torch.isfinite(t).all() for t in own._decoder._cache.rows.tensors)


def test_an_error_in_the_model_reaches_every_caller_and_the_engine_recovers():
    own = engine()
    own._decoder.decode = lambda: (_ for _ in ()).throw(MemoryError("no room"))

    async def run():
        return await asyncio.gather(*(own.generate(request(name)) for name in "ab"), return_exceptions=True)

    assert [str(error) for error in asyncio.run(run())] == ["no room", "no room"]
    del own._decoder.decode
    assert serve(own, request())[0].ids == serve(engine(), request())[0].ids


def test_a_cancelled_caller_frees_its_row():
    own = engine(max_rows=1)

    async def run():
        task = asyncio.create_task(own.generate(request("gone", max_new_tokens=400)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        own.release("gone")
        return await own.generate(request("next"))

    assert asyncio.run(run()).ids == serve(engine(), request())[0].ids
