"""The engine against the trainer: log-probabilities, tokens, stop strings, seeds, caches, versions."""

import asyncio

import pytest
import torch

from megatron_sd.errors import ConfigError, RolloutError
from megatron_sd.rollout.vllm.server_client import GENERATE
from tests.vllm.servers import BLOCK, CLOSE, MAX_LENGTH, ask, gap, make_engine, prompt, serve

LENGTHS = (3, BLOCK - 1, BLOCK, 2 * BLOCK + 5, 5 * BLOCK + 1)


def some_requests(temperature: float = 1.0):
    return [ask(f"r{n}", prompt(n), temperature=temperature, seed=n) for n in LENGTHS]


def test_logprobs_equal_the_trainers_after_every_publish(served):
    """Also with prompts that the cache holds from before the publish, and fused and tied parameters."""
    requests = some_requests()
    for seed in (1, 2):
        new = served.perturbed(seed)
        stale = serve(served.engine, *requests)
        assert gap(served.trainer(), requests, stale) < CLOSE
        served.publish(new)
        fresh = serve(served.engine, *requests)
        assert gap(served.trainer(), requests, fresh) < CLOSE
        assert gap(served.trainer(), requests, stale) > 1, "the check would not notice old weights"
        assert {c.policy_version for c in fresh} == {served.version}


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.7])
def test_logprobs_are_those_of_the_sampling_distribution(one_served, temperature):
    requests = some_requests(temperature)
    completions = serve(one_served.engine, *requests)
    assert gap(one_served.trainer(), requests, completions) < CLOSE


def test_greedy_takes_the_most_likely_token_and_sampling_does_not_apply_the_models_own_settings(one_served):
    """The policy's generation_config.json says top_k 1."""
    request = ask(prompt_ids=prompt(40), temperature=0.0)
    (greedy,) = serve(one_served.engine, request)
    with torch.no_grad():
        logits = one_served.trainer()(torch.tensor([[*request.prompt_ids, *greedy.ids]])).logits[0, 39:-1]
    assert greedy.ids == tuple(logits.argmax(-1).tolist())
    sampled = serve(
        one_served.engine, *(ask(f"s{n}", request.prompt_ids, seed=n, temperature=2.0) for n in range(30))
    )
    assert len({c.ids[0] for c in sampled}) > 5


def test_seeds(one_served):
    requests = [ask(f"s{n}", prompt(40), seed=n // 2) for n in range(6)]
    first, again = serve(one_served.engine, *requests), serve(one_served.engine, *requests[::-1])[::-1]
    assert [c.ids for c in first] == [c.ids for c in again]
    assert first[0].ids == first[1].ids != first[2].ids


def test_more_prompt_tokens_than_a_forward_pass_takes(one_served):
    """Prefilled in several passes; vLLM on a CPU dies of a seeded prompt that is cut in two."""
    requests = [ask(f"s{n}", prompt(300, n), seed=n, max_new_tokens=4) for n in range(20)]
    completions = serve(one_served.engine, *requests)
    assert gap(one_served.trainer(), requests, completions) < CLOSE


def test_the_noise_of_a_turn_is_not_that_of_the_turn_before(one_served):
    """Where the model repeats itself, equal noise would repeat the completion."""
    opening = prompt(20)
    (first,) = serve(one_served.engine, ask(prompt_ids=opening))
    (second,) = serve(one_served.engine, ask(prompt_ids=opening + first.ids))
    assert first.ids != second.ids


def test_stop_strings_end_with_the_token_that_completes_them(one_served):
    """Every token holds an `e` or not: the first that does is the last of the completion, whole."""
    codec = one_served.codec
    for seed in range(8):
        request = ask("free", prompt(9), seed=seed, max_new_tokens=60)
        free, stopped = serve(one_served.engine, request, ask("stop", prompt(9), seed=seed, stop=("e", "zz")))
        pieces = codec.pieces(free.ids)
        first = next((n for n, piece in enumerate(pieces) if b"e" in piece), None)
        if first is None or first >= 16:
            assert stopped.finish == "length" and len(stopped.ids) == 16
        else:
            assert stopped.finish == "stop"
            assert stopped.ids == free.ids[: first + 1]
            assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=1e-4)


def test_end_of_sequence_ids_of_tokenizer_and_model_end_a_completion_and_are_kept(one_served):
    """Token 0 is the tokenizer's, 1 the model's."""
    requests = [ask(f"s{n}", prompt(9), seed=n, temperature=2.0, max_new_tokens=300) for n in range(40)]
    completions = serve(one_served.engine, *requests)
    ended = [c for c in completions if c.finish == "eos"]
    assert {c.ids[-1] for c in ended} == {0, 1}
    assert all(set(c.ids[:-1]).isdisjoint({0, 1}) for c in completions)
    assert {len(c.ids) for c in completions if c.finish == "length"} <= {300}


def test_keys_and_values_are_kept_between_turns_and_across_the_group_until_the_next_publish(one_served):
    def cached(request) -> int:
        body = {"token_ids": request.prompt_ids, "sampling_params": {"max_tokens": 1}}
        replica = engine._replicas[0]
        usage = engine._thread.run(replica.post(GENERATE, body))["usage"]
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    engine = one_served.engine
    opening = prompt(3 * BLOCK, seed=7)
    assert cached(ask(prompt_ids=opening)) == 0
    (turn,) = serve(engine, ask(prompt_ids=opening, max_new_tokens=BLOCK))
    assert cached(ask(prompt_ids=opening + turn.ids + prompt(5))) == 3 * BLOCK
    one_served.publish(one_served.perturbed(5))
    assert cached(ask(prompt_ids=opening + turn.ids)) == 0


def test_abort(one_served):
    engine = one_served.engine

    async def run():
        task = asyncio.create_task(engine.generate(ask("gone", max_new_tokens=300)))
        await asyncio.sleep(0.1)
        with pytest.raises(RolloutError, match="two completions at once"):
            await engine.generate(ask("gone"))
        with pytest.raises(RolloutError, match="1 completions are in flight"):
            engine.begin_update()
        engine.release("gone")
        with pytest.raises(asyncio.CancelledError):
            await task
        return await engine.generate(ask("gone"))

    assert asyncio.run(run()).ids == serve(engine, ask())[0].ids


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            ask(prompt_ids=prompt(MAX_LENGTH)),
            f"sent {MAX_LENGTH} prompt tokens .*at most {MAX_LENGTH}.*max_rollout_tokens",
        ),
        (ask(prompt_ids=prompt(MAX_LENGTH - 4)), "asked for 16"),
        (ask(prompt_ids=(5, 448)), "ids from 5 to 448, expected ids below .* 448"),
        (ask(prompt_ids=()), "sent 0 prompt tokens"),
    ],
)
def test_requests_that_cannot_be_served(one_served, request_, message):
    with pytest.raises(RolloutError, match=message):
        serve(one_served.engine, request_)


def test_an_update_without_all_parameters_leaves_the_engine_closed_until_the_next_one(one_served):
    engine, weights = one_served.engine, one_served.perturbed(9)
    engine.begin_update()
    engine.load_bucket([item for item in weights.items() if "layers.1.mlp" not in item[0]])
    with pytest.raises(
        RolloutError, match=r"no vLLM server took the weights.*lacks 2 parameters.*layers\.1\.mlp"
    ):
        engine.finish_update(99)
    with pytest.raises(RolloutError, match="after a failed weight update"):
        serve(engine, ask())
    one_served.publish(weights)
    requests = some_requests()
    assert gap(one_served.trainer(), requests, serve(engine, *requests)) < CLOSE


def test_engine_and_trainer_must_be_the_same_model(one_served):
    url, directory = one_served.process.url, one_served.directory
    with pytest.raises(
        ConfigError, match=r"dtype 'float32' \(trainer: 'bfloat16'\), *tied True|tied True .*dtype 'float32'"
    ):
        make_engine([url], directory, dtype="bfloat16", tied=False)
    with pytest.raises(ConfigError, match=r"architecture 'Qwen2ForCausalLM' \(trainer: 'LlamaForCausalLM'\)"):
        make_engine([url], directory, architecture="LlamaForCausalLM")
