"""Grids: what is refused before the first run, what is repeated, and that the figures of a table are
right."""

import dataclasses
import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from data_prep.world.world import WorldConfig
from eval.grid import main as grid_main
from eval.grid.curves import curve_of
from eval.grid.main import read_cells, run_grid, write_results
from eval.grid.plan import OUTCOMES, GridConfig, contrasts_of, digest, plan
from eval.grid.records import RunRecord, read_record, write_record
from eval.grid.table import crossed_bootstrap, summarize
from eval.grid.worker import ENTROPY, provenance, training_outcomes
from launch.programs import make_world
from megatron_sd.config.command_line import parse
from megatron_sd.errors import ConfigError, DataError, MegatronSdError
from tests.training.fakes import write_model

RECIPE = "launch/configs/world.yaml"


@pytest.fixture
def config(tmp_path):
    starts = {name: str(write_model(tmp_path / name)) for name in ("one", "two")}
    arms = {
        "grpo": {"distill.block": "none"},
        "sd": {},
        "shuffled": {"distill.block": "shuffled", "num_steps": 3},
    }
    return GridConfig(
        recipe=RECIPE, output=str(tmp_path / "grid"), arms=arms, starts=starts, seeds=(0, 1, 2), baseline="grpo",
        common={"num_steps": 7, "optimizer.betas": [0.8, 0.9], "distill.top_k": None}, num_resamples=500,
    )  # fmt: skip


def record_of(run, config, value=0.5, **changes):
    outcomes = dict.fromkeys(OUTCOMES, value)
    fields = {
        "arm": run.arm, "start": run.start, "seed": run.seed, "digest": run.digest, "settings": {},
        "outcomes": outcomes, "curves": {"em": [0.1, value]}, "ratios": {"1": {"grad_ratio": 0.25}},
        "cost": {"train_cpu_s": 2.0, "num_rollouts": 40.0}, "made_by": {},
    }  # fmt: skip
    return RunRecord(**(fields | changes))


def fill(config, value_of):
    """Write a record for every run of the plan."""
    for cell in read_cells(config):
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(cell.path, record_of(cell.run, config, value_of(cell.run)))


def test_every_run_of_the_plan_with_its_configuration(config):
    runs = plan(config)
    assert [run.name for run in runs[:4]] == [
        "grpo-one-000",
        "sd-one-000",
        "shuffled-one-000",
        "grpo-two-000",
    ]
    assert len({run.name for run in runs}) == 18
    own = runs[5].config(RECIPE, "somewhere")
    assert (own.distill.block, own.num_steps, own.seed, own.run_dir) == ("shuffled", 3, 0, "somewhere")
    assert (
        own.optimizer.betas == (0.8, 0.9)
        and own.distill.top_k is None
        and own.model.path == config.starts["two"]
    )
    assert runs[1].config(RECIPE, "x").num_steps == 7


def test_a_digest_is_of_the_arm_and_not_of_seed_start_or_place(config, tmp_path):
    runs = plan(config)
    assert len({(run.arm, run.digest) for run in runs}) == 3 and len({run.digest for run in runs}) == 3
    text = Path(RECIPE).read_text()
    elsewhere, other = tmp_path / "elsewhere.yaml", tmp_path / "other.yaml"
    elsewhere.write_text(text.replace("runs/world", "/data/world").replace("seed: 0", "seed: 9"))
    other.write_text(text.replace("correct_above: 0.5", "correct_above: 0.4"))
    assert digest(str(elsewhere), runs[0].overrides) == runs[0].digest
    assert digest(str(other), runs[0].overrides) != runs[0].digest
    assert digest(RECIPE, runs[0].overrides | {"num_steps": 8}) != runs[0].digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "gppo"}, "baseline: unknown 'gppo'; did you mean grpo?"),
        ({"only": ("shufled",)}, "only: unknown 'shufled'; did you mean shuffled?"),
        ({"contrasts": (("sd", "shufled"),)}, "contrasts: unknown 'shufled'; did you mean shuffled?"),
        ({"outcomes": ("evel_em",)}, "outcomes: unknown 'evel_em'; did you mean eval_em?"),
        (
            {"arms": {"grpo": {}, "x": {"distill.blok": "none"}}},
            "arm 'x': distill.blok: .*; did you mean distill.block?",
        ),
        (
            {"arms": {"grpo": {}, "x": {"distill.block": "shufled"}}},
            "arm 'x': distill.block: .* did you mean shuffled?",
        ),
        ({"arms": {"grpo": {}, "x": {"distill.beta": 2}}}, "arm 'x': distill.beta: found 2"),
        (
            {"arms": {"grpo": {}, "x": {"rollout.keep_groups": "with_spread"}}},
            "arm 'x': rollout.keep_groups: found with_spread, expected all",
        ),
        (
            {
                "arms": {"grpo": {}, "x": {"policy_loss.weight": 0.0}},
                "common": {
                    "distill.measure_every": 0,
                    "distill.alpha.mode": "fixed",
                    "distill.alpha.warmup_steps": 0,
                },
                "outcomes": ("train_entropy",),
            },
            "outcomes: found train_entropy with arm 'x'",
        ),
        ({"arms": {"grpo": {}, "x/y": {}}}, "found the name 'x/y', expected letters"),
        ({"seeds": (1, 1)}, "seeds: found \\[1, 1\\], expected each once"),
        ({"seeds": ()}, "seeds: found none"),
        ({"num_workers": 0}, "num_workers: found 0, expected 1 or more"),
        ({"recipe": "nowhere.yaml"}, "no file at nowhere.yaml"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_before_any_run(config, changes, words):
    with pytest.raises(ConfigError, match=words):
        run_grid(dataclasses.replace(config, **changes))


def test_a_start_policy_that_is_not_there_is_named(config):
    with pytest.raises(DataError, match="starts.three: nowhere holds no config.json"):
        plan(dataclasses.replace(config, starts={"three": "nowhere"}))


def test_the_yaml_of_the_committed_evidence_reads():
    config = parse(GridConfig, ["--config=results/claim_c/grid.yaml"], "grid")
    assert len(config.arms) >= 11 and len(config.seeds) >= 10 and len(config.starts) >= 3
    plan(dataclasses.replace(config, starts={"committed": config.starts["committed"]}))
    assert contrasts_of(config)[0] == ("sd", "grpo")


def test_only_missing_and_half_written_runs_are_run_again(config, monkeypatch):
    fill(config, lambda run: 0.5)
    cells = read_cells(config)
    assert all(cell.record is not None for cell in cells)
    torn, gone, empty = cells[2].path, cells[7].path, cells[9].path
    torn.write_text(torn.read_text()[:200])
    gone.unlink()
    without = json.loads(empty.read_text())
    del without["outcomes"]["eval_em"]
    empty.write_text(json.dumps(without))
    kept = cells[0].path.read_bytes()
    ran = []
    monkeypatch.setattr(grid_main, "run_all", lambda orders, **_: ran.extend(order.name for order in orders))
    assert run_grid(config) == {}
    assert ran == [cells[i].run.name for i in (2, 7, 9)]
    assert cells[0].path.read_bytes() == kept
    ran.clear()
    run_grid(dataclasses.replace(config, only=("grpo",)))
    assert ran == [cells[9].run.name]
    assert "15 of 18 runs are finished" in write_results(config)


def test_a_run_of_other_settings_is_refused_by_name_and_kept(config):
    fill(config, lambda run: 0.5)
    changed = dataclasses.replace(config, common=config.common | {"distill.alpha.value": 0.7})
    with pytest.raises(DataError, match=r"grpo-one-000.json was run with another configuration"):
        run_grid(changed)
    assert all(cell.record is not None for cell in read_cells(config))


def test_a_record_appears_whole_or_not_at_all(config, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    record = record_of(plan(config)[0], config)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_record(path, record)
    assert read_record(path) is None
    monkeypatch.undo()
    write_record(path, record)
    assert read_record(path) == record
    without = {name: value for name, value in record.outcomes.items() if name != "train_entropy"}
    write_record(path, dataclasses.replace(record, outcomes=without))
    assert read_record(path) is not None, "a run without a policy loss has no entropy, and is complete"


def test_failures_are_reported_after_the_table(config, monkeypatch, capsys):
    monkeypatch.setattr(grid_main, "parse", lambda *_: config)
    monkeypatch.setattr(
        grid_main,
        "run_all",
        lambda orders, on_end, **_: [on_end(o.name, "RolloutError: lost") for o in orders],
    )
    with pytest.raises(
        MegatronSdError, match="18 runs failed, the others are kept; the same command runs them again"
    ):
        grid_main.main([])
    assert "0 of 18 runs are finished" in capsys.readouterr().out


def test_differences_are_paired_by_start_and_seed(config):
    """sd is 0.1 better than grpo in every pair, however much pairs differ; shuffled has no run of seed 2."""
    base = {
        (start, seed): 0.2 * seed + (0.3 if start == "two" else 0.0)
        for start in config.starts
        for seed in config.seeds
    }
    lift = {"grpo": 0.0, "sd": 0.1, "shuffled": -0.05}
    fill(config, lambda run: base[run.start, run.seed] + lift[run.arm])
    records = [cell.record for cell in read_cells(config)]
    records = [r for r in records if (r.arm, r.seed) != ("shuffled", 2)]
    summary = summarize(records, config)
    by_name = {(c.outcome, c.arm): c for c in summary.contrasts}
    sd, shuffled = by_name["eval_em", "sd"], by_name["eval_em", "shuffled"]
    assert sd.difference.value == pytest.approx(0.1)
    assert sd.difference.low == pytest.approx(0.1) and sd.difference.high == pytest.approx(0.1)
    assert (sd.num_pairs, shuffled.num_pairs, sd.num_starts) == (6, 4, 2)
    assert sd.difference.p_value == pytest.approx(2 / 501) and sd.p_holm == pytest.approx(4 / 501)
    assert sd.by_start == pytest.approx({"one": 0.1, "two": 0.1})
    assert {arm.arm: arm.num_runs for arm in summary.arms} == {"grpo": 6, "sd": 6, "shuffled": 4}
    assert summary.arms[0].grad_ratio == pytest.approx(0.25)


def test_the_interval_is_that_of_resampled_starts_and_seeds():
    """Against every possible resample of a small table, weighted by its probability."""
    table = {("a", 0): 0.3, ("a", 1): -0.1, ("b", 0): 0.2, ("b", 1): 0.05}
    means = sorted(
        np.mean([table[start, seed] for start in starts for seed in seeds])
        for starts in itertools.product("ab", repeat=2)
        for seeds in itertools.product((0, 1), repeat=2)
    )
    found = crossed_bootstrap(table, num_resamples=20_000)
    assert found.value == pytest.approx(0.1125)
    assert found.low == pytest.approx(np.quantile(means, 0.025, method="inverted_cdf"), abs=1e-9)
    assert found.high == pytest.approx(np.quantile(means, 0.975, method="inverted_cdf"), abs=1e-9)
    below = np.mean([mean <= 0 for mean in means])
    assert found.p_value == pytest.approx(2 * below, abs=0.02)


def test_an_effect_of_one_start_policy_alone_has_a_wide_interval():
    table = {
        (start, seed): (0.3 if start == "a" else 0.0) + 0.001 * seed for start in "abc" for seed in range(10)
    }
    found = crossed_bootstrap(table, num_resamples=4000)
    assert found.low < 0.01 and found.high > 0.25


def test_missing_cells_count_for_nothing():
    table = {("a", 0): 0.2, ("b", 1): 0.4}
    found = crossed_bootstrap(table, num_resamples=2000)
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.2, 0.4))


def test_the_picture_names_every_contrast_and_arm(config):
    fill(config, lambda run: 0.1 * run.seed)
    write_results(config)
    picture = (Path(config.output) / "results.svg").read_text()
    ElementTree.fromstring(picture)
    for words in ("sd - grpo (n=6)", "shuffled - grpo (n=6)", "train_em: paired differences", "sd (6 runs)"):
        assert words in picture
    figures = json.loads((Path(config.output) / "results.json").read_text())
    assert {c["outcome"] for c in figures["contrasts"]} == set(config.outcomes)


def test_a_record_says_what_made_it(config):
    one, two = (provenance(Path(path)) for path in config.starts.values())
    assert one == two and len(one["start_weights"]) == 16 and one["torch"] and one["machine"]
    weights = Path(config.starts["two"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert provenance(weights.parent)["start_weights"] != one["start_weights"]


def test_a_run_without_a_policy_loss_has_no_entropy():
    steps = {1: {"reward/em": 0.5, ENTROPY: 0.2}, 2: {"reward/em": 1.0, ENTROPY: 0.4}}
    assert training_outcomes(steps) == {"train_em": 0.75, "train_em_late": 1.0, "train_entropy": 0.4}
    bare = {step: {"reward/em": metrics["reward/em"]} for step, metrics in steps.items()}
    assert training_outcomes(bare) == {"train_em": 0.75, "train_em_late": 1.0}


@pytest.mark.slow
@pytest.mark.ranks
def test_real_runs_are_paired_recorded_and_not_repeated(tmp_path):
    """Two arms from the committed start policy: the same first rollouts, other weights after the update;
    then nothing is left."""
    world = tmp_path / "world"
    make_world(WorldConfig(output=str(world), num_train_questions=40, num_eval_questions=10))
    questions = f"{world}/questions.jsonl"
    places = {"data.train": questions, "data.eval": questions, "retriever.corpus": f"{world}/corpus"}
    sizes = {
        "num_steps": 2,
        "rollout.questions_per_step": 3,
        "distill.alpha.warmup_steps": 0,
        "distill.measure_every": 1,
    }
    config = GridConfig(
        recipe=RECIPE, output=str(tmp_path / "grid"), arms={"grpo": {"distill.block": "none"}, "sd": {"distill.gate": "none"}},
        starts={"committed": "data_prep/coldstart_model"}, seeds=(5,), baseline="grpo", common=sizes | places,
        num_eval_questions=4, num_resamples=100,
    )  # fmt: skip
    assert run_grid(config) == {}
    grpo, sd = (cell.record for cell in read_cells(config))
    assert grpo.curves["em"][0] == sd.curves["em"][0] and len(sd.curves["em"]) == 2
    assert grpo.ratios == {} and set(sd.ratios) == {"1", "2"} and sd.ratios["1"]["alpha"] == 0.3
    assert sd.outcomes["train_em"] == pytest.approx(np.mean(sd.curves["em"]), abs=1e-4)
    assert grpo.cost["num_rollouts"] == 30 and 0 < grpo.cost["train_cpu_s"] < grpo.cost["cpu_s"]
    assert grpo.made_by["start_weights"] == sd.made_by["start_weights"]
    before = [cell.path.stat().st_mtime_ns for cell in read_cells(config)]
    assert run_grid(config) == {} and [cell.path.stat().st_mtime_ns for cell in read_cells(config)] == before


def test_a_curve_is_the_mean_over_runs_with_its_band():
    """Means .25 and .5; sample deviations .35355 and 0 over two runs; 10 rollouts and 3 CPU seconds a step."""
    shared = {
        "arm": "sd",
        "start": "one",
        "digest": "",
        "settings": {},
        "outcomes": {},
        "ratios": {},
        "made_by": {},
    }
    runs = [
        RunRecord(
            seed=0, curves={"em": [0.0, 0.5]}, cost={"num_rollouts": 20.0, "train_cpu_s": 4.0}, **shared
        ),
        RunRecord(
            seed=1, curves={"em": [0.5, 0.5, 1.0]}, cost={"num_rollouts": 30.0, "train_cpu_s": 12.0}, **shared
        ),
    ]
    curve = curve_of(runs, "train_cpu_s")
    np.testing.assert_allclose(curve.mean, [0.25, 0.5])
    np.testing.assert_allclose(curve.half, [1.96 * 0.353553 / np.sqrt(2), 0.0], atol=1e-6)
    np.testing.assert_allclose(curve.cost, [3.0, 6.0])
    np.testing.assert_allclose(curve_of(runs, "num_rollouts").cost, [10.0, 20.0])
    assert curve_of(runs[:1], "num_rollouts").half.tolist() == [0.0, 0.0]
