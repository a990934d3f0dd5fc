"""Servers that stop answering, die, come back, or never start."""

import os
import signal

import pytest

from megatron_sd.errors import RolloutError
from megatron_sd.rollout.engine import Delivery
from tests.vllm.servers import (
    CLOSE,
    START_TIMEOUT_S,
    ask,
    gap,
    limits,
    make_engine,
    prompt,
    serve,
    server,
    write_policy,
)

TIMEOUT_S = 25.0


@pytest.fixture
def pair(one_served, tmp_path):
    """An engine over two servers of one policy, the first of which may be hurt: it is this engine's own
    process."""
    victim = server(one_served.directory, limits(), tmp_path / "victim.log")
    victim.wait_until_ready(START_TIMEOUT_S)
    urls = [victim.url, one_served.process.url]
    engine = make_engine(urls, one_served.directory, processes=[victim], timeout_s=TIMEOUT_S)
    yield engine, victim, one_served
    engine.close()
    one_served.publish(one_served.weights)


def publish(engine, weights, version: int) -> None:
    engine.begin_update()
    engine.load_bucket(weights.items())
    engine.finish_update(version)


def test_rollouts_go_on_elsewhere_when_a_server_stops_and_it_is_started_again(pair, caplog):
    engine, victim, served = pair
    requests = [ask(f"r{n}", prompt(40, n), seed=n) for n in range(4)]
    publish(engine, served.weights, 50)
    before = serve(engine, *requests)
    assert {replica.version for replica in engine._replicas} == {"50"}
    assert sorted(engine._homes._of_prompt.values()) == [0, 0, 1, 1]

    os.killpg(victim.pid, signal.SIGSTOP)  # it hangs
    during = serve(engine, *requests)
    assert [c.ids for c in during] == [c.ids for c in before], "seeds decide, not the server"
    assert f"left alone until the next publish: {victim.url} did not answer" in caplog.text

    new = served.perturbed(3)
    publish(engine, new, 51)
    assert f"starting the vLLM server at {victim.url} again" in caplog.text
    assert [replica.version for replica in engine._replicas] == ["51", "51"]
    assert [replica.failure for replica in engine._replicas] == [None, None]
    served.weights = new
    after = serve(engine, *requests)
    assert gap(served.trainer(), requests, after) < CLOSE
    assert {c.policy_version for c in after} == {51}

    victim.stop()
    engine._replicas[1].failure = "put aside"
    with pytest.raises(
        RolloutError, match=rf"no vLLM server is left for .*{victim.url} broke the connection.*put aside"
    ):
        serve(engine, requests[0])


def test_the_word_to_save_and_stop_does_not_end_a_server_or_its_workers(served):
    """SLURM gives SIGUSR1 to every process of a step, and the ranks want to finish what they sample."""
    os.killpg(served.process.pid, signal.SIGUSR1)
    (completion,) = serve(served.engine, ask(prompt_ids=prompt(20)))  # needs every worker
    assert served.process.is_running and completion.finish in ("eos", "length")


def test_a_sharded_update_that_fails_leaves_the_old_version_serving(one_served):
    engine = make_engine([one_served.process.url], one_served.directory, timeout_s=15.0)
    try:
        publish(engine, one_served.weights, 60)
        engine.begin_update()
        with pytest.raises(RolloutError, match="with 500"):
            nowhere = Delivery("127.0.0.1:1", number=1, policy_version=61)
            engine.start_receiving(nowhere).result()
        engine.cancel_update()
        requests = [ask(f"r{n}", prompt(40, n), seed=n) for n in range(3)]
        completions = serve(engine, *requests)
        assert {c.policy_version for c in completions} == {60}
        assert gap(one_served.trainer(), requests, completions) < CLOSE
    finally:
        engine.close()
        one_served.publish(one_served.weights)


def test_a_head_size_that_vllm_lacks_on_cpus_is_named_before_anything_is_loaded(tmp_path):
    policy = write_policy(tmp_path / "policy", "qwen2", tied=True, hidden_size=64)
    process = server(policy, limits(), tmp_path / "server.log")
    with pytest.raises(
        RolloutError,
        match=r"attention heads of 16, expected one of \[32, .* on a CPU; use rollout.engine torch",
    ):
        process.wait_until_ready(START_TIMEOUT_S)
