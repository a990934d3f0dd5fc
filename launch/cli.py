"""`sd-search`: the one command. Each subcommand is a program with a frozen dataclass of parameters."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.local import choose_accelerator
from megatron_sd.door import DONE_EXIT_CODE, FAILED_EXIT_CODE, INTERRUPTED_EXIT_CODE, USAGE_EXIT_CODE
from megatron_sd.errors import ConfigError, MegatronSdError


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: where its entry function lives (imported only when it runs) and one line of help."""

    entry: str  # "module:function"; the function takes argv
    help: str

    def load(self) -> Callable[[Sequence[str]], None]:
        """Import the entry function."""
        module, function = self.entry.split(":")
        return getattr(importlib.import_module(module), function)


def _command(entry: str, help_line: str) -> Command:
    return Command(entry=entry, help=help_line)


COMMANDS: dict[str, Command] = {
    "demo": _command(
        "launch.demo:main", "the whole story on a CPU: world, start policy, GRPO against SD-Search, table"
    ),
    "train": _command(
        "launch.local:main",
        "train a policy: --config FILE.yaml [--as METHOD] [--section.key value ...] [--num-ranks N]; --list",
    ),
    "eval": _command(
        "eval.run:main", "evaluate a model directory on a questions file, by the agent or another strategy"
    ),
    "compare": _command("eval.compare:main", "RUN_A RUN_B: do two evaluations of the same questions differ?"),
    "report": _command(
        "eval.report:main", "RUN_DIR: a run or an evaluation as one HTML page: curves, rollouts, blocks"
    ),
    "watch": _command(
        "eval.watch.command:main",
        "RUN_DIR: a page on this machine that follows a run while it trains [--port P]",
    ),
    "credit": _command(
        "launch.local:credit", "what the teacher says of stored queries, and is it right? [--num-ranks N]"
    ),
    "version": _command(
        "launch.shell.version:main", "what is installed here, for a report of a problem; also --version"
    ),
    "completion": _command(
        "launch.shell.completion:main", "bash or zsh: print a script that completes commands and options"
    ),
    "push": _command(
        "launch.push.command:main",
        "MODEL --repo OWNER/NAME: a checkpoint's model to the Hugging Face Hub, with a card [--dry-run]",
    ),
    "world": _command("launch.programs:world", "write the synthetic multi-hop world and its BM25 corpus"),
    "coldstart": _command(
        "launch.programs:coldstart", "train the small start policy on mediocre demonstrations"
    ),
    "launch": _command(
        "launch.cluster.start:main",
        "a run here, on machines or in SLURM: --recipe NAME or --program sft [--dry-run]",
    ),
    "plan": _command(
        "launch.planner.estimate:main", "what a run will take: memory, tokens, seconds [--program sft]"
    ),
    "doctor": _command(
        "launch.doctor.checks:main", "check nodes before a run, in two minutes; names the host at fault"
    ),
    "reshard-plan": _command(
        "launch.planner.reshard_plan:main", "what publishing a model to inference workers moves"
    ),
    "grid": _command(
        "eval.grid.main:main",
        "arms x start policies x seeds from one YAML, resumable; paired tables and plots",
    ),
    "sample": _command(
        "launch.local:sample",
        "rollouts of a model by any strategy into a file, with pass rates [--num-ranks N]",
    ),
    "select": _command(
        "data_prep.episodes.select:main", "training episodes of right rollouts, with and without blocks"
    ),
    "sft": _command(
        "launch.local:sft", "warm a model up on selected episodes, by their likelihood [--num-ranks N]"
    ),
    "recipe": _command(
        "launch.recipe:main", "NAME: sample, select, sft, gate and train in one command, resumable"
    ),
    "gate": _command(
        "launch.local:gate", "does the start policy read hindsight blocks? controls included [--num-ranks N]"
    ),
    "vllm serve": _command(
        "launch.serve:main", "a vLLM server as a run needs it: --config FILE.yaml [--host H --port P --cpu]"
    ),
    "data import": _command(
        "launch.data:import_", "convert questions or passages of public formats to the project's"
    ),
    "data chunk": _command(
        "launch.data:chunk", "cut long passages into windows of words, sentences or tokens"
    ),
    "data encode": _command(
        "launch.data:encode", "passages to vectors with a local encoder; resumes where it was killed"
    ),
    "data import-index": _command(
        "launch.data:import_index",
        "take the vectors of a FAISS index over (Search-R1's e5_Flat.index) instead of encoding",
    ),
    "data build": _command(
        "launch.data:build",
        "a file or folder of passages to a corpus, all parts in one command; says what it takes [--serve true]",
    ),
    "data index": _command("launch.data:index", "build a corpus directory: passages, BM25, vectors"),
    "data verify": _command(
        "launch.data:verify", "check every file of a prepared directory against its manifest"
    ),
    "data info": _command("launch.data:info", "verify a prepared directory and print its manifest"),
    "data plan": _command(
        "launch.data:plan", "memory, disk, build time and speed of each index for a corpus of some size"
    ),
    "data upload": _command(
        "launch.data:upload", "fill Qdrant or OpenSearch with passages and their vectors"
    ),
    "data recall": _command(
        "launch.data:recall", "supporting-passage recall of a corpus on a questions file"
    ),
    "retriever serve": _command(
        "launch.retriever:main", "serve a corpus directory over HTTP (Search-R1's /retrieve)"
    ),
}


def usage() -> str:
    """The text of `sd-search --help`."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return (
        "usage: sd-search COMMAND [options]   (sd-search COMMAND --help lists its options)\n\n"
        + "\n".join(lines)
    )


def find(argv: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that argv names and the arguments left for it. Raises ConfigError for an unknown one."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return COMMANDS[name], list(argv[words:])
    given = " ".join(word for word in argv[:2] if not word.startswith("-")) or argv[0]
    family = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    close = difflib.get_close_matches(given, COMMANDS, n=1) or difflib.get_close_matches(
        argv[0], COMMANDS, n=1
    )
    if close and given not in {name.split()[0] for name in COMMANDS}:
        hint = f"did you mean `sd-search {close[0]}`?"
    else:
        hint = f"expected one of {', '.join(family or COMMANDS)};"
    raise ConfigError(f"unknown command {given!r}; {hint} `sd-search --help` says what each does")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of ours end in one line on stderr, exit code 2 for a usage error and 1
    otherwise."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return DONE_EXIT_CODE
    choose_accelerator()
    if argv[0] == "--version":
        argv[0] = "version"
    try:
        command, rest = find(argv)
        command.load()(rest)
    except ConfigError as error:
        print(f"sd-search: {error}", file=sys.stderr)
        return USAGE_EXIT_CODE
    except MegatronSdError as error:
        print(f"sd-search: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED_EXIT_CODE
    # a full disk, a directory that is a file, a missing permission: the system's words name the path
    except OSError as error:
        print(
            f"sd-search: {error}; expected to read or write there: free the path or choose another",
            file=sys.stderr,
        )
        return FAILED_EXIT_CODE
    except KeyboardInterrupt:
        print(
            "sd-search: interrupted; a training run goes on from its last checkpoint with the same command",
            file=sys.stderr,
        )
        return INTERRUPTED_EXIT_CODE
    return DONE_EXIT_CODE


if __name__ == "__main__":
    raise SystemExit(main())
