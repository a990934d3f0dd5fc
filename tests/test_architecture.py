"""The laws of DESIGN.md that a machine can check: floors, homes of frameworks, sizes, names, docstrings."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_sd", "data_prep", "eval", "launch")

# The longest prefix of a module's name decides its floor.
FLOORS = {
    "launch": 6,
    "eval": 5,
    "data_prep": 5,
    "megatron_sd.train": 4,
    "megatron_sd.sft": 4,
    "megatron_sd.building": 4,
    "megatron_sd.sft_config": 4,
    "megatron_sd.trainer": 3,
    **{f"megatron_sd.{room}": 2 for room in ("training", "rollout", "resharding", "distributed")},
    **{f"megatron_sd.{room}": 1 for room in ("algorithm", "search", "retrieval")},
    "megatron_sd.ops": 0,
    "megatron_sd.observability": 0,
    "megatron_sd.pretrained": 0,
    "megatron_sd.durable": 0,
    "megatron_sd.config": 0,
    "megatron_sd.records": 0,
    "megatron_sd.compact": 0,
    "megatron_sd.errors": 0,
    "megatron_sd.machine": 0,
    "megatron_sd.door": 0,
    "megatron_sd.own_code": 0,
    "megatron_sd": 0,
}
# What packages of the same floor may import from each other, and why.
SHARED_WITHIN_FLOOR = {
    "megatron_sd.rollout.engine": "holds Protocols only",
    "megatron_sd.retrieval.retriever": "holds a Protocol only",
    "megatron_sd.retrieval.queries": "one rule for who asks, who sends and who answers",
    "megatron_sd.resharding": "training and rollout are its two ends; it imports neither",
    "megatron_sd.distributed": "ranks and collectives serve every machine of floor 2",
    "megatron_sd.durable": "directories that are whole or not at all, and locks, serve every room",
    "megatron_sd.records": "the vocabulary",
    "megatron_sd.compact": "what the vocabulary's numbers are held in",
    "megatron_sd.config": "the vocabulary",
    "megatron_sd.errors": "the vocabulary",
    "megatron_sd.machine": "a default of the vocabulary depends on it",
}
# Where a framework, or a thing of the interpreter, may be touched: path prefixes.
HOMES = {
    "deepspeed": ("megatron_sd/training/", "megatron_sd/distributed/world.py"),
    "vllm": ("megatron_sd/rollout/vllm/",),
    "faiss": ("megatron_sd/retrieval/", "data_prep/"),
    "bm25s": ("megatron_sd/retrieval/", "data_prep/"),
    "tensorboard": ("megatron_sd/observability/",),
    "torch.utils.tensorboard": ("megatron_sd/observability/",),
    **dict.fromkeys(("wandb", "trackio", "mlflow"), ("megatron_sd/observability/sinks/",)),
    "huggingface_hub": ("launch/push/",),
    "torch.distributed": ("megatron_sd/distributed/", "megatron_sd/resharding/transport.py"),
    "os.environ": ("megatron_sd/distributed/world.py", "launch/"),
    "os.getenv": ("megatron_sd/distributed/world.py", "launch/"),
    "os.replace": ("megatron_sd/durable/",),
    "os.fsync": (
        "megatron_sd/durable/",
        "megatron_sd/rollout/bank.py",  # appends as rollouts end, and flushes once a second
        "megatron_sd/training/state/tensor_file.py",  # seals what it writes, on the way
    ),
    "trl": (),  # benchmarks only
}
# Who may take the whole configuration: who hands it out, and who is about it.
TAKES_ALL = (
    *("megatron_sd/config/", "megatron_sd/building/", "megatron_sd/train.py", "megatron_sd/sft"),
    "megatron_sd/training/state/",  # a checkpoint holds it; what a run's identity is, is said of its keys
)
MAX_LINES = 400
MAX_FUNCTION = 60
MAX_FILES = 12  # of a folder's own
MAX_TRAINER_LINES = 220
MAX_POSITIONAL = 4
FIXED_SIGNATURES = {  # whose parameters are decided elsewhere
    "jsd_rows": "its five aligned tensors are the signature of the native op",
    "divergence_op": "an operator's schema: these five and plain numbers, by position",
    "row_attention": "transformers calls it with these five",
    "packed_attention": "transformers calls it with these five",
}
BAD_FILE_WORDS = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "handler"}
BAD_CLASS_ENDINGS = ("Manager", "Handler", "Helper", "Utils")


def sources(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at its top or inside a function; `from a import b`
    gives a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path)}:{node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def uses(path: Path) -> Iterator[tuple[int, str]]:
    """Imports, and dotted attribute chains such as os.environ."""
    yield from imports(path)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def longest_prefix(name: str, prefixes) -> str | None:
    return max((prefix for prefix in prefixes if within(name, prefix)), key=len, default=None)


def package_of(name: str) -> str:
    """The unit that must not import its neighbours: megatron_sd.rollout, or a single file such as
    megatron_sd.records."""
    return ".".join(name.split(".")[:2]) if within(name, "megatron_sd") else name.split(".")[0]


LIBRARY = sources(*PACKAGES)
EVERYTHING = [
    *LIBRARY,
    *sources("benchmarks", "docs", "tests"),
    *([ROOT / "setup.py"] if (ROOT / "setup.py").exists() else []),
]
LAWS: dict[str, tuple[Callable[[Path], None], list[Path]]] = {}  # a law of single files, and which they are


def law(files: list[Path]) -> Callable:
    """A check that holds for each of `files`."""

    def keep(check: Callable[[Path], None]) -> Callable[[Path], None]:
        LAWS[check.__name__] = check, files
        return check

    return keep


def broken(check: Callable[[Path], None], files: list[Path]) -> list[str]:
    """What the check says of each file that it does not hold for."""
    found = []
    for path in files:
        try:
            check(path)
        except AssertionError as error:
            found.append(str(error).splitlines()[0])
    return found


@law(LIBRARY)
def a_file_imports_from_its_own_floor_or_below(path: Path) -> None:
    own = module_name(path)
    floor = FLOORS[longest_prefix(own, FLOORS)]
    for line, name in imports(path):
        known = longest_prefix(name, FLOORS)
        if known is None:
            continue
        message = f"{where(path)}:{line} (floor {floor}) imports {name} (floor {FLOORS[known]})"
        assert FLOORS[known] <= floor, (
            f"{message}: move it up, hand the object in from building/, or lower what it needs"
        )
        is_neighbour = FLOORS[known] == floor <= 2 and package_of(name) != package_of(own)
        if is_neighbour and longest_prefix(name, SHARED_WITHIN_FLOOR) is None:
            raise AssertionError(f"{message}: packages of one floor meet through Protocols or records only")


def test_every_module_of_the_library_has_a_floor():
    stray = [
        where(path)
        for path in sources("megatron_sd")
        if longest_prefix(module_name(path), FLOORS) == "megatron_sd"
    ]
    assert stray == ["megatron_sd/__init__.py"], (
        "give new files of megatron_sd/ a floor in FLOORS, and in DESIGN.md"
    )


@law(LIBRARY)
def a_framework_is_used_in_its_home_only(path: Path) -> None:
    for line, name in uses(path):
        for framework, homes in HOMES.items():
            if within(name, framework):
                at_home = where(path).startswith(homes) if homes else False
                assert at_home, (
                    f"{where(path)}:{line} uses {name}; {framework} lives in {homes or 'benchmarks/'}"
                )


@law(EVERYTHING)
def a_file_has_at_most_400_lines(path: Path) -> None:
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    message = f"{where(path)} has {num_lines} lines, at most {MAX_LINES}: cut it where its subject divides"
    assert num_lines <= MAX_LINES, message


@law(LIBRARY)
def a_function_has_at_most_60_lines(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = node.end_lineno - node.lineno + 1
            message = (
                f"{where(path)}:{node.lineno}: {node.name} has {num_lines} lines, at most {MAX_FUNCTION}"
            )
            assert num_lines <= MAX_FUNCTION, message


def test_the_story_is_short():
    num_lines = len((ROOT / "megatron_sd/trainer.py").read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_TRAINER_LINES, f"trainer.py has {num_lines} lines, at most {MAX_TRAINER_LINES}"


@law(EVERYTHING)
def names_say_what_a_thing_is(path: Path) -> None:
    words = set(path.stem.lower().split("_"))
    assert not words & BAD_FILE_WORDS, (
        f"{where(path)}: name a file after its subject, not {sorted(words & BAD_FILE_WORDS)}"
    )
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(BAD_CLASS_ENDINGS), (
                f"{where(path)}:{node.lineno}: name {node.name} after what it is"
            )


@law(LIBRARY)
def parameters_are_explicit(path: Path) -> None:
    """At most four positional parameters in a public function; **options are never handed on."""
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        place = f"{where(path)}:{node.lineno}: {node.name}"
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        num_positional = len([name for name in names if name not in ("self", "cls", "ctx")])
        if not node.name.startswith("_") and node.name not in FIXED_SIGNATURES and names[:1] != ["ctx"]:
            assert num_positional <= MAX_POSITIONAL, (
                f"{place} has {num_positional} positional parameters: make some keyword-only"
            )
        if node.args.kwarg is not None and node.name not in FIXED_SIGNATURES:
            keywords = [
                keyword for call in ast.walk(node) if isinstance(call, ast.Call) for keyword in call.keywords
            ]
            handed_on = [ast.unparse(keyword.value) for keyword in keywords if keyword.arg is None]
            assert node.args.kwarg.arg not in handed_on, (
                f"{place} hands **{node.args.kwarg.arg} on: name its parameters"
            )


@law([path for path in sources("megatron_sd") if not where(path).startswith(TAKES_ALL)])
def a_room_takes_sections_of_the_configuration(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            whole = [a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Config"]
            assert not whole, (
                f"{where(path)}:{node.lineno}: {node.name} takes the whole Config as {whole[0]}: name the"
                " sections it reads; building/ hands them out"
            )


@law(LIBRARY)
def public_things_have_docstrings(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) or where(path).endswith("__init__.py"), f"{where(path)} has no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    members = [node for parent in classes for node in parent.body]
    for node in (*tree.body, *members):
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            assert ast.get_docstring(node), (
                f"{where(path)}:{node.lineno}: {node.name} is public and has no docstring"
            )


@law([ROOT / "megatron_sd/records.py", *sources("megatron_sd/config")])
def records_are_frozen(path: Path) -> None:
    for node in parse(path).body:
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
        if any(decorator.startswith("dataclass") for decorator in decorators):
            message = f"{where(path)}:{node.lineno}: {node.name} must be frozen"
            assert "dataclass(frozen=True, kw_only=True)" in decorators, message


@law(sorted({path.parent for path in [*LIBRARY, *sources("benchmarks")]}))
def a_folder_has_at_most_12_files(folder: Path) -> None:
    names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(names) <= MAX_FILES, (
        f"{where(folder)} has {len(names)} files, at most {MAX_FILES}: give some a room of their own"
    )


def test_no_circles():
    """Imports between files, at their top or inside functions, lead nowhere back."""
    modules = {module_name(path): path for path in LIBRARY}
    arrows = {
        name: {longest_prefix(other, modules) for _, other in imports(path)} for name, path in modules.items()
    }
    for name, others in arrows.items():  # a package's own file re-exports what its parts hold
        others -= {
            None,
            name,
            *(own for own in modules if modules[own].name == "__init__.py" and within(name, own)),
        }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "a circle of imports: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_kernels_is_no_python_package():
    assert not (ROOT / "kernels/__init__.py").exists(), (
        "a package `kernels` shadows Hugging Face's, which transformers imports"
    )


def test_nothing_else_lies_at_the_top():
    """The top level is fixed; a new folder belongs into one that exists."""
    known = {
        *PACKAGES,
        "kernels",
        "benchmarks",
        "results",
        "tests",
        "docs",
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "LICENSE",
    }
    tops = {
        path.name
        for path in ROOT.iterdir()
        if path.suffix in (".py", ".toml", ".cfg") or (path / "__init__.py").exists()
    }
    assert tops <= known, f"unexpected at the top level: {sorted(tops - known)}"


def test_a_public_class_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in LIBRARY:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(where(path))
    repeated = {name: found for name, found in places.items() if len(found) > 1}
    assert repeated == {}, "rename all but one after what it is"


@pytest.mark.parametrize("name", LAWS)
def test_every_file_keeps_the_law(name):
    assert broken(*LAWS[name]) == []


def test_a_breach_is_told_and_no_law_is_about_nothing():
    def is_short(path: Path) -> None:
        assert path.name == "records.py", f"{where(path)} is another"

    assert broken(is_short, [ROOT / "megatron_sd/records.py", ROOT / "setup.py"]) == ["setup.py is another"]
    assert all(files for _, files in LAWS.values())
