"""Token ids against transformers and sentencepiece, over strings of many kinds."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mixattn.models.gguf import GgufFile
from mixattn.models.gguf_tokenizer import gguf_tokenizer
from mixattn.models.loader import LoadedModel
from mixattn.models.tokenizer import Tokenizer, add_bos_eos, byte_tokenizer, tokenizer_from_folder
from tests.models.gguf_files import add_byte_level_tokenizer, byte_vocabulary
from tests.models.texts import texts

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "<s>")
STRINGS = texts(1000, seed=1, special_tokens=SPECIAL_TOKENS)
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def published_tokenizer(smollm2_reference_tokenizer: Any) -> Backend:
    """transformers' tokenizer of the smollm2 file, cutting words as the model's own tokenizer.json does.

    transformers knows no rule for ``tokenizer.ggml.pre`` smollm and takes GPT-2's, without "every digit alone" first.
    """
    backend = Backend.from_str(smollm2_reference_tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def test_ids_of_1000_strings_equal_transformers(smollm2: LoadedModel, published_tokenizer: Backend) -> None:
    assert len(set(STRINGS)) == 1000
    for text in STRINGS:
        assert smollm2.tokenizer.encode(text) == published_tokenizer.encode(text).ids, repr(text)


def is_cut_alike_by_gpt2(text: str) -> bool:
    """Whether no digit takes the last of several spaces to its word, and none is made of several bytes."""
    return not any(
        unicodedata.category(char).startswith("N") and (not char.isascii() or text[max(idx - 2, 0) : idx].isspace())
        for idx, char in enumerate(text)
    )


def test_ids_equal_transformers_own_rule_where_every_digit_alone_makes_no_difference(
    smollm2: LoadedModel, smollm2_reference_tokenizer: Any
) -> None:
    alike = [text for text in STRINGS if is_cut_alike_by_gpt2(text)]
    assert 400 < len(alike) < 1000
    for text in alike:
        assert smollm2.tokenizer.encode(text) == smollm2_reference_tokenizer.encode(text), repr(text)


def test_decode_equals_transformers_and_gives_the_text_back(smollm2: LoadedModel, published_tokenizer: Backend) -> None:
    tokenizer = smollm2.tokenizer
    num_exact = 0
    for text in STRINGS:
        ids = tokenizer.encode(text)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == published_tokenizer.decode(ids, skip_special_tokens=skip), repr(text)
        num_exact += tokenizer.decode(ids, skip_special_tokens=False) == text
    assert num_exact > 900  # the vocabulary lacks 21 of the 256 bytes: no tokenizer of it keeps those


def test_decode_stream_gives_the_text_of_decode(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    for text in ("Hello, wörld! 😀👩‍👩‍👧‍👦 123", "<|im_start|>user\nhi<|im_end|>", "你好，世界"):
        ids = tokenizer.encode(text)
        stream = tokenizer.decode_stream(skip_special_tokens=False)
        pieces = [stream.step(tokenizer.backend, token_id) or "" for token_id in ids]
        assert "".join(pieces) == text


def test_special_tokens_and_eos_of_smollm2(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.vocab_size == smollm2.config.vocab_size == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert smollm2.config.eos_token_ids == {2}
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)  # add_bos_token is false
    assert tokenizer.decode([2, 81], skip_special_tokens=True) == tokenizer.decode([81])


def test_encode_half_a_surrogate_pair_is_a_unicode_error(smollm2: LoadedModel) -> None:
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        smollm2.tokenizer.encode("a\ud800b")


# --- GGUF: byte-level rules -------------------------------------------------------------------------------------------

TRAINING_TEXT = [Path(__file__).read_text(encoding="utf-8"), *texts(300, seed=2)]


def trained_merges(pre_tokenizer: Any) -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE of 700 tokens trained on words cut by this rule."""
    from tokenizers import models, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    learned = json.loads(backend.to_str())["model"]["merges"]
    tokens, _ = byte_vocabulary()
    tokens += ["".join(pair) for pair in learned]
    return tokens, [" ".join(pair) for pair in learned]


def write_byte_level(path: Path, **options: Any) -> GgufFile:
    writer = gguf.GGUFWriter(str(path), "llama")
    add_byte_level_tokenizer(writer, **options)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


def reference_backend(tokens: list[str], merges: list[str], rule: str) -> Any:
    """The same vocabulary in the class that transformers has for models of this rule."""
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    vocab = {token: idx for idx, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if rule == "qwen2":
        return Qwen2Tokenizer(vocab=vocab, merges=pairs, unk_token=None, eos_token="<|end|>", pad_token="<|end|>")
    gpt2 = GPT2Tokenizer(vocab=vocab, merges=pairs, unk_token=None, bos_token=None, eos_token=None)
    if rule == "gpt-2":
        return gpt2
    backend = gpt2.backend_tokenizer
    if rule == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        words = GGUF_PRE_TOKENIZER_SPLITS[rule]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        model = json.loads(backend.to_str())
        model["model"]["ignore_merges"] = True
        backend = Backend.from_str(json.dumps(model))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_ids_of_each_word_rule_equal_transformers_class_of_that_family(tmp_path: Path, rule: str) -> None:
    tokens, merges = trained_merges(pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = write_byte_level(tmp_path / "t.gguf", tokens=tokens, merges=merges, pre=rule)
    ours, reference = gguf_tokenizer(file), reference_backend(tokens, merges, rule)
    for text in texts(300, seed=3):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        if rule != "qwen2":  # which composes characters first
            assert ours.decode(ids) == text


def test_the_word_rules_differ_on_these_strings(tmp_path: Path) -> None:
    """The test above would pass with one rule for all if the strings did not tell them apart."""
    tokens, merges = trained_merges(pre_tokenizers.ByteLevel(add_prefix_space=False))
    ids = {}
    for rule in ("default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"):
        tokenizer = gguf_tokenizer(write_byte_level(tmp_path / "t.gguf", tokens=tokens, merges=merges, pre=rule))
        ids[rule] = str([tokenizer.encode(text, add_special_tokens=False) for text in texts(300, seed=3)])
    assert len(set(ids.values())) == 6


def test_default_word_rule_cuts_as_llama_cpp_says(tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "t.gguf", pre=None)
    cut = gguf_tokenizer(file).backend.pre_tokenizer.pre_tokenize_str("I'm at $12345!!  ok")
    assert [piece for piece, _ in cut] == ["I", "'", "m", "Ġat", "Ġ", "$", "123", "45", "!!", "Ġ", "Ġok"]


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    tokenizer = gguf_tokenizer(write_byte_level(tmp_path / "t.gguf"))
    assert tokenizer.encode("<|begin|>a<think>")[::2] == [256, 258]
    assert tokenizer.decode([256, 258, 257], skip_special_tokens=True) == "<think>"
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def test_bos_is_added_where_the_word_rule_or_the_file_says_so(tmp_path: Path) -> None:
    for pre, expected in (("gpt-2", []), ("llama-bpe", [256]), ("llama3", [256])):
        tokenizer = gguf_tokenizer(write_byte_level(tmp_path / "t.gguf", pre=pre))
        assert tokenizer.encode("") == expected
        assert tokenizer.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pre": "chatglm-bpe"}, NotImplementedError, "'chatglm-bpe' is not supported; supported: default, gpt-2"),
        ({"merges": ["a b c"]}, ValueError, "must hold pairs of tokens, got 'a b c'"),
        ({"merges": ["a b"]}, ValueError, "merges do not fit tokenizer.ggml.tokens"),
    ],
)
def test_gguf_tokenizer_that_does_not_fit_is_a_clear_error(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = write_byte_level(tmp_path / "t.gguf", **options)
    with pytest.raises(error, match=message) as raised:
        gguf_tokenizer(file)
    assert "t.gguf" in str(raised.value)


def test_gguf_special_token_id_out_of_range_is_an_error(tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "t.gguf")
    file.metadata["tokenizer.ggml.eos_token_id"] = 260
    with pytest.raises(ValueError, match=r"eos_token_id must be in \[0, 260\), got 260"):
        gguf_tokenizer(file)


def test_gguf_without_a_tokenizer_or_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "t.gguf")
    file.metadata["tokenizer.ggml.model"] = "rwkv"
    with pytest.raises(NotImplementedError, match="'rwkv' is not supported; supported: gpt2, llama"):
        gguf_tokenizer(file)
    del file.metadata["tokenizer.ggml.model"]
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.model' is missing"):
        gguf_tokenizer(file)


# --- GGUF: SentencePiece ----------------------------------------------------------------------------------------------


def write_sentencepiece(path: Path, data: dict[str, Any], **flags: bool) -> GgufFile:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(data["tokens"])
    writer.add_token_scores(data["scores"])
    writer.add_token_types(data["token_types"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path)


@pytest.fixture(scope="module")
def sentencepiece_data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / "sentencepiece_bpe.json").read_text(encoding="utf-8"))
    return data


def test_sentencepiece_ids_equal_those_of_sentencepiece(tmp_path: Path, sentencepiece_data: dict[str, Any]) -> None:
    tokenizer = gguf_tokenizer(write_sentencepiece(tmp_path / "t.gguf", sentencepiece_data))
    assert len(sentencepiece_data["cases"]) > 90
    for text, expected in sentencepiece_data["cases"]:
        assert tokenizer.encode(text) == [1, *expected], repr(text)
        assert tokenizer.decode(expected) == text


def test_sentencepiece_ids_equal_transformers(tmp_path: Path, sentencepiece_data: dict[str, Any]) -> None:
    """On text that does not begin with a space, before which transformers' class puts no second one."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    vocab = {token: idx for idx, token in enumerate(sentencepiece_data["tokens"])}
    scores = dict(zip(sentencepiece_data["tokens"], sentencepiece_data["scores"], strict=True))
    reference = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    ours = gguf_tokenizer(write_sentencepiece(tmp_path / "t.gguf", sentencepiece_data))
    for text in texts(300, seed=4):
        if text and not text.startswith((" ", "▁")):
            ids = ours.encode(text, add_special_tokens=False)
            assert ids == reference.encode(text, add_special_tokens=False), repr(text)


def test_sentencepiece_flags_of_the_file_are_kept(tmp_path: Path, sentencepiece_data: dict[str, Any]) -> None:
    file = write_sentencepiece(
        tmp_path / "t.gguf", sentencepiece_data, add_bos_token=False, add_eos_token=True, add_space_prefix=False
    )
    tokenizer = gguf_tokenizer(file)
    ids = tokenizer.encode("the License")
    assert ids[-1] == 2 and 1 not in ids
    assert tokenizer.backend.id_to_token(ids[0])[0] == "t"
    assert tokenizer.decode(ids) == "the License"


def test_sentencepiece_scores_missing_or_short_are_errors(tmp_path: Path, sentencepiece_data: dict[str, Any]) -> None:
    file = write_sentencepiece(tmp_path / "t.gguf", sentencepiece_data)
    scores = file.get_list("tokenizer.ggml.scores", float)
    scores.pop()
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.scores must hold 480 numbers, got 479"):
        gguf_tokenizer(file)
    del file.metadata["tokenizer.ggml.scores"]
    with pytest.raises(ValueError, match=r"'tokenizer\.ggml\.scores' is missing"):
        gguf_tokenizer(file)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def write_folder(folder: Path, config: dict[str, Any], tokenizer: Tokenizer | None = None) -> Path:
    (tokenizer or byte_tokenizer()).backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_folder_ids_equal_transformers(tmp_path: Path, smollm2: LoadedModel) -> None:
    from transformers import PreTrainedTokenizerFast

    bos, eos = "<|im_start|>", {"__type": "AddedToken", "content": "<|im_end|>"}
    config = {"bos_token": bos, "eos_token": eos, "pad_token": "<a new one>", "add_bos_token": False}
    with_bos = Tokenizer(Backend.from_str(smollm2.tokenizer.backend.to_str()), special_tokens={})
    add_bos_eos(with_bos.backend, {"bos_token": bos}, add_bos=True, add_eos=False)
    ours = tokenizer_from_folder(write_folder(tmp_path, config, with_bos))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    for text in [*STRINGS[:200], "a <a new one> b"]:
        for special in (False, True):
            assert ours.encode(text, special) == reference.encode(text, add_special_tokens=special), repr(text)
    assert ours.encode("a")[0] == 1


def test_folder_chat_template_comes_from_its_file_first(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    messages = [{"role": "user", "content": "x"}]
    tokenizer = tokenizer_from_folder(write_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.apply_chat_template(messages) == "plain"
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "f"}]) == "tools"
    tokenizer = tokenizer_from_folder(write_folder(tmp_path, {"chat_template": "single"}))
    assert tokenizer.apply_chat_template(messages) == "single"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert tokenizer_from_folder(tmp_path).apply_chat_template(messages) == "file"


def test_folder_with_broken_files_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a valid tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    write_folder(tmp_path, {"chat_template": [1]})
    with pytest.raises(ValueError, match="chat_template must be a string or a list"):
        tokenizer_from_folder(tmp_path)


def test_byte_tokenizer_has_one_token_per_byte() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 258
    for text in texts(100, seed=6):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("") == [tokenizer.bos_token_id]
