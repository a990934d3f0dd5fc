"""`--as NAME`: a method by its name. A file of launch/configs/as says what makes a run that method, and in its
first lines what the method is and what differs from the original."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megatron_sd.errors import ConfigError

DIRECTORY = Path(str(files("launch"))) / "configs" / "as"
# Where a run finds things unless it is told: README's places.
PLACES = {
    "run_dir": "runs/{name}",
    "data.train": "data/questions.jsonl",
    "data.train_split": "train",
    "retriever.corpus": "data/corpus",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method. about: one line; differs: what is not as in the original."""

    name: str
    path: Path
    about: str
    differs: str


def presets() -> dict[str, Preset]:
    """All of them by name."""
    found = {}
    for path in sorted(DIRECTORY.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        about, differs = (
            next(line.removeprefix(f"# {key}: ") for line in lines if line.startswith(f"# {key}: "))
            for key in ("about", "differs")
        )
        found[path.stem] = Preset(name=path.stem, path=path, about=about, differs=differs)
    return found


def listing() -> str:
    """A line a method."""
    known = presets()
    width = max(map(len, known))
    return "\n".join(f"{name:<{width}}  {preset.about}" for name, preset in known.items())


def expand(argv: Sequence[str]) -> tuple[list[str], Preset | None]:
    """`--as NAME` as the options that it stands for, and the method. Its file comes after the other `--config`
    files, so that these say where things are, and before single options, which may change anything. Without a
    `--config` of its own a run looks in the usual places. Raises ConfigError for an unknown name, or two."""
    rest, names = _taken_out(argv)
    if not names:
        return rest, None
    if len(names) > 1:
        raise ConfigError(f"--as: found {' and '.join(names)}, expected one method")
    known = presets()
    preset = known.get(names[0])
    if preset is None:
        close = difflib.get_close_matches(names[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}."
        raise ConfigError(f"--as: found {names[0]!r}; {hint} `sd-search train --list` says what each is")
    places = [place for place, word in enumerate(rest) if word.partition("=")[0] == "--config"]
    if not places:
        usual = [f"--{key}={value.format(name=preset.name)}" for key, value in PLACES.items()]
        return [f"--config={preset.path}", *usual, *rest], preset
    after = places[-1] + (1 if "=" in rest[places[-1]] else 2)
    return [*rest[:after], f"--config={preset.path}", *rest[after:]], preset


def _taken_out(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without `--as NAME` and `--as=NAME`, and the names."""
    rest: list[str] = []
    names: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--as":
            names.append(next(words, "nothing"))
        elif word.startswith("--as="):
            names.append(word.removeprefix("--as="))
        else:
            rest.append(word)
    return rest, names
