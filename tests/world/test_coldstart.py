import dataclasses
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.world.coldstart import (
    ColdstartConfig,
    CurriculumStage,
    batches,
    build_tokenizer,
    encode,
    rate_factor,
    run_coldstart,
    stage_shares,
    weighted_loss,
)
from data_prep.world.demonstrations import DemonstratorConfig, make_demonstration
from data_prep.world.reading_probe import ReadingProbe
from data_prep.world.small_qwen import SmallQwenShape, build_model
from data_prep.world.world import RELATION_OF
from megatron_sd.errors import ConfigError, DataError
from megatron_sd.search.presets import PRESETS

PROTOCOL = PRESETS["compact"]
DEMONSTRATOR = DemonstratorConfig()
TINY = ColdstartConfig(
    num_steps=3,
    batch_tokens=512,
    warmup_steps=1,
    log_every=1,
    probe_every=3,
    num_probe_episodes=8,
    model=SmallQwenShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=1),
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TINY)


def demonstrations(kind, count, seed=0):
    rng = random.Random(seed)
    return [make_demonstration(kind, PROTOCOL, DEMONSTRATOR, rng) for _ in range(count)]


def tiny_model(tokenizer):
    return build_model(TINY.model, vocab_size=len(tokenizer), seed=0)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- tokenizer


def test_segments_are_tokenised_on_their_own_and_weighted_by_writer(tokenizer):
    demonstration = demonstrations("natural", 1, seed=5)[0]
    (example,) = encode([demonstration], tokenizer, TINY)
    parts = [(writer, ids_of(tokenizer, text)) for writer, text in demonstration.segments]
    assert example.ids.tolist() == [i for _, ids in parts for i in ids]
    num_block = len(ids_of(tokenizer, demonstration.block))
    assert ids_of(tokenizer, demonstration.segments[0][1])[:num_block] == ids_of(
        tokenizer, demonstration.block
    )
    expected = {"prompt": 0.0, "completion": 1.0, "observation": TINY.observation_weight}
    weights = [expected[writer] for writer, ids in parts for _ in ids]
    weights[:num_block] = [TINY.block_weight] * num_block
    weights[0] = 0.0
    assert example.weights.tolist() == pytest.approx(weights)


def test_batches_keep_to_the_token_budget_and_weigh_no_padding(tokenizer):
    stream = batches(
        lambda step: {"none": 0.5, "natural": 0.5}, tokenizer, dataclasses.replace(TINY, batch_tokens=2048)
    )
    for _, (ids, weights) in zip(range(20), stream):
        assert ids.shape == weights.shape
        assert ids.numel() <= 2048
        assert weights[ids == tokenizer.pad_token_id].abs().sum() == 0


def test_the_schedules():
    config = dataclasses.replace(TINY, num_steps=100, warmup_steps=10, decay_share=0.4)
    assert rate_factor(0, config) == pytest.approx(0.1)
    assert rate_factor(30, config) == 1.0
    assert rate_factor(80, config) == pytest.approx(0.5)
    stages = (
        CurriculumStage(until=0.5, shares={"pair": 1.0}),
        CurriculumStage(until=1.0, shares={"none": 1.0}),
    )
    config = dataclasses.replace(config, curriculum=stages)
    assert stage_shares(49, config) == {"pair": 1.0}
    assert stage_shares(50, config) == stage_shares(1000, config) == {"none": 1.0}


def test_the_cold_starts_attention_is_transformers_attention(tokenizer):
    model = tiny_model(tokenizer)
    ids = torch.randint(0, len(tokenizer), (2, 17), generator=torch.Generator().manual_seed(0))
    own = model(input_ids=ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=ids).logits, own, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_weighted_mean_over_weighted_tokens(tokenizer):
    model = tiny_model(tokenizer)
    ids = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(1))
    weights = torch.zeros(2, 9)
    weights[0, 3], weights[1, 8] = 1.0, 0.5
    logprobs = torch.log_softmax(model(input_ids=ids).logits, -1)
    expected = -(logprobs[0, 2, ids[0, 3]] + 0.5 * logprobs[1, 7, ids[1, 8]]) / 1.5
    assert weighted_loss(model, ids, weights).item() == pytest.approx(expected.item(), abs=0.05)  # bfloat16


@pytest.mark.slow
def test_three_steps_write_a_model_that_loads_and_repeats(tmp_path):
    config = dataclasses.replace(TINY, output=str(tmp_path / "first"))
    directory = run_coldstart(config)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config.model_type == "qwen2"
    assert model.config.tie_word_embeddings
    record = json.loads((directory / "coldstart.json").read_text(encoding="utf-8"))
    assert record["step"] == 3
    assert record["config"]["seed"] == 0
    assert record["command"].startswith("sd-search coldstart")
    assert set(record["probe"]) == {"linked", "shuffled", "wrong_question", "none"}
    again = AutoModelForCausalLM.from_pretrained(
        run_coldstart(dataclasses.replace(config, output=str(tmp_path / "again")))
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.slow
def test_a_cold_start_goes_on_from_an_earlier_one(tmp_path):
    first = run_coldstart(dataclasses.replace(TINY, output=str(tmp_path / "first")))
    config = dataclasses.replace(
        TINY, start_from=str(first), learning_rate=0.0, output=str(tmp_path / "second")
    )
    second = run_coldstart(config)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (first, second))
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing is learnt at rate zero"
    with pytest.raises(DataError, match="holds no coldstart.json"):
        run_coldstart(dataclasses.replace(config, start_from=str(tmp_path / "nowhere")))


def test_training_lowers_the_loss(tokenizer):
    model = build_model(
        SmallQwenShape(hidden_size=64, num_layers=1, num_heads=2), vocab_size=len(tokenizer), seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream = batches(lambda step: {"none": 1.0}, tokenizer, dataclasses.replace(TINY, batch_tokens=1024))
    losses = []
    for _, batch in zip(range(25), stream):
        loss = weighted_loss(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_a_head_size_that_no_engine_serves_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="head size of 24"):
        build_model(SmallQwenShape(hidden_size=96, num_heads=4), vocab_size=len(tokenizer), seed=0)


def test_the_probe_looks_at_the_keyword_and_counts_it_under_each_block(tokenizer):
    probe = ReadingProbe(tokenizer, PROTOCOL, DEMONSTRATOR, num_episodes=6, seed=0)
    model = tiny_model(tokenizer)
    for name, probed in probe._sets.items():
        for item in probed:
            for position, target in zip(item.positions, item.targets, strict=True):
                shown = tokenizer.decode([item.ids[position]]).strip()
                wanted = tokenizer.decode([target]).strip()
                assert RELATION_OF[shown] == RELATION_OF[wanted], name
    readings = probe.measure(model)
    assert all(0 < p < 0.05 for p in readings.values()), "an untrained model knows nothing"
