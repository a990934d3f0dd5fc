"""Rollouts that are carried from step to step."""

import asyncio
import signal
import threading
import time

import pytest
import torch

from megatron_sd.config import RolloutConfig
from megatron_sd.distributed.control import StopRequest
from megatron_sd.distributed.world import World
from megatron_sd.errors import RolloutError, StopRequested
from megatron_sd.observability.metrics import lag_metrics
from megatron_sd.observability.progress import SILENT
from megatron_sd.records import StopReason
from megatron_sd.rollout.bank import RolloutBank
from megatron_sd.rollout.carrying import CarriedOver
from megatron_sd.rollout.engine import Completion
from megatron_sd.rollout.pausable import PausableEngine
from megatron_sd.rollout.rollouter import Rollouter
from megatron_sd.rollout.sampling_order import InStep
from megatron_sd.search.questions import QuestionStream
from tests.builders import question
from tests.rollout.fakes import InlineRetriever, codec, environment, request

NUM_STEPS, BATCH = 4, 2


class Engine:
    """Searches for its question, and answers when it has seen passages. A token's log-probability names the version
    of the weights."""

    def __init__(self):
        self.policy_version = 0
        self.is_awake = False
        self.asked: list[tuple[str, int]] = []

    async def generate(self, request):
        await asyncio.sleep(0.001)
        assert self.is_awake, "sampled while the weights may change"
        text = codec().decode(request.prompt_ids)
        has_searched = text.count("</information>") > 0
        number = text.partition("Question ")[2].partition("?")[0]
        self.asked.append((request.session, int(has_searched)))
        ids = codec().encode(
            "<answer> gold </answer>" if has_searched else f"<search> about {number}. </search>"
        )
        logprobs = (-1.0 - self.policy_version,) * len(ids)
        return Completion(ids=ids, logprobs=logprobs, finish="stop", policy_version=self.policy_version)

    def wake(self):
        self.is_awake = True

    def sleep(self):
        self.is_awake = False

    def release(self, session):
        assert self.is_awake, "called while the weights may change"


class Retriever(InlineRetriever):
    """Answers to questions in `held` have to wait."""

    def __init__(self, *held: int, **options):
        super().__init__(**options)
        self.held = {f"about {number}." for number in held}

    async def search(self, queries, top_k):
        while self.held & set(queries):
            await asyncio.sleep(0.001)
        return await super().search(queries, top_k)


def order(
    retriever, *, engine=None, max_lag=3, bank=None, stop=None, num_steps=NUM_STEPS, batch=BATCH, **limits
):
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), stop=stop or StopRequest())
    questions = QuestionStream(
        questions=tuple(question(n) for n in range(2 * NUM_STEPS * BATCH)),
        batch_size=batch,
        seed=0,
        shuffle=False,
    )
    engine = PausableEngine(engine or Engine(), width=100)
    own = environment(group_size=2, **{"max_failed_share": 0.0, **limits})
    return CarriedOver(
        world=world,
        questions=questions,
        rollouter=Rollouter(engine, retriever, own, top_k=1, seed=0, world=world),
        engine=engine,
        bank=bank,
        num_steps=num_steps,
        config=RolloutConfig(max_lag=max_lag, questions_per_step=batch),
        work=SILENT,
    )


def numbers(groups):
    return [int(group.question.id[1:]) for group in groups]


def versions(group):
    return [[turn.policy_version for turn in rollout.turns] for rollout in group.rollouts]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def running():
    """Tasks that have not ended, but for this one."""
    return len(asyncio.all_tasks()) - 1


def after(seconds, action):
    threading.Timer(seconds, action).start()


def all_but(own, held):
    """Every group that is not held has ended, so that what a step takes is known beforehand."""
    return lambda: all(group.work.done() for place, group in own._groups.items() if place not in held)


def test_a_slow_search_is_carried_on_until_it_may_not_wait_any_longer():
    retriever, engine = Retriever(1), Engine()
    own, taken = order(retriever, engine=engine), []
    for step in range(NUM_STEPS):
        if step == 2:
            after(0.1, retriever.held.clear)  # waited for: it was passed over twice
        taken.append(own.take(step))
        wait_for(all_but(own, [(0, 1)]))
        own.settle()
        engine.policy_version = step + 1
    assert sorted(number for groups in taken for number in numbers(groups)) == list(range(NUM_STEPS * BATCH))
    (late,) = [group for group in taken[2] if group.question.id == "q1"]
    assert numbers(taken[2])[0] == 1 and versions(late) == [[0, 2], [0, 2]]
    assert {rollout.stop_reason for groups in taken for g in groups for rollout in g.rollouts} == {
        StopReason.ANSWERED
    }
    lags = lag_metrics(taken[2], 2)
    assert lags["rollout/policy_version"] == 0.0 and lags["rollout/mixed_versions_share"] == pytest.approx(
        0.5
    )


@pytest.mark.parametrize("max_lag", [2, 4])
def test_no_turn_is_older_than_the_lag_and_each_question_is_taken_once(max_lag):
    num_steps, engine = 8, Engine()
    retriever = Retriever(*range(0, 16, 3))
    own, seen = order(retriever, engine=engine, max_lag=max_lag, num_steps=num_steps), []

    def free():
        while len(seen) < num_steps * BATCH:
            time.sleep(0.02)
            retriever.held.discard(min(retriever.held, default=None))

    threading.Thread(target=free, daemon=True).start()
    for step in range(num_steps):
        groups = own.take(step)
        assert len(groups) == BATCH
        for group in groups:
            assert all(
                0 <= step - version <= max_lag for own_versions in versions(group) for version in own_versions
            )
        seen += numbers(groups)
        own.settle()
        engine.policy_version = step + 1
    assert sorted(seen) == list(range(num_steps * BATCH))


def play(own, engine, steps, held):
    """The steps from here on, as they are when all that is not held has ended."""
    taken = []
    for step in steps:
        taken.append(own.take(step))
        wait_for(all_but(own, held))
        own.settle()
        engine.policy_version = step + 1
    return taken


def test_a_run_that_goes_on_from_a_checkpoint_takes_what_the_straight_one_takes(tmp_path):
    """Turns that were sampled before it are not sampled again, and a search that was under way is asked again."""
    held = [(0, 1)]
    retriever, engine = Retriever(1), Engine()
    own = order(retriever, engine=engine, max_lag=4)
    straight = play(own, engine, range(3), held)
    after(0.1, retriever.held.clear)
    straight += play(own, engine, range(3, NUM_STEPS), [])

    retriever, engine = Retriever(1), Engine()
    bank = RolloutBank(tmp_path, rank=0, identity="run", only_whole=True)
    own = order(retriever, engine=engine, max_lag=4, bank=bank)
    again = play(own, engine, range(2), held)
    state = own.state(2)
    assert [0, 1] in [list(place) for place in state["under_way"]] and state["next_batch"] == 3

    retriever, engine = Retriever(1), Engine()
    engine.policy_version = 2
    own = order(retriever, engine=engine, max_lag=4, bank=bank)
    own.load_state(state, 2)
    assert own.state(2) == state, "and a checkpoint at once is the same"
    again += play(own, engine, range(2, 3), held)
    after(0.1, retriever.held.clear)
    again += play(own, engine, range(3, NUM_STEPS), [])
    assert again == straight
    asked = [turn for session, turn in engine.asked if "(q1)" in session]
    assert asked == [1, 1], "the search was asked again, the turn before it was not sampled again"
    assert "about 1." in retriever.queries


def test_without_the_bank_what_is_under_way_begins_anew(tmp_path):
    engine = Engine()
    own = order(Retriever(1, 3), engine=engine)
    play(own, engine, range(1), [(0, 1), (1, 1)])
    state = own.state(1)
    engine = Engine()
    own = order(Retriever(), engine=engine)
    own.load_state(state, 1)
    taken = play(own, engine, range(1, NUM_STEPS), [])
    assert sorted(number for groups in taken for number in numbers(groups)) == [
        1,
        *range(3, NUM_STEPS * BATCH),
    ]
    assert [turn for session, turn in engine.asked if "(q1)" in session] == [0, 0, 1, 1]


def test_a_bank_that_cannot_be_written_stops_nobody(tmp_path, caplog):
    """The other ranks are in the collective that follows."""
    (tmp_path / "bank").write_text("a file in the place of the directory")
    own = order(Retriever(), bank=RolloutBank(tmp_path / "bank", rank=0, identity="run", only_whole=False))
    own.take(0)
    assert len(own.state(0)["under_way"]) == 4
    assert "rollouts under way are not kept, a later start begins them anew" in caplog.text


def test_what_a_step_took_is_under_way_again_when_the_step_was_not_taken():
    """An error or a stop between take and settle: the checkpoint that the trainer makes has lost nothing."""
    own = order(Retriever(2, 3))
    first = own.take(0)
    state = own.state(0)
    assert state["under_way"] == [(0, 0), (0, 1), (1, 0), (1, 1)] and state["next_batch"] == 2
    assert own.take(0) == first


def test_too_many_failures_end_the_run_and_a_later_start_tries_them_again():
    own = order(Retriever(2, 3, fails_on="about 0."))
    with pytest.raises(
        RolloutError, match="2 of 4 rollouts failed .*retrieval_failed.*fake retriever is down"
    ):
        own.take(0)
    state = own.state(0)
    healed = order(Retriever(2, 3))
    healed.load_state(state, 0)
    assert numbers(healed.take(0)) == [0, 1]


def test_an_unexpected_error_is_raised():
    class Broken(Retriever):
        async def search(self, queries, top_k):
            if len(self.queries) == 0:
                self.queries.append("the first")
                raise ZeroDivisionError("a bug")
            await asyncio.sleep(3600)

    own = order(Broken())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        own.take(0)
    own.load_state({}, 0)
    assert own._thread.run(running()) == 0, "and the group's other rollouts are ended"


def test_a_request_to_stop_ends_the_waiting():
    stop = StopRequest()
    own = order(Retriever(0, 1, 2, 3), stop=stop)
    after(0.1, lambda: stop._on_signal(signal.SIGTERM, None))
    with pytest.raises(StopRequested, match="SIGTERM"):
        own.take(0)
    assert len(own.state(0)["under_way"]) == 4


def test_going_back_drops_what_is_under_way():
    own = order(Retriever(3, 4, 5))
    own.take(0)
    own.settle()
    own.load_state({"next_batch": 1, "under_way": [[0, 1]]}, 1)
    assert own._thread.run(running()) == 3, "a group and its two rollouts; what was begun before has ended"
    assert numbers(own.take(1)) == [1, 2]


def test_the_bank_keeps_what_belongs_to_the_newest_checkpoints(tmp_path):
    bank = RolloutBank(tmp_path, rank=0, identity="run", only_whole=False, keep_steps=2)
    for step in (9, 2, 3, 4, 5):
        bank.carry(step, [{"name": f"rollout {step}"}], num_ranks=1)
    kept = [step for step in range(10) if bank.carried(step, num_ranks=1)]
    assert kept == [3, 4, 5], (
        "those of two checkpoints, and of the one that is being made; 9 was gone back from"
    )
    assert bank.carried(4, num_ranks=1) == {"rollout 4": {"name": "rollout 4"}}
    assert RolloutBank(tmp_path, rank=7, identity="run", only_whole=False).carried(5, num_ranks=1) != {}
    assert RolloutBank(tmp_path, rank=0, identity="another", only_whole=False).carried(5, num_ranks=1) == {}
    bank.open(6, 6).close()
    assert bank.carried(5, num_ranks=1) != {}, "a step's own rollouts are another matter"


def test_what_another_number_of_ranks_left_of_a_lost_branch_is_not_taken(tmp_path):
    """Two ranks were killed before their checkpoint was there; one rank made it."""
    ranks = [RolloutBank(tmp_path, rank=rank, identity="run", only_whole=False) for rank in (0, 1)]
    for rank in ranks:
        rank.carry(4, [{"name": "rollout", "of": "the lost branch"}], num_ranks=2)
    ranks[0].carry(4, [{"name": "rollout", "of": "this one"}], num_ranks=1)
    assert ranks[1].carried(4, num_ranks=1) == {"rollout": {"name": "rollout", "of": "this one"}}


def test_a_changed_plan_drops_what_is_under_way_and_says_so(caplog):
    own = order(Retriever())
    own.take(0)
    state = own.state(0)
    smaller = order(Retriever(), batch=1)
    smaller.load_state(state, 3)
    assert numbers(smaller.take(3)) == [3]
    assert (
        "rollout.questions_per_step was 2 and is now 1: 4 groups under way at step 3 are dropped"
        in caplog.text
    )
    InStep(lambda step, number: []).load_state(state, 3)
    assert "rollout.max_lag was above 1: 4 groups under way at step 3 are dropped" in caplog.text


def test_a_pause_waits_for_what_is_sampled_not_for_what_waits():
    class Slow(Engine):
        async def generate(self, request):
            await asyncio.sleep(0.05)
            return await super().generate(request)

    async def pause_among(num_requests):
        engine = PausableEngine(Slow(), width=1)
        await engine.go_on()
        asked = [asyncio.create_task(engine.generate(request(str(n), (5, 6)))) for n in range(num_requests)]
        await asyncio.sleep(0.02)
        await engine.pause()
        num_ended = sum(one.done() for one in asked)
        await engine.go_on()
        await asyncio.gather(*asked)
        return num_ended

    assert asyncio.run(pause_among(8)) <= 1
