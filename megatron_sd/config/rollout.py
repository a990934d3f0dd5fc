"""How rollouts are written, sampled and rewarded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_sd.config.own_function import OwnFunction
from megatron_sd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ToolConfig:
    """A tool beside search (search/tools.py). Its result is shown as passages are."""

    name: str
    function: Literal["calculator", "open_page"] | OwnFunction
    tags: tuple[str, str] | None = None  # around what it is asked; None: <name> and </name>
    # one sentence for the prompt, which also says which tags; empty: the prompt says nothing of it
    description: str = ""
    argument: str = "text"  # what a native call names it (protocol.preset qwen_tools)
    max_calls: int | None = None  # in a rollout; a further call is answered by a message
    timeout_s: float = 10.0
    # where it raises or takes too long: the rollout is no data, or the policy is told
    on_error: Literal["stop", "show"] = "stop"

    @property
    def own_tags(self) -> tuple[str, str]:
        """Those that it has."""
        return self.tags or (f"<{self.name}>", f"</{self.name}>")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The text protocol between policy and environment. `preset` fills every field left at None
    (search/presets.py)."""

    # prompt, tags and texts by name
    preset: Literal["search_r1", "few_shot", "autorefine", "qwen_tools", "compact"] | OwnFunction = (
        "search_r1"
    )
    prompt: str | None = None  # needs {question} and {hindsight}; the student's {hindsight} is empty
    # wrap the prompt as a user message of the tokenizer's chat template; qwen_tools always does
    chat_template: bool = False
    # of the template, as {enable_thinking: false}
    template_arguments: dict[str, bool | int | str] = field(default_factory=dict)
    search_tags: tuple[str, str] | None = None  # around a query
    information_tags: tuple[str, str] | None = None  # around what a search found
    answer_tags: tuple[str, str] | None = None  # around the answer
    think_tags: tuple[str, str] | None = None  # around a thought
    # a span that may come before the thought, where the preset has one (AutoRefine's)
    note_tags: tuple[str, str] | None = None
    passage_format: str | None = None  # fields: {rank} {title} {text}
    # appended when a turn neither searches nor answers; empty string: stop instead
    invalid_action_message: str | None = None
    tools: tuple[ToolConfig, ...] = ()  # beside search; each call takes one of rollout.max_search_turns
    # appended after an answer that another attempt follows (rollout.attempts)
    reflection_message: str | None = None


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """vLLM as the rollout engine. `placement`: process (servers started and ended by the run, on the ranks'
    own nodes), server (already running, on nodes of their own: `sd-search vllm serve` starts one as a run
    needs it) or colocated (in the ranks' processes and on their GPUs; tensor_parallel_size neighbouring
    ranks are one engine, which sleeps while they train)."""

    placement: Literal["process", "server", "colocated"] = "process"
    urls: tuple[str, ...] = ()  # of running servers, such as http://node7:8000
    num_replicas: int = 1  # servers that a node of the run starts
    tensor_parallel_size: int = 1  # GPUs of one server or engine
    # GPUs of the node's servers, tensor_parallel_size for each; empty: those that vLLM sees
    devices: tuple[int, ...] = ()
    kv_cache_gib: float | None = None  # of each worker; None: what gpu_memory_share leaves beside the weights
    # of a server's GPU: weights, keys and values, and the copy that a publish of shards stages
    gpu_memory_share: float = 0.85
    # tokens of a block of the KV cache, the unit of reuse; None: vLLM's choice (16; on CPUs 128)
    block_tokens: int | None = None
    threads_per_worker: int = 1  # on CPUs
    # How weights reach the workers. gather: whole tensors through vLLM's loader, as for families without a
    # shard layout; auto:
    # shards for servers, gather for colocated, where a rank and a worker share a GPU.
    publish: Literal["auto", "shards", "gather"] = "auto"
    publish_host: str | None = None  # name under which servers elsewhere reach this node; None: its host name
    start_timeout_s: float = 900.0  # until a server is ready
    request_timeout_s: float = 600.0  # for one completion, or for one bucket of an update

    @property
    def publishes_shards(self) -> bool:
        """Whether workers get their shards, which they stage, instead of whole tensors."""
        return self.publish == "shards" or (self.publish == "auto" and self.placement != "colocated")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How rollouts are sampled. Token limits count the policy's tokenizer's tokens."""

    questions_per_step: int = 256  # of all ranks together
    group_size: int = 5  # rollouts of each question
    # which groups make a step (rollout/collecting.py): all, or those that are right and wrong, or right in a
    # share within keep_range; further questions are asked until there are enough, at most max_resamples times
    keep_groups: Literal["all", "with_spread", "in_range"] = "all"
    keep_range: tuple[float, float] = (0.0, 1.0)  # of in_range: lowest and highest share of right rollouts
    max_resamples: int = 10  # further batches of questions that a step may ask
    temperature: float = 1.0  # of sampling
    # of an attempt, calls of other tools included; one last turn follows, in which a search is not served
    max_search_turns: int = 4
    # answers of a rollout: after each but the last it is asked, in the same context, to look at its answer again
    attempts: int = 1
    max_turn_tokens: int = 500  # that the policy samples in a turn
    max_observation_tokens: int = 512  # that a search or a tool adds
    max_query_bytes: int = 4096  # a longer query is cut, with the corpus in process as with servers
    max_rollout_tokens: int = 4096  # prompt, completions and observations
    # the run stops when more of a rank's rollouts of a step failed for infrastructure reasons
    max_failed_share: float = 0.2
    # Finished rollouts of an unfinished step wait in run_dir/bank for the run's next start. whole: used
    # only when a rank's part
    # of the step is complete, so that the embedded engine repeats it bit for bit; auto: whole with that
    # engine, else all.
    bank: Literal["auto", "all", "whole", "off"] = "auto"
    # steps that sampling may be behind: 1 rolls out the next batch during the update; from 2 on a step
    # takes the groups that end first, and carries the others over (rollout/carrying.py)
    max_lag: Literal[0, 1, 2, 3, 4] = 0
    engine: Literal["torch", "vllm"] = "torch"  # embedded in the ranks, or vLLM
    max_concurrent_sequences: int = 256  # in the engine at one time; further rollouts wait
    vllm: VllmConfig = field(default_factory=VllmConfig)

    @property
    def question_batches(self) -> int:
        """Batches of questions that a step may ask."""
        return 1 if self.keep_groups == "all" else 1 + self.max_resamples

    @property
    def most_sampled_tokens(self) -> int:
        """What a rollout may sample at most, all turns together."""
        turns = self.attempts * (self.max_search_turns + 1)
        return min(self.max_turn_tokens * turns, self.max_rollout_tokens)


_JUDGE_PROMPT = (
    "Question: {question}\nAccepted answers: {golden_answers}\nGiven answer: {answer}\n\nDoes the given answer mean"
    " the same as an accepted answer? Reply with one word, yes or no."
)
_JUDGE_PLACES = ("{question}", "{golden_answers}", "{answer}")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A language model that says whether an answer is right (search/rewards/judge.py). prompt: needs {question},
    {golden_answers} (one a line) and {answer}."""

    url: str  # of the server, without /v1/chat/completions
    model: str  # its name there
    prompt: str = _JUDGE_PROMPT  # the one message that it is sent
    key_file: str | None = None  # holds the server's API key
    deadline_s: float = 60.0  # of one request
    tries: int = 3  # of one answer
    max_concurrent: int = 16  # requests at one time
    max_tokens: int = 256  # of a reply, thoughts included

    def __post_init__(self) -> None:
        missing = [place for place in _JUDGE_PLACES if place not in self.prompt]
        if missing:
            raise ConfigError(
                f"judge.prompt: found none of {', '.join(missing)}, expected {', '.join(_JUDGE_PLACES)}"
            )


@dataclass(frozen=True, kw_only=True)
class RewardJudgeConfig(JudgeConfig):
    """A judge whose verdicts are rewards: what it said is kept, so that a run that goes on has the same ones."""

    store: str  # a JSONL file of what was judged; ranks and runs share it
    # of a step's answers: those without a verdict are no data; with more the run is saved and ends
    max_failed_share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a rollout earns. plain: answer score (+ format_weight if the rollout's form is valid);
    structured: Search-R1's reward with structure. Less what a rollout near overlong_limit sampled tokens
    loses (DAPO)."""

    # how an answer is compared with the golds; judge: by a language model
    answer: Literal["em", "f1", "sub_em", "judge"] | OwnFunction = "f1"
    judge: RewardJudgeConfig | None = None  # asked of every answer, also where another score is the reward
    # scores of your own, by name: figures of training and evaluation, and terms of advantage.terms
    own: dict[str, OwnFunction] = field(default_factory=dict)
    normalization: Literal["search_r1", "strict"] = "search_r1"  # of both, before they are compared
    format_weight: float = 0.0  # of plain
    # search/rewards/shapes.py; all but the first two have their own numbers
    shape: Literal["plain", "structured", "r1_searcher", "r1_searcher_first", "research", "autorefine"] = (
        "plain"
    )
    structure: float = 0.2  # of structured: a valid form without an exact match, and what a broken one loses
    final: float = 0.1  # of structured: a wrong answer in a broken form
    retrieval: float = 0.0  # of structured: a gold answer was found, in a valid form
    overlong_limit: int = 0  # sampled tokens at which a rollout loses 1
    overlong_buffer: int = 0  # over how many tokens before that the loss grows; 0: none

    def __post_init__(self) -> None:
        if self.answer == "judge" and self.judge is None:
            raise ConfigError(
                "reward.answer: found judge without reward.judge, expected its url, model and store"
            )
