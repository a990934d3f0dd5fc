"""Rollouts that survive a crash."""

from megatron_sd.records import StopReason
from megatron_sd.rollout.bank import RolloutBank
from tests.builders import rollout
from tests.rollout.test_rollouter import ANSWER, SEARCH, run, scripted


def bank(directory, *, rank=0, identity="run", only_whole=False):
    return RolloutBank(directory, rank=rank, identity=identity, only_whole=only_whole)


def fill(directory, rollouts, step=3, version=3, **options):
    banked = bank(directory, **options).open(step, version)
    for own in rollouts:
        banked.keep(own)
    banked.close()


def found(directory, step=3, version=3, **options):
    banked = bank(directory, **options).open(step, version)
    return [own for number in range(2) for index in range(3) if (own := banked.find(f"q{number}", index))]


ROLLOUTS = [
    rollout(0, ["a", "b"]),
    rollout(1, ["c"], stop_reason=StopReason.TURN_LIMIT),
    rollout(0, answer="é", number=1),
]


def test_what_was_kept_is_found_equal_on_any_rank(tmp_path):
    fill(tmp_path, ROLLOUTS[:1])
    fill(tmp_path, ROLLOUTS[1:], rank=1)
    assert found(tmp_path, rank=2) == ROLLOUTS
    (real,) = run(scripted([SEARCH.format("Lyon"), ANSWER])[0])
    fill(tmp_path / "real", [real])
    assert found(tmp_path / "real") == [real], "with hits, spans and log-probabilities"


def test_another_step_version_or_run_finds_nothing(tmp_path):
    fill(tmp_path, ROLLOUTS)
    assert found(tmp_path, version=4) == found(tmp_path, identity="other") == []
    assert found(tmp_path) == ROLLOUTS
    assert found(tmp_path, step=4) == [] and list(tmp_path.iterdir()) == [], "and removes the other step's"


def test_a_torn_tail_and_a_changed_line_end_a_file(tmp_path):
    fill(tmp_path, ROLLOUTS)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert found(tmp_path) == ROLLOUTS[:2]
    path.write_bytes(content.replace(b'"turn_limit"', b'"turn_limjt"'))
    assert found(tmp_path) == ROLLOUTS[:1]
    path.write_bytes(b"")
    assert found(tmp_path) == []


def test_banked_rollouts_are_not_sampled_again(tmp_path):
    scripts = [[SEARCH.format("Lyon"), ANSWER], [ANSWER], [SEARCH.format("Paris"), ANSWER]]
    expected = run(scripted(*scripts)[0])
    fill(tmp_path, expected[:2])
    rollouter, engine, _ = scripted(*scripts)
    banked = bank(tmp_path).open(3, 3)
    assert run(rollouter, bank=banked) == expected
    assert {request.session for request in engine.requests} == {"step 3, question 0 (q0), rollout 2"}
    banked.close()
    rollouter, engine, _ = scripted(*scripts)
    assert run(rollouter, bank=bank(tmp_path).open(3, 3)) == expected and engine.requests == [], (
        "the third was kept, too"
    )


def test_only_whole_takes_all_or_nothing(tmp_path):
    scripts = [[ANSWER], [ANSWER]]
    expected = run(scripted(*scripts)[0])
    fill(tmp_path, expected[:1])
    rollouter, engine, _ = scripted(*scripts)
    banked = bank(tmp_path, only_whole=True).open(3, 3)
    assert run(rollouter, bank=banked) == expected and len(engine.requests) == 2
    banked.close()
    rollouter, engine, _ = scripted(*scripts)
    assert (
        run(rollouter, bank=bank(tmp_path, only_whole=True).open(3, 3)) == expected and engine.requests == []
    )


def test_failed_rollouts_are_not_kept(tmp_path):
    rollouter, _, _ = scripted([ANSWER], [""], max_failed_share=1.0)
    banked = bank(tmp_path).open(3, 3)
    rollouts = run(rollouter, bank=banked)
    banked.close()
    assert found(tmp_path) == [own for own in rollouts if not own.stop_reason.is_infrastructure]
    assert len(found(tmp_path)) == 1
