import numpy as np
import torch

from megatron_sd.rollout.embedded.stop_strings import StopTable, can_complete
from megatron_sd.rollout.sampling import rollout_seed, sample, splitmix64, uniform_noise
from tests.rollout.fakes import codec


def test_splitmix64_known_answers():
    """The first outputs of the reference generator from seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * golden) % 2**64 for n in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_uniform_and_a_function_of_seed_and_position():
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200))
    noise = uniform_noise(seeds.reshape(-1), positions.reshape(-1))
    assert noise.dtype == np.float32 and noise.min() >= 0 and noise.max() < 1
    assert (
        abs(noise.mean() - 0.5) < 0.01
        and abs(np.histogram(noise, 10, (0, 1))[0] / len(noise) - 0.1).max() < 0.01
    )
    assert uniform_noise(np.array([3]), np.array([199]))[0] == noise.reshape(200, 200)[199, 3]
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_sampling_follows_the_inverse_cdf():
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]])).repeat(6, 1)
    noise = np.array([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-24], dtype=np.float32)
    ids, logprobs = sample(logits, np.ones(6), noise)
    assert ids.tolist() == [1, 1, 2, 2, 4, 4]
    np.testing.assert_allclose(np.exp(logprobs), [0.25, 0.25, 0.5, 0.5, 0.25, 0.25], rtol=1e-6)


def test_temperature_and_greedy_rows_mix():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    ids, logprobs = sample(logits, np.array([0.0, 2.0, 0.5]), np.array([0.0, 0.0, 0.999], dtype=np.float32))
    assert ids.tolist() == [2, 0, 2]
    expected = [torch.log_softmax(logits[0] / t, 0)[i].item() for t, i in ((1, 2), (2, 0), (0.5, 2))]
    np.testing.assert_allclose(logprobs, expected, atol=1e-6)


def test_seeds_are_pure_and_distinct():
    def seed(run=0, step=0, question="q", index=0):
        return rollout_seed(run, step=step, question_id=question, index=index)

    assert seed() == seed() and 0 <= seed() < 2**63
    assert (
        len({seed(), seed(run=1), seed(step=1), seed(question="r"), seed(index=1), seed(step=1, index=1)})
        == 6
    )


def test_tokens_that_can_complete_a_stop_string():
    stop = b"</search>"
    assert all(can_complete(stop[cut:] + tail, stop) for cut in range(9) for tail in (b"", b"x"))
    assert can_complete(b"q</search>\n", stop)
    assert not any(can_complete(token, stop) for token in (b"", b"x>", b"</search", b"search", b"<search>"))


def test_stop_strings_that_straddle_tokens():
    text = b"xx</search>"
    table = StopTable(codec(), 448)
    number = table.number(("</search>", "</answer>"))
    assert table.number(("</search>", "</answer>")) == number
    vocabulary = {raw: n for n, raw in enumerate(codec().token_bytes)}
    ids = [vocabulary[bytes([b])] for b in text]
    assert [table.completed(number, ids[: n + 1]) for n in range(len(ids))] == [False] * 10 + [True]
    assert not table.completed(number, [*ids, vocabulary[b">"]])  # completed by an earlier token
    assert table.lookup[number, vocabulary[b">"]] and not table.lookup[number, vocabulary[b"h"]]
    for token, raw in enumerate(codec().token_bytes):
        assert table.lookup[number, token] == (
            can_complete(raw, b"</search>") or can_complete(raw, b"</answer>")
        )
