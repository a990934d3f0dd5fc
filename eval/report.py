"""`sd-search report RUN_DIR`: a training run or an evaluation as one HTML page: no server, no network, no
script.

The page carries a policy that forbids scripts and every request, and all text from outside is escaped, so
what a model or a passage says cannot act. Filtering is done by the style sheet.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from eval.report_page.curves import render_curves
from eval.report_page.groups import OUTCOMES, Record, outcome, render_group, render_legend
from eval.report_page.text import element, plain
from eval.samples import read_lines
from megatron_sd.config.command_line import name_positionals, parse
from megatron_sd.durable.files import write_whole
from megatron_sd.errors import DataError
from megatron_sd.observability.metrics_log import METRICS_NAME, read_metrics
from megatron_sd.observability.names import CHANGES_NAME, TRANSCRIPTS_NAME

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make a page of what `run_dir` (of training, `sd-search eval` or `sd-search credit`) holds:
    transcripts/*.jsonl, metrics.jsonl, report.md of an evaluation."""

    run_dir: str  # what to show
    seeds: tuple[str, ...] = ()  # runs of the same configuration with other seeds: their curves join the band
    output: str | None = None  # None: RUN_DIR/report.html
    max_rollouts: int = 200  # the newest ones


def main(argv: Sequence[str]) -> None:
    """The command line of `report`."""
    config = parse(ReportConfig, name_positionals(argv, ("run_dir",)), "sd-search report")
    print(make_report(config))


def make_report(config: ReportConfig) -> Path:
    """Write the page and return its path. Raises DataError for a directory with nothing to show, or with
    broken files."""
    run_dir = Path(config.run_dir)
    groups = _newest(read_groups(run_dir), config.max_rollouts)
    runs = [read_metrics(path) for path in _metrics_files(config)]
    tables = [path.read_text(encoding="utf-8") for path in [run_dir / "report.md"] if path.is_file()]
    if not (groups or runs or tables):
        raise DataError(
            f"{run_dir} holds neither {TRANSCRIPTS_NAME}/*.jsonl nor {METRICS_NAME} nor report.md, expected"
            " the run_dir of a training run or the output of an evaluation"
        )
    changes = _plan_changes(run_dir)
    curves = [_curves(*render_curves(runs, changes), len(runs), changes)] if runs else []
    page = _page(run_dir.resolve().name, [*map(_table, tables), *curves, _groups(groups)])
    path = Path(config.output) if config.output else run_dir / "report.html"
    write_whole(path, page)
    return path


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A group and where it comes from: a step of training, on which it was trained, or a question of an
    evaluation."""

    place: str
    group: Record
    trained: bool

    def render(self) -> str:
        """Its HTML. Raises DataError for a record that lacks something."""
        try:
            return render_group(self.group, self.place, trained=self.trained)
        except (KeyError, TypeError, ValueError) as error:
            message = (
                f"the transcript of {self.place} lacks {error}; expected what training or `sd-search eval`"
                " writes"
            )
            raise DataError(message) from error


def read_groups(run_dir: Path) -> list[Shown]:
    """The groups of all transcripts, oldest first; of a question that one file holds twice, the newer.
    Raises DataError."""
    groups = []
    for path in sorted((run_dir / TRANSCRIPTS_NAME).glob("*.jsonl")):
        newest = {}
        for number, record in enumerate(read_lines(path), start=1):
            try:
                newest[record["question"]["id"]] = record
                outcome(record)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{path}:{number} is no transcript ({type(error).__name__}: {error})"
                ) from error
        step = re.fullmatch(r"step_(\d+)", path.stem)
        for name, record in newest.items():
            groups.append(
                Shown(place=f"step {int(step[1])}" if step else name, group=record, trained=step is not None)
            )
    return groups


def _newest(groups: Sequence[Shown], max_rollouts: int) -> list[Shown]:
    chosen, num_rollouts = [], 0
    for shown in reversed(groups):
        num_rollouts += len(shown.group["rollouts"])
        if num_rollouts > max_rollouts:
            break
        chosen.append(shown)
    return chosen[::-1]


def _metrics_files(config: ReportConfig) -> list[Path]:
    """Of the run, if it has one, and of the other seeds, which must."""
    own = [path for path in [Path(config.run_dir) / METRICS_NAME] if path.is_file()]
    return own + [Path(seed) / METRICS_NAME for seed in config.seeds]


def _plan_changes(run_dir: Path) -> list[tuple[int, str]]:
    """The step and the words of what was changed of the plan while the run went on."""
    path = run_dir / CHANGES_NAME
    return [(change["step"], change["words"]) for change in read_lines(path)] if path.is_file() else []


def _curves(first: str, others: str, num_runs: int, changes: Sequence[tuple[int, str]]) -> str:
    note = f"mean of {num_runs} runs, band from lowest to highest" if num_runs > 1 else "one run"
    more = element("details", f"<summary>all other metrics</summary>{element('div', others, 'curves')}")
    told = element("ul", "".join(element("li", plain(line)) for _, line in changes)) if changes else ""
    return f"<h2>Learning curves ({note})</h2>{told}{element('div', first, 'curves')}{more if others else ''}"


def _table(markdown: str) -> str:
    """The report of an evaluation: its list, its table and its notes."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    cells = [
        [plain(cell.strip().replace("\\|", "|")) for cell in row]
        for row in rows
        if not set("".join(row)) <= {"-"}
    ]
    lines = [
        element("tr", "".join(element("th" if not n else "td", c) for c in row))
        for n, row in enumerate(cells)
    ]
    facts = (plain(line[2:]) for line in markdown.splitlines() if line.startswith("- "))
    listed = element("p", "<br>".join(facts), "facts")
    return f"<h2>Evaluation</h2>{listed}{element('div', element('table', ''.join(lines)), 'table')}"


def _groups(groups: Sequence[Shown]) -> str:
    if not groups:
        return ""
    counts = Counter(outcome(shown.group) for shown in groups)
    choices = {"all": f"all {len(groups)}"} | {
        key: f"{title} {counts[key]}" for key, title in OUTCOMES.items() if counts[key]
    }
    buttons = "".join(
        f'<input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""}>'
        f'<label for="show-{key}">{plain(title)}</label>'
        for key, title in choices.items()
    )
    bar = element("div", f"{buttons}{render_legend([shown.group for shown in groups])}", "filter")
    num_rollouts = sum(len(shown.group["rollouts"]) for shown in groups)
    head = f"<h2>{len(groups)} questions, {num_rollouts} rollouts, by outcome</h2>"
    return head + bar + "".join(shown.render() for shown in groups)


def _filters() -> Iterable[str]:
    """One rule an outcome: its button hides the groups of every other one."""
    return (f"body:has(#show-{key}:checked) .group:not(.{key}) {{ display: none; }}" for key in OUTCOMES)


def _page(title: str, sections: Sequence[str]) -> str:
    style = (files("eval.report_page") / "style.css").read_text(encoding="utf-8") + "\n".join(_filters())
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>{plain(title)}</title><style>{style}</style>"
    body = element("h1", plain(title)) + "".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
