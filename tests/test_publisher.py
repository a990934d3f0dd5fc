import pytest
import torch

from megatron_sd.distributed.world import join_world
from megatron_sd.training import publisher
from megatron_sd.training.policy import load_policy
from megatron_sd.training.publisher import GatherPublisher, split_buckets
from megatron_sd.training.shards import full_numel
from tests.fakes_train import make_config, write_model


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
    policy = load_policy(make_config(path, update={"zero_stage": stage}), join_world())
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
    assert [[name for name, _ in bucket] for bucket in split_buckets(parameters, 40)] == [["3"], ["100"], ["2", "2"]]
    assert full_numel(parameters[1][1]) == 100
