"""`sd-search push`: a model directory to the Hugging Face Hub, with a card written from the run's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from launch.push.card import write_card
from launch.push.facts import read_facts, read_reports
from launch.push.source import CARD_NAME, PushedModel, find_model, verify
from megatron_sd.config.command_line import name_positionals, parse
from megatron_sd.errors import ConfigError, MegatronSdError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload `model` (a model directory, a checkpoint, or a run, of which the newest checkpoint is taken) to
    `repo` on the Hugging Face Hub, with a card written from the run's records."""

    model: str  # what to upload
    repo: str  # owner/name; created when it is not there
    private: bool = False  # nobody else may read it
    dry_run: bool = False  # print files, sizes and card; send nothing
    license: str | None = None  # as the Hub spells it, such as apache-2.0; None: the card says unknown
    base_model: str | None = None  # its name on the Hub, such as Qwen/Qwen2.5-3B
    evaluations: tuple[str, ...] = ()  # directories of `sd-search eval`, beside those under the run
    message: str = "Upload by sd-search push"  # of the commit


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What is sent. card: the text of README.md; None where the directory has one of its own."""

    model: PushedModel
    card: str | None
    left_out: tuple[str, ...]  # evaluations of other weights

    def lines(self) -> list[str]:
        """Files and sizes, for people."""
        files = {
            str(path.relative_to(self.model.directory)): path.stat().st_size for path in self.model.files
        }
        if self.card is not None:
            files[CARD_NAME] = len(self.card.encode())
        total = f"{len(files)} files, {sum(files.values()):,} bytes"
        return [*(f"{size:>15,}  {name}" for name, size in sorted(files.items())), total]


def main(argv: Sequence[str]) -> None:
    """The command line. Raises ConfigError without a token, before anything is read."""
    words = ["--dry_run" + word[9:] if word.startswith("--dry-run") else word for word in argv]
    config = parse(PushConfig, name_positionals(words, ("model",)), "sd-search push")
    check_repo(config.repo)
    api = None if config.dry_run else HfApi(token=token())
    upload = prepare(config)
    print("\n".join(upload.lines()))
    for name in upload.left_out:
        print(f"left out: {name}, an evaluation of other weights")
    if api is None:
        print(f"\n{CARD_NAME}: {upload.card or 'the one in the directory'}\nnothing was sent: --dry-run")
        return
    print(send(api, config, upload))


def token() -> str:
    """The user's. Raises ConfigError where there is none."""
    found = get_token()
    if found is None:
        raise ConfigError(
            "push: found no token for the Hugging Face Hub, expected one with the right to write: `hf auth"
            " login`, or HF_TOKEN in the environment; --dry-run needs none"
        )
    return found


def check_repo(repo: str) -> None:
    """Raise ConfigError for what is no owner/name."""
    try:
        validate_repo_id(repo)
        is_whole = repo.count("/") == 1
    except HFValidationError:
        is_whole = False
    if not is_whole:
        raise ConfigError(f"--repo: found {repo!r}, expected owner/name, such as me/qwen2.5-3b-sd-search")


def prepare(config: PushConfig) -> Upload:
    """Verify the model and write its card. Raises DataError."""
    model = find_model(Path(config.model))
    verify(model)
    if (model.directory / CARD_NAME).is_file():
        return Upload(model=model, card=None, left_out=())
    reports, others = read_reports(model, config.evaluations)
    card = write_card(
        read_facts(model),
        reports,
        name=config.repo.split("/")[1],
        license_name=config.license,
        base_model=config.base_model,
    )
    return Upload(model=model, card=card, left_out=tuple(others))


def send(api: HfApi, config: PushConfig, upload: Upload) -> str:
    """One commit of all files; its address. Raises ConfigError for a repository that is public although
    --private was asked for, MegatronSdError for what the Hub refuses."""
    operations = [
        CommitOperationAdd(path_in_repo=str(path.relative_to(upload.model.directory)), path_or_fileobj=path)
        for path in upload.model.files
    ]
    if upload.card is not None:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=upload.card.encode()))
    try:
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        if config.private and not api.model_info(config.repo).private:
            raise ConfigError(
                f"--private: {config.repo} exists and is public; nothing was sent: make it private in its"
                " settings, or choose another --repo"
            )
        return api.create_commit(config.repo, operations, commit_message=config.message).commit_url
    except (HfHubHTTPError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())
        raise MegatronSdError(
            f"push: the Hub refused, or could not be reached ({reason}); expected a token that may write to"
            f" {config.repo}, and a network: nothing is committed there; the same command begins again"
        ) from error
