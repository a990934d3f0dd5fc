"""The model card: README.md of a repository on the Hub, written from the run's own records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.push.facts import Facts

UNKNOWN_LICENSE = "unknown"


def write_card(
    facts: Facts | None,
    reports: Mapping[str, Mapping[str, Any]],
    *,
    name: str,
    license_name: str | None,
    base_model: str | None,
) -> str:
    """The text. name: of the repository; base_model: its name on the Hub. Paths of this machine are not in
    it, but for the last part of the base model's and the questions'."""
    head: dict[str, Any] = {
        "license": license_name or UNKNOWN_LICENSE,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron_sd", *([] if facts is None else ["search-agent", method(facts.config).lower()])],
    }
    if base_model is not None:
        head["base_model"] = base_model
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {name}", ""]
    if facts is None:
        lines += ["No records of its training lie beside this model.", ""]
    else:
        lines += [*_training(facts, base_model), *_configuration(facts)]
    lines += _evaluations(reports)
    if license_name is None:
        lines += ["## Licence", "", "Unknown: whoever pushed this named none. The base model's binds.", ""]
    return "\n".join(lines)


def method(config: Mapping[str, Any]) -> str:
    """How the model was trained, in a word."""
    if config["policy_loss"].get("objective") == "likelihood":
        return "SFT"
    return "GRPO" if config["distill"]["block"] == "none" else "SD-Search"


def _training(facts: Facts, base_model: str | None) -> list[str]:
    config, rollout = facts.config, facts.config["rollout"]
    kind = method(config)
    estimator = config.get("advantage", {}).get("estimator", "grpo")  # older checkpoints name none
    named = {"SFT": "likelihood of selected episodes", "GRPO": estimator}
    told = named.get(kind, f"{estimator}, distilled from block {config['distill']['block']}")
    questions = Path(config["data"]["train"]).name
    split = config["data"].get("train_split")
    rows = {
        "base model": f"{base_model or own_name(config['model']['path'])} ({_digest(facts, 'model')})",
        "method": f"{kind}: {told}",
        "steps": f"{facts.step} of {config['num_steps']}, {rollout['questions_per_step']} questions a step,"
        f" {rollout['group_size']} rollouts a question",
        "data": f"{questions}{f', split {split}' if split else ''} ({_digest(facts, 'data.train')})",
        "corpus": f"version {facts.corpus_version[:16]}",
        "seed": config["seed"],
        "ranks": facts.world_size,
        "commit": facts.commit or "not recorded",
        "tokenizer": "the base model's, unchanged",
    }
    lines = ["Trained by megatron_sd to answer questions by searching.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    if facts.changes:
        lines += ["", "The plan was changed on the way:", "", *(f"- {change}" for change in facts.changes)]
    if facts.last:
        lines += ["", f"In training, at step {facts.step}:", ""]
        lines += [f"- {key}: {value:.3f}" for key, value in facts.last.items()]
    return [*lines, ""]


def _configuration(facts: Facts) -> list[str]:
    tree = yaml.safe_dump(dict(facts.values), sort_keys=False, allow_unicode=True).rstrip()
    told = "Every key that decided what was trained; limits and protocol are those to use the model with."
    folded = ["<details><summary>configuration</summary>", "", "```yaml", tree, "```", "", "</details>"]
    return ["## Configuration", "", told, "", *folded, ""]


def _evaluations(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not reports:
        return ["## Evaluation", "", "None was found beside the run.", ""]
    lines = ["## Evaluation", "", "Of exactly these weights; EM with its 95 % interval.", ""]
    lines += ["| evaluation | strategy | set | questions | EM | F1 |", "|---|---|---|---|---|---|"]
    for name, report in reports.items():
        for own_set, own in report["sets"].items():
            cells = [
                name,
                report["strategy"],
                own_set,
                own["num_questions"],
                _cell(own["em"]),
                _cell(own["f1"]),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def _cell(figure: Mapping[str, float | None]) -> str:
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def own_name(path: str) -> str:
    """How a model is called by its directory.

    >>> own_name("models/Qwen2.5-3B"), own_name("/home/me/runs/sft/checkpoints/step_00000062/model")
    ('Qwen2.5-3B', 'sft/checkpoints/step_00000062/model')
    """
    parts: Sequence[str] = Path(path).parts
    return "/".join(parts[-4:]) if parts[-1:] == ("model",) else parts[-1]


def _digest(facts: Facts, name: str) -> str:
    return f"digest {facts.contents[name]}" if name in facts.contents else "digest not recorded"
