import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_sd.errors import ConfigError, DataError
from megatron_sd.search.chat_template import ChatArguments
from megatron_sd.search.tokens import TextCodec, load_codec
from tests.rollout.fakes import byte_fallback_tokenizer, byte_level_tokenizer, codec


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_bytes_of_encoded_text_are_its_utf8(text):
    text = text.encode("utf-8", "ignore").decode()
    assert codec().bytes_of(codec().encode(text)) == text.encode("utf-8")
    assert codec().decode(codec().encode(text)) == text


@given(
    st.lists(
        st.sampled_from(["<|endoftext|>", "<|im_end|>", "<tool_call>", "<tool", "_call>", " a", "<|", "é"])
    )
)
@settings(max_examples=80, deadline=None)
def test_plain_text_never_becomes_a_control_id(parts):
    assert codec().control_ids.isdisjoint(codec().encode("".join(parts)))


def test_added_tokens_read_as_their_text_and_agree_with_the_tokenizer_elsewhere():
    tokenizer = byte_level_tokenizer()
    own = TextCodec(tokenizer)
    assert tokenizer("a<tool_call>", add_special_tokens=False).input_ids[-1] in own.control_ids
    assert own.bytes_of([1, tokenizer.convert_tokens_to_ids("<tool_call>")]) == b"<|im_end|><tool_call>"
    assert own.control_strings == ("<tool_call>", "<|endoftext|>", "<|im_end|>")
    assert own.eos_ids == {0}
    text = "mayor of Lyon? </search> 漢"
    assert list(own.encode(text)) == tokenizer(text, add_special_tokens=False).input_ids


def test_ids_beyond_the_vocabulary_have_no_bytes():
    assert codec().bytes_of([10_000, 5]) == codec().bytes_of([5])
    assert codec().offsets([10_000, 5]) == [0, 0, len(codec().bytes_of([5]))]


def test_byte_fallback_vocabulary():
    own = TextCodec(byte_fallback_tokenizer())
    text = "a search é漢 </s>"
    assert own.bytes_of(own.encode(text)) == text.encode("utf-8")
    assert own.control_ids == {0, 1, 2} and own.control_ids.isdisjoint(own.encode(text))


def test_prompt_gets_what_the_tokenizer_puts_before_every_text():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_end|> $A <|endoftext|>", special_tokens=[("<|im_end|>", 1), ("<|endoftext|>", 0)]
    )
    own = TextCodec(tokenizer)
    assert own.prompt_ids("mayor") == (1, *own.encode("mayor"))
    assert codec().prompt_ids("mayor") == codec().encode("mayor")


def test_chat_frame_keeps_its_control_ids_and_the_message_gets_none():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}user {{ m.content }}<|im_end|>{% endfor %}assistant "
    own = TextCodec(tokenizer, ChatArguments())
    assert own.prompt_ids("a<|im_end|>") == (
        *own.encode("user "),
        *own.encode("a<|im_end|>"),
        1,
        *own.encode("assistant "),
    )


def test_chat_template_must_exist_and_show_the_message_once():
    with pytest.raises(ConfigError, match="no chat template"):
        TextCodec(byte_level_tokenizer(), ChatArguments())
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[0].content }}"
    with pytest.raises(ConfigError, match="2 times, expected once"):
        TextCodec(tokenizer, ChatArguments())


THINKING = (
    "{% for m in messages %}user {{ m.content }}<|im_end|>{% endfor %}assistant "
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_template_arguments_reach_the_template_and_a_misspelt_one_is_named():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = THINKING
    plain = TextCodec(tokenizer, ChatArguments())
    own = TextCodec(tokenizer, ChatArguments(arguments={"enable_thinking": False}))
    assert plain.decode(plain.prompt_ids("a")) == "user a<|im_end|>assistant "
    assert own.decode(own.prompt_ids("a")) == "user a<|im_end|>assistant <think></think>"
    with pytest.raises(ConfigError, match="reads no enable_thinkin, expected some of .*: enable_thinking$"):
        TextCodec(tokenizer, ChatArguments(arguments={"enable_thinkin": False}))
    with pytest.raises(ConfigError, match="found add_generation_prompt, which rollouts set themselves"):
        TextCodec(tokenizer, ChatArguments(arguments={"add_generation_prompt": False}))


def test_a_template_that_refuses_the_message_is_named():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('a system message first') }}"
    with pytest.raises(ConfigError, match="refuses a user's message .*a system message first"):
        TextCodec(tokenizer, ChatArguments())


def test_our_own_text_is_cut_at_the_longest_added_token_and_takes_its_spaces_along():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<a>", "<a><b>", AddedToken("<c>", lstrip=True, rstrip=True)])
    own = TextCodec(tokenizer)
    a, ab, c = (tokenizer.convert_tokens_to_ids(text) for text in ("<a>", "<a><b>", "<c>"))
    text = "mayor<a><b> of <c>  <a>{name} "
    assert own.encode_own(text) == (
        *own.encode("mayor"),
        ab,
        *own.encode(" of"),
        c,
        a,
        *own.encode("{name} "),
    )
    assert list(own.encode_own(text)) == tokenizer(text, add_special_tokens=False).input_ids
    assert own.encode_own("{name}", {"name": "<a>"}) == own.encode("<a>")
    assert own.encode_own("") == ()


def test_tokenizer_that_leaks_control_ids_is_refused():
    """A Unigram vocabulary may hold `</s>` as an ordinary piece: plain text would forge it."""
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *((c, -2.0) for c in "</s>ab▁")], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match="</s>"):
        TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


def test_unreadable_vocabulary_is_refused():
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        ["a b"], trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    )
    with pytest.raises(DataError, match="raw bytes"):
        TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_codec_of_a_directory(tmp_path):
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert load_codec(str(tmp_path)).encode("mayor") == codec().encode("mayor")
    with pytest.raises(
        DataError, match="model.path: found no directory at .*absent, expected a local Hugging Face"
    ):
        load_codec(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer in .*empty"):
        load_codec(str(tmp_path / "empty"))
