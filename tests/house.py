"""The house in figures: `python -m tests.house` prints, by room, how long files and functions are and how
they are written.

test_architecture.py holds the bounds; this shows how far from them the tree is.
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.test_architecture import PACKAGES, ROOT, module_name, parse, sources, within

HEAD = (
    "files | lines | file med/p90/max | function med/p90/max | public names med/p90/max | width p90 | >100 |"
    " own #"
)


@dataclass(frozen=True)
class FileFigures:
    """Of one file. functions: lines of each; public_names: at its top; widths: of its lines; comments:
    lines of their own."""

    name: str
    lines: int
    functions: tuple[int, ...]
    public_names: int
    widths: tuple[int, ...]
    comments: int
    classes: tuple[str, ...]


def figures_of(path: Path) -> FileFigures:
    """Read one file."""
    lines, tree = path.read_text(encoding="utf-8").splitlines(), parse(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    named = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    public = [node for node in named if not node.name.startswith("_")]
    return FileFigures(
        name=module_name(path),
        lines=len(lines),
        functions=tuple(node.end_lineno - node.lineno + 1 for node in functions),
        public_names=len(public),
        widths=tuple(map(len, lines)),
        comments=sum(line.lstrip().startswith("#") for line in lines),
        classes=tuple(node.name for node in public if isinstance(node, ast.ClassDef)),
    )


def row(files: list[FileFigures]) -> str:
    """A line of the table."""
    lines = sum(file.lines for file in files)
    widths = [width for file in files for width in file.widths] or [0]
    cells = [
        f"{len(files)}",
        f"{lines}",
        spread([file.lines for file in files]),
        spread([length for file in files for length in file.functions]),
        spread([file.public_names for file in files]),
        f"{np.percentile(widths, 90):.0f}",
        f"{np.mean(np.array(widths) > 100):.1%}",
        f"{sum(file.comments for file in files) / max(lines, 1):.1%}",
    ]
    return " | ".join(cells)


def spread(values: list[int]) -> str:
    """median/90th percentile/largest."""
    return "-" if not values else f"{np.median(values):.0f}/{np.percentile(values, 90):.0f}/{max(values)}"


def main() -> None:
    """Print the table."""
    files = [figures_of(path) for path in sources(*PACKAGES) if path.name != "__init__.py"]
    rooms = sorted(
        {".".join(file.name.split(".")[: 2 if within(file.name, "megatron_sd") else 1]) for file in files}
    )
    print(f"room | {HEAD}")
    print(f"all | {row(files)}")
    for room in rooms:
        print(f"{room} | {row([file for file in files if within(file.name, room)])}")
    repeated = {
        name for name, count in Counter(name for file in files for name in file.classes).items() if count > 1
    }
    num_classes = sum(len(file.classes) for file in files)
    tests = [figures_of(path) for path in sources("tests")]
    print(f"tests | {row(tests)}")
    print(f"public class names repeated: {len(repeated)} of {num_classes}")
    print(f"folders of code in {ROOT.name}: {len({file.name.rpartition('.')[0] for file in files})}")


if __name__ == "__main__":
    main()
