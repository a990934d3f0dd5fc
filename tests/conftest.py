"""The order of files: several processes share them, and the last to begin should be short."""

LONGEST_FIRST = (
    "tests/slurm/test_requeue.py",
    "tests/whole_runs/test_training.py",
    "tests/eval/test_acceptance.py",
    "tests/whole_runs/test_presets.py",
    "tests/slurm/test_real_training.py",
    "tests/launch/test_launch_nodes.py",
    "tests/whole_runs/",
    "tests/test_packaging.py",
    "tests/slurm/",
    "tests/launch/test_plan.py",
    "tests/launch/test_launch_sft.py",
    "tests/algorithm/test_variants.py",
    "tests/eval/test_gate.py",
    "tests/eval/test_grid.py",
    "tests/launch/test_recipe.py",
    "tests/training/",
    "tests/resharding/",
    "tests/eval/",
    "tests/launch/",
    "tests/data_prep/",
    "tests/world/",
)


def place(file: str) -> int:
    """Of a file among the others."""
    return next((i for i, start in enumerate(LONGEST_FIRST) if file.startswith(start)), len(LONGEST_FIRST))


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: place(item.nodeid))
