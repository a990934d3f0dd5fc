"""A run directory as sections of a page. Each is made anew only when what it shows has changed, and has a
version that says whether a page shows it already."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from eval.report_page.curves import FIRST, render_charts, thinned
from eval.report_page.text import counted, element, plain
from eval.watch.filters import Matches, count
from eval.watch.following import MetricsFollower, Transcripts, TranscriptsFollower, read_records
from eval.watch.groups import readable, render_groups
from eval.watch.phases import newest_times, render_phases
from eval.watch.ranks import render_pulses
from eval.watch.standing import LifeSigns, Signs, Standing, age_words, standing, watchdog_words
from megatron_sd.distributed.pulses import PULSES_NAME, read_pulses
from megatron_sd.durable.run_lock import LOCK_NAME, read_holder
from megatron_sd.errors import DataError
from megatron_sd.observability.metrics_log import METRICS_NAME
from megatron_sd.observability.names import CHANGES_NAME, CONFIG_NAME, TRANSCRIPTS_NAME

LOOK_EVERY_S = 0.5  # pages that ask more often, or many of them, are answered from the same look
MARKS_OF_A_RUN = (LOCK_NAME, CONFIG_NAME, METRICS_NAME, "attempts.jsonl", "checkpoints")
_MARKS_OF_AN_EVALUATION = ("evaluation.json", "samples.jsonl")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page. version: of its content. counts: by filter, where it holds the groups."""

    version: str
    html: str
    counts: Mapping[str, Matches] = field(default_factory=dict)


def check_is_run(run_dir: Path) -> None:
    """Raise DataError for a directory that is missing, or that no training run has written to."""
    if not run_dir.is_dir():
        what = "a file" if run_dir.exists() else "nothing"
        raise DataError(
            f"found {what} at {run_dir}, expected the run_dir of a training run: start the run first, or"
            " mend the path"
        )
    found = {name for name in MARKS_OF_A_RUN if (run_dir / name).exists()}
    is_evaluation = any((run_dir / name).exists() for name in _MARKS_OF_AN_EVALUATION)
    if is_evaluation and METRICS_NAME not in found:
        raise DataError(
            f"{run_dir} is the output of an evaluation, expected the run_dir of a training run: look at it"
            f" with `sd-search report {run_dir}`"
        )
    runs = sorted(path.parent.name for path in run_dir.glob(f"*/{METRICS_NAME}"))
    if runs and not found - {LOCK_NAME}:  # a recipe holds its directory, too
        raise DataError(
            f"{run_dir} is no run itself but holds {', '.join(runs)}; expected the run_dir of a training run:"
            f" give one of them, such as {run_dir / runs[-1]}"
        )
    if not found:
        raise DataError(
            f"{run_dir} holds none of {', '.join(MARKS_OF_A_RUN)}, expected the run_dir of a training run:"
            " start the run first, or give its directory"
        )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one look at the directory found. every: in how many steps transcripts are written, if that is
    known."""

    signs: Signs
    every: int | None
    newest: Transcripts | None


class _Settings:
    """The resolved configuration, read again only when its file is another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = (0, 0)
        self._known: Mapping[str, Any] = {}

    def now(self) -> Mapping[str, Any]:
        """Empty before the run has written it."""
        try:
            status = self._path.stat()
            mark = (status.st_ino, status.st_mtime_ns)
            if mark != self._mark:
                self._known, self._mark = (
                    _settings(self._path.read_text(encoding="utf-8", errors="replace")),
                    mark,
                )
        except FileNotFoundError:
            self._known, self._mark = {}, (0, 0)
        return self._known


class View:
    """What there is to see of a run now. Threads may ask at one time. It only reads."""

    def __init__(self, run_dir: Path, *, look_every_s: float = LOOK_EVERY_S) -> None:
        self._run_dir = run_dir
        self._look_every_s = look_every_s
        self._lock = threading.Lock()
        self._looked_at = float("-inf")
        self._metrics = MetricsFollower(run_dir / METRICS_NAME)
        self._transcripts = TranscriptsFollower(run_dir / TRANSCRIPTS_NAME)
        self._life = LifeSigns()
        self._settings = _Settings(run_dir / CONFIG_NAME)
        self._seen: _Look
        self._made: dict[str, tuple[object, Section]] = {}  # by name: what it was made of, and what it is
        self._makers: Mapping[str, Callable[[], Section]] = {
            "standing": self._standing,
            "phases": self._phases,
            "pulses": self._pulses,
            "curves": self._curves,
            "more": self._more,
            "groups": self._groups,
        }

    @property
    def title(self) -> str:
        """How the run is called."""
        return self._run_dir.resolve().name

    def sections(self, known: Mapping[str, str]) -> dict[str, Section]:
        """Of the sections that are named in `known`, those whose version is another one now. Raises OSError
        for what cannot be read."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= self._look_every_s:
                self._seen = self._look()
                self._looked_at = now
            found = {name: self._makers[name]() for name in self._makers if name in known}
        return {name: own for name, own in found.items() if own.version != known[name]}

    def _look(self) -> _Look:
        self._metrics.look()
        step, holder = self._metrics.newest_step, read_holder(self._run_dir / LOCK_NAME)
        settings = self._settings.now()
        num_steps = settings.get("num_steps")
        signs = Signs(
            step=step,
            num_steps=num_steps if isinstance(num_steps, int) else None,
            holder=holder,
            lives=self._life.lives(holder),
            stuck=watchdog_words(self._run_dir / "watchdog" / "rank_0.txt"),
        )
        return _Look(signs=signs, every=_transcripts_every(settings), newest=self._transcripts.look(step))

    def _once(self, name: str, source: object, make: Callable[[], Section]) -> Section:
        """The section as it was made of the same source, or made now."""
        if name not in self._made or self._made[name][0] != source:
            self._made[name] = source, make()
        return self._made[name][1]

    def _standing(self) -> Section:
        found: Standing = standing(self._seen.signs)
        facts = [_step_words(self._seen.signs)]
        if self._seen.signs.step is not None:
            written = (self._run_dir / METRICS_NAME).stat().st_mtime
            facts.append(f"recorded {age_words(time.time() - written)} ago")
        if self._metrics.unreadable:
            facts.append(
                f"passed over: {counted(self._metrics.unreadable, 'line')} of {METRICS_NAME} with no metrics,"
                " which was changed by hand or is damaged"
            )
        badge = element("b", plain(found.kind), f"badge {found.kind}")
        return _section(
            element("p", f"{badge} {plain(found.words)}") + element("p", plain(" · ".join(facts)), "facts")
        )

    def _phases(self) -> Section:
        return self._once(
            "phases",
            self._metrics.revision,
            lambda: _section(render_phases(newest_times(self._metrics.columns))),
        )

    def _pulses(self) -> Section:
        signs = self._seen.signs
        is_over = signs.holder is None or signs.lives is False
        return _section(
            render_pulses(
                read_pulses(self._run_dir / "watchdog" / PULSES_NAME), now=time.time(), is_over=is_over
            )
        )

    def _curves(self) -> Section:
        return self._charts("curves", lambda name: name in FIRST)

    def _more(self) -> Section:
        return self._charts("more", lambda name: name not in FIRST)

    def _charts(self, section: str, is_shown: Callable[[str], bool]) -> Section:
        changes = _plan_changes(self._run_dir / CHANGES_NAME)

        def make() -> Section:
            columns = self._metrics.columns
            names = [name for name in (*FIRST, *sorted(columns.keys() - set(FIRST))) if name in columns]
            points = {
                name: thinned(columns[name].steps, columns[name].values) for name in names if is_shown(name)
            }
            told = "".join(element("li", plain(words)) for _, words in changes)
            charts = render_charts(points, changes) or element("p", "Nothing has been recorded yet.", "facts")
            return _section(
                (element("ul", told) if told and section == "curves" else "")
                + element("div", charts, "curves")
            )

        return self._once(section, (self._metrics.revision, tuple(changes)), make)

    def _groups(self) -> Section:
        newest, every = self._seen.newest, self._seen.every

        def make() -> Section:
            shown = readable(newest.groups) if newest is not None else []
            return _section(render_groups(newest, shown, every), count(shown))

        return self._once("groups", (newest.mark if newest else None, every), make)


def _section(html: str, counts: Mapping[str, Matches] | None = None) -> Section:
    return Section(
        version=f"{zlib.crc32(html.encode('utf-8', errors='replace')):08x}", html=html, counts=counts or {}
    )


def _step_words(signs: Signs) -> str:
    if signs.step is None:
        return "no steps yet: this page fills when they arrive"
    return f"step {signs.step}" + (f" of {signs.num_steps}" if signs.num_steps is not None else "")


def _settings(text: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _transcripts_every(settings: Mapping[str, Any]) -> int | None:
    log = settings.get("log")
    every = log.get("transcripts_every") if isinstance(log, dict) else None
    return every if isinstance(every, int) else None


def _plan_changes(path: Path) -> list[tuple[int, str]]:
    """The step and the words of what was changed of the plan; lines that are no such thing are passed
    over."""
    try:
        records, _ = read_records(path.read_bytes())
    except FileNotFoundError:
        return []
    return [
        (record["step"], record["words"])
        for record in records
        if isinstance(record.get("step"), int) and isinstance(record.get("words"), str)
    ]
