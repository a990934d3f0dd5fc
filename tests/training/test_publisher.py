import pytest
import torch

from megatron_sd.algorithm.distill_loss import TermWeights
from megatron_sd.algorithm.packing.batches import pack
from megatron_sd.config import LoraConfig, RolloutConfig
from megatron_sd.config.checks import engine_reads_policy
from megatron_sd.distributed.world import join_world
from megatron_sd.errors import RolloutError
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.embedded.weights import load_model
from megatron_sd.training import publisher
from megatron_sd.training.parallel.local_shards import full_numel
from megatron_sd.training.publisher import GatherPublisher, InPlacePublisher, split_buckets
from tests.rollout.fakes import codec, request, serve
from tests.training.fakes import VOCABULARY, make_config, make_policy, make_samples, write_model


class Receiver:
    """Copies what it is given, as an engine does."""

    def __init__(self):
        self.events, self.weights = [], {}

    def begin_update(self):
        self.events.append("begin")

    def load_bucket(self, weights):
        weights = list(weights)
        self.events.append(sum(tensor.numel() * tensor.element_size() for _, tensor in weights))
        assert not self.weights.keys() & {name for name, _ in weights}
        self.weights |= {name: tensor.clone() for name, tensor in weights}

    def finish_update(self, policy_version):
        self.events.append(f"version {policy_version}")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [1, 3])
def test_every_weight_arrives_once_under_its_hugging_face_name(tmp_path, monkeypatch, tied, stage):
    monkeypatch.setattr(publisher, "BUCKET_BYTES", 13_000)
    path = write_model(tmp_path / "model", tied=tied)
    policy = make_policy(make_config(path, update={"zero_stage": stage}), join_world())
    receiver = Receiver()
    GatherPublisher().publish(policy, receiver, 9)
    from transformers import AutoModelForCausalLM

    expected = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    assert receiver.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in receiver.weights.items())
    assert receiver.events[0] == "begin" and receiver.events[-1] == "version 9"
    sizes = receiver.events[1:-1]
    assert len(sizes) > 3 and all(size <= 13_000 for size in sizes)


def test_a_parameter_larger_than_a_bucket_travels_alone():
    parameters = [(str(n), torch.nn.Parameter(torch.zeros(n))) for n in (3, 100, 2, 2)]
    assert [[name for name, _ in bucket] for bucket in split_buckets(parameters, 40)] == [
        ["3"],
        ["100"],
        ["2", "2"],
    ]
    assert full_numel(parameters[1][1]) == 100


def take_step(policy) -> None:
    (batch,) = pack(make_samples(4), max_tokens=10_000, world_size=1, aggregation="token")
    policy.accumulate(
        batch.microbatches[0],
        batch.totals,
        TermWeights(policy=1.0, distill_spread=0.0, distill_no_spread=0.0),
    )
    policy.step()


@pytest.mark.parametrize("rank", [0, 2])
def test_an_engine_beside_the_only_rank_reads_the_policys_own_weights(tmp_path, rank):
    """After every step, too; what has an adapter is a merged copy. The engine has then what a gathering
    publish would bring."""
    path = write_model(tmp_path / "model")
    lora = LoraConfig(rank=rank, targets=("q_proj", "up_proj"))
    config = make_config(path, model={"lora": lora}, optimizer={"learning_rate": 1e-2})
    world = join_world()
    assert engine_reads_policy(config, world.size)
    weights = load_model(str(path), dtype=torch.float32, device=world.device, on_demand=True)
    engine = TorchEngine(weights, codec(), max_rows=2)
    with pytest.raises(RolloutError, match="during a weight update; call finish_update first"):
        serve(engine, request())
    policy = make_policy(config, world)
    before = None
    for version in (0, 1):
        InPlacePublisher().publish(policy, engine, version)
        receiver = Receiver()
        GatherPublisher().publish(policy, receiver, version)
        for name, parameter in policy.named_parameters():
            own = weights.get_parameter(name)
            assert torch.equal(own, receiver.weights[name]), name
            is_adapted = rank > 0 and name.endswith(("q_proj.weight", "up_proj.weight"))
            assert (own.data_ptr() == parameter.ds_tensor.data_ptr()) == (not is_adapted), name
        (completion,) = serve(engine, request(prompt=(5, 6, VOCABULARY - 1), max_new_tokens=5))
        assert completion.policy_version == version
        assert completion.logprobs != before
        before = completion.logprobs
        take_step(policy)


@pytest.mark.parametrize(
    "parts",
    [
        {"update": {"zero_stage": 1}},
        {"rollout": RolloutConfig(max_lag=1)},
        {"update": {"offload_parameters": "cpu"}},
    ],
)
def test_weights_that_move_or_change_while_rollouts_are_sampled_are_copied(tmp_path, parts):
    assert not engine_reads_policy(make_config(write_model(tmp_path / "model"), **parts), 1)
