"""`sd-search completion bash|zsh`: a script that completes commands, options and the names they choose from.

It is written from the records of parameters, and asks nothing of the program when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from launch.cli import COMMANDS
from megatron_sd.config.command_line import choices_of
from megatron_sd.errors import ConfigError

RUN, SFT = "megatron_sd.config:Config", "megatron_sd.sft_config:SftConfig"
RANKS = "--num-ranks"
# What each command takes: records ("module:class"), and further options as they are typed.
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "demo": ("launch.demo:DemoConfig",),
    "train": (RUN, RANKS, "--as", "--list"),
    "eval": ("eval.run:EvalConfig",),
    "compare": ("eval.compare:CompareConfig",),
    "report": ("eval.report:ReportConfig",),
    "watch": ("eval.watch.command:WatchConfig",),
    "credit": ("eval.credit.main:CreditConfig", RANKS),
    "version": (),
    "completion": (),
    "push": ("launch.push.command:PushConfig", "--dry-run"),
    "world": ("data_prep.world.world:WorldConfig",),
    "coldstart": ("data_prep.world.coldstart:ColdstartConfig",),
    "launch": ("launch.cluster.layout:LayoutConfig", RUN, "--recipe", "--layout", "--dry-run"),
    "plan": ("launch.planner.estimate:PlanConfig", RUN, "--this-machine"),
    "doctor": ("launch.doctor.checks:DoctorConfig",),
    "reshard-plan": ("launch.planner.reshard_plan:ReshardPlanConfig",),
    "grid": ("eval.grid.plan:GridConfig",),
    "sample": ("eval.sample:SampleConfig", RANKS),
    "select": ("data_prep.episodes.select:SelectConfig",),
    "sft": (SFT, RANKS),
    "recipe": ("launch.recipe:RecipeConfig", RUN),
    "gate": ("eval.gate.command:GateConfig", RANKS),
    "vllm serve": (RUN, "--host", "--port", "--cpu"),
    "data import": ("data_prep.sources.questions:ImportConfig",),
    "data chunk": ("data_prep.passages.chunk:ChunkConfig",),
    "data encode": ("data_prep.vectors.encode:EncodeConfig",),
    "data import-index": ("data_prep.vectors.import_index:ImportIndexConfig",),
    "data build": ("data_prep.passages.build:BuildConfig",),
    "data index": ("data_prep.passages.index:IndexConfig",),
    "data verify": ("data_prep.passages.inspect:InfoConfig",),
    "data info": ("data_prep.passages.inspect:InfoConfig",),
    "data plan": ("data_prep.passages.index_sizes:IndexSizesConfig",),
    "data upload": ("data_prep.upload.source:UploadConfig",),
    "data recall": ("eval.retrieval:RetrievalConfig",),
    "retriever serve": ("launch.retriever:ServeConfig",),
}
HEADS = {
    "bash": "# bash completion of sd-search, written by `sd-search completion bash`",
    "zsh": "#compdef sd-search\n# written by `sd-search completion zsh`\n"
    "autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit",
}
# A word after `--key` or `--key=` (which bash cuts in three) is a value; others are options, then files.
BODY = """\
_sd_search() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" key="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" words=""
    if [ "$current" = "=" ]; then current=""
    elif [ "$key" = "=" ]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
    case "$command" in {families}) command="$command ${{COMP_WORDS[2]}}" ;; esac
    case "$COMP_CWORD:$command" in
    1:*) words="{firsts}" ;;
{seconds}
    *)
        case "$command:$key" in
{values}
        *) [ "${{current#-}}" = "$current" ] || case "$command" in
{options}
        esac ;;
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -o bashdefault -F _sd_search sd-search
"""


def main(argv: Sequence[str]) -> None:
    """The command line."""
    if len(argv) != 1 or argv[0] not in HEADS:
        raise ConfigError(
            f"completion: found {' '.join(argv) or 'nothing'}, expected bash or zsh; then source what is"
            " printed"
        )
    print(script(argv[0]), end="")


def script(shell: str) -> str:
    """The whole script."""
    firsts = list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    families: dict[str, list[str]] = {}
    for family, second in (name.split() for name in COMMANDS if " " in name):
        families.setdefault(family, []).append(second)
    values: dict[str, list[str]] = {'"completion:completion"': list(HEADS)}
    options: dict[str, list[str]] = {}
    for name in COMMANDS:
        known = options_of(name)
        options[f'"{name}"'] = [*known, "--help"]
        for option, choices in known.items():
            if choices:
                values[f'"{name}:{option}"'] = list(choices)
    seconds = {f'2:"{family} "*': own for family, own in families.items()}
    body = BODY.format(
        families="|".join(families),
        firsts=" ".join([*firsts, "--help", "--version"]),
        seconds=_cases(seconds),
        values=_cases(values),
        options=_cases(options),
    )
    return f"{HEADS[shell]}\n{body}"


def options_of(command: str) -> dict[str, tuple[str, ...]]:
    """The options of a command as they are typed, and what each may be chosen from, if that is a list."""
    known: dict[str, tuple[str, ...]] = {}
    for own in OPTIONS[command]:
        if own.startswith("--"):
            known[own] = ()
            continue
        module, record = own.split(":")
        found = choices_of(getattr(importlib.import_module(module), record))
        known |= {"--config": ()} | {f"--{key}": choices for key, choices in found.items()}
    return known


def _cases(words: Mapping[str, Sequence[str]]) -> str:
    """Patterns that offer the same words share a line."""
    patterns: dict[str, list[str]] = {}
    for pattern, own in words.items():
        patterns.setdefault(" ".join(own), []).append(pattern)
    return "\n".join(f'        {"|".join(own)}) words="{offered}" ;;' for offered, own in patterns.items())
