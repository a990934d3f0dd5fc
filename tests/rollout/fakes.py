"""A tiny tokenizer and tiny models (real ones, trained or initialised on the spot), a scripted engine and
retrievers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_sd.config import ProtocolConfig, RolloutConfig
from megatron_sd.errors import RetrievalError
from megatron_sd.records import Hit
from megatron_sd.rollout.embedded.engine import TorchEngine
from megatron_sd.rollout.engine import Completion, GenerationRequest
from megatron_sd.search.environment import Environment
from megatron_sd.search.protocol_choice import build_protocol
from megatron_sd.search.tokens import TextCodec
from tests.builders import hit

TEXTS = [
    "<think>I need the mayor of Lyon.</think> <search> mayor of Lyon </search>",
    "<information>Doc 1(Title: Lyon) The mayor is someone. </information>",
    "<answer> someone </answer> Question: who is it? >< </ <s <a é 漢字 🙂",
]


def byte_level_tokenizer(
    texts: Sequence[str] = TEXTS, vocab_size: int = 420, use_regex: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen's, with two special tokens and one added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts) * 2, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE with byte fallback, as Llama 2's."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(set("".join(TEXTS)) - set("é漢字🙂 ")) + ["▁"]
    vocabulary = {
        t: n for n, t in enumerate([*specials, *(f"<0x{b:02X}>" for b in range(256)), *letters, "▁a", "se"])
    }
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("s", "e")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@cache
def codec() -> TextCodec:
    return TextCodec(byte_level_tokenizer())


def environment(protocol: ProtocolConfig | None = None, **limits: object) -> Environment:
    limits = {
        "group_size": 2,
        "max_search_turns": 2,
        "max_turn_tokens": 60,
        "max_observation_tokens": 80,
        **limits,
    }
    return Environment(
        codec(), build_protocol(protocol or ProtocolConfig(preset="compact")), RolloutConfig(**limits)
    )


SHAPE = {
    "vocab_size": 448,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def _but(options: dict, *names: str) -> dict:
    return {name: value for name, value in options.items() if name not in names}


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2-tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2-untied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, num_key_value_heads=4, tie_word_embeddings=False)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    ),
    # one key-value head for all, and no attention interface; keys and values of different widths
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(
            **_but(SHAPE, "intermediate_size", "max_position_embeddings"),
            multi_query=True,
            alibi=False,
            bos_token_id=0,
        )
    ),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SHAPE,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            n_shared_experts=1,
            first_k_dense_replace=1,
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, tie_word_embeddings=False)),
}


def model(kind: str = "qwen2-tied", seed: int = 0, scale: float = 8.0) -> PreTrainedModel:
    """A tiny model whose weights are blown up, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    made = KINDS[kind]()
    made.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
    return made.eval()


def engine(kind: str = "qwen2-tied", max_rows: int = 32, **options) -> TorchEngine:
    return TorchEngine(model(kind), codec(), max_rows=max_rows, **options)


def request(name: str = "a", prompt: Sequence[int] = (5, 6, 7), **changes) -> GenerationRequest:
    own = GenerationRequest(
        session=name, prompt_ids=tuple(prompt), max_new_tokens=12, temperature=1.0, seed=3, stop=()
    )
    return replace(own, **changes)


def serve(own: TorchEngine, *requests: GenerationRequest) -> list[Completion]:
    """All requests at once, every session released afterwards."""

    async def run():
        completions = await asyncio.gather(*(own.generate(r) for r in requests))
        for r in requests:
            own.release(r.session)
        return completions

    return asyncio.run(run())


def full_forward_logprobs(
    kind: str, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0
) -> np.ndarray:
    """Log-probabilities of `ids` after `prompt` from one plain transformers forward pass without any
    cache."""
    with torch.no_grad():
        logits = model(kind)(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


def record_feeds(own: TorchEngine) -> list[np.ndarray]:
    """The `valid` array of every forward pass from here on: True for each token that is computed."""
    fed = []
    forward = own._decoder._forward

    def recorded(store, step, ids):
        fed.append(step.valid)
        return forward(store, step, ids)

    own._decoder._forward = recorded
    return fed


class ScriptedEngine:
    """Answers each request with the next text of its session's script (the part of the name after the last
    comma)."""

    def __init__(self, scripts: dict[str, Sequence[str]]):
        self.policy_version = 7
        self.requests: list[GenerationRequest] = []
        self.released: list[str] = []
        self.moods: list[str] = []
        self._scripts = {name: iter(script) for name, script in scripts.items()}

    async def generate(self, request: GenerationRequest) -> Completion:
        self.requests.append(request)
        await asyncio.sleep(0)
        text = next(self._scripts[request.session.rpartition(", ")[2]])
        ids = codec().encode(text)[: request.max_new_tokens]
        whole = any(codec().decode(ids).endswith(stop) for stop in request.stop)
        return Completion(
            ids=ids, logprobs=(-0.5,) * len(ids), finish="stop" if whole else "length", policy_version=7
        )

    def wake(self) -> None:
        self.moods.append("wakes")

    def sleep(self) -> None:
        self.moods.append("sleeps")

    def release(self, session: str) -> None:
        self.released.append(session)


class InlineRetriever:
    """Answers at once with one passage that repeats the query."""

    corpus_version = "fake"

    def __init__(self, text: str = "about {query}", fails_on: str | None = None):
        self.queries: list[str] = []
        self._text = text
        self._fails_on = fails_on

    async def search(self, queries: Sequence[str], top_k: int) -> list[tuple[Hit, ...]]:
        self.queries.extend(queries)
        if self._fails_on is not None and any(self._fails_on in query for query in queries):
            raise RetrievalError("the fake retriever is down")
        return [
            tuple(hit(f"p{n}", text=self._text.replace("{query}", query)) for n in range(top_k))
            for query in queries
        ]
