import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.world.coldstart import ColdstartConfig, build_tokenizer
from data_prep.world.demonstrations import DemonstratorConfig, make_demonstration
from data_prep.world.small_qwen import SmallQwenShape, build_model
from data_prep.world.tokenizer import save_tokenizer, train_tokenizer
from megatron_sd.search.presets import PRESETS

TINY = SmallQwenShape(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(ColdstartConfig())


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_can_straddle_a_tag(tmp_path):
    tokenizer = train_tokenizer(["<search>scholar Kalo</search>"] * 5, vocab_size=400)
    pieces = [tokenizer.decode([i]) for i in ids_of(tokenizer, "<search>scholar Kalo</search>")]
    assert ">scholar" in pieces, "one token holds the end of the tag and the start of the query"
    assert not set(tokenizer.all_special_tokens) & set(pieces)


def test_tags_are_ordinary_text_and_a_name_has_the_same_tokens_everywhere(tokenizer):
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<|pad|>"]
    name = ids_of(tokenizer, " Kalo Baren")
    assert len(name) == 2
    texts = (
        "<search> scholar Kalo Baren mentor</search>",
        " The mentor of scholar Kalo Baren is sailor Dira Gotam.\n",
        " sailor Dira Gotam met scholar Kalo Baren.\n",
        "<answer> Kalo Baren</answer>",
        'Attempt 1 (CORRECT): "scholar Kalo Baren mentor"\n',
        "Question: Who is the heir of scholar Kalo Baren?\n",
    )
    for text in texts:
        ids = ids_of(tokenizer, text)
        assert any(ids[i : i + 2] == name for i in range(len(ids)))


def test_auto_tokenizer_reads_the_saved_tokenizer_as_it_was(tokenizer, tmp_path):
    """transformers replaces the cutting rules of a Qwen2 model's tokenizer by its own."""
    save_tokenizer(tokenizer, tmp_path)
    build_model(TINY, vocab_size=len(tokenizer), seed=0).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(5):
        for _, text in make_demonstration("natural", PRESETS["compact"], DemonstratorConfig(), rng).segments:
            assert ids_of(loaded, text) == ids_of(tokenizer, text)
    assert (
        (loaded.eos_token_id, loaded.pad_token_id)
        == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        == (0, 1)
    )


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=40))
def test_any_text_survives_up_to_unicode_composition(tokenizer, text):
    text = text.replace("<|endoftext|>", "").replace("<|pad|>", "")
    assert tokenizer.decode(ids_of(tokenizer, text)) == unicodedata.normalize("NFC", text)
