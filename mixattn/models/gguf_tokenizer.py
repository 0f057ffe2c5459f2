"""The tokenizer in a GGUF file's metadata: byte-level BPE (``gpt2``) or SentencePiece BPE (``llama``).

A file names how its text is cut into words before the merges (``tokenizer.ggml.pre``) but does not hold the rule. The
rules here are those of the models' own tokenizer.json, which llama.cpp's regular expressions restate.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mixattn.models.gguf import GgufFile
from mixattn.models.tokenizer import SPECIAL_TOKEN_NAMES, Tokenizer, add_bos_eos

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_ID_KEYS = dict(
    zip(SPECIAL_TOKEN_NAMES, ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"), strict=True)
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each expression cuts the pieces of the one before.
_WORD_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_WORDS,),
    "smollm": (r"\p{N}", _GPT2_WORDS),
    "llama-bpe": (_LLAMA3_WORDS,),
    "qwen2": (_QWEN2_WORDS,),
    "tekken": (_TEKKEN_WORDS,),
}
_SAME_WORDS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
"""A word that is a token stays whole, whatever the merges say; these also begin with the bos token by default."""
_COMPOSED = ("qwen2",)
"""Text is brought into the unicode normal form C first."""


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the metadata describes.

    Raises:
        ValueError: a key is missing or inconsistent.
        NotImplementedError: its kind, or its rule for words, is not supported.
    """
    builders: dict[str, Callable[[GgufFile, list[str]], Backend]] = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in builders:
        raise NotImplementedError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not supported; supported: {', '.join(builders)}"
        )
    tokens = file.get_list("tokenizer.ggml.tokens", str)
    backend = builders[kind](file, tokens)
    special_tokens = {}
    for name, key in _ID_KEYS.items():
        token_id = file.metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None:
            special_tokens[name] = _token(file, tokens, token_id, key)
    _add_marked_tokens(backend, file, tokens)
    is_bos_default = kind == "llama" or _words_rule(file) in _WHOLE_WORDS_FIRST
    add_bos_eos(
        backend,
        special_tokens,
        add_bos=file.get("tokenizer.ggml.add_bos_token", bool, is_bos_default),
        add_eos=file.get("tokenizer.ggml.add_eos_token", bool, False),
    )
    template = file.get("tokenizer.chat_template", str, "")
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates={"default": template} if template else None)


def _token(file: GgufFile, tokens: list[str], token_id: object, key: str) -> str:
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be in [0, {len(tokens)}), got {token_id!r}")
    return tokens[token_id]


def _words_rule(file: GgufFile) -> str:
    rule = file.get("tokenizer.ggml.pre", str, "default")
    return _SAME_WORDS.get(rule, rule)


def _byte_level(file: GgufFile, tokens: list[str]) -> Backend:
    rule = _words_rule(file)
    if rule not in _WORD_EXPRESSIONS:
        raise NotImplementedError(
            f"{file.path}: tokenizer.ggml.pre {rule!r} is not supported; supported: "
            f"{', '.join([*_WORD_EXPRESSIONS, *_SAME_WORDS])}"
        )
    merges = [_merge(file, text) for text in file.get_list("tokenizer.ggml.merges", str)]
    try:
        model = models.BPE(
            vocab={token: idx for idx, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=rule in _WHOLE_WORDS_FIRST,
        )
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(f"{file.path}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    backend = Backend(model)
    if rule in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(words), behavior="isolated") for words in _WORD_EXPRESSIONS[rule]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _merge(file: GgufFile, text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not space or " " in right:
        raise ValueError(f"{file.path}: tokenizer.ggml.merges must hold pairs of tokens, got {text!r}")
    return left, right


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Backend:
    """BPE over characters with a token for every byte; a space is put before the text and written as ▁."""
    scores = file.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.scores must hold {len(tokens)} numbers, got {len(scores)}")
    unknown_id = file.get("tokenizer.ggml.unknown_token_id", int, 0)
    backend = Backend(
        models.BPE(
            vocab={token: idx for idx, token in enumerate(tokens)},
            merges=_merges_from_scores(tokens, scores),
            unk_token=_token(file, tokens, unknown_id, "unknown_token_id"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_space_prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    prefix = [normalizers.Prepend("▁")] if has_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if has_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_from_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece would join, best first: any two tokens whose text together is a token.

    SentencePiece always joins the pair whose joined token has the highest score. Source: arXiv:1808.06226.
    """
    ids = {token: idx for idx, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _add_marked_tokens(backend: Backend, file: GgufFile, tokens: list[str]) -> None:
    """Control and user-defined tokens are found in text before it is cut into words; control ones are special."""
    if "tokenizer.ggml.token_type" not in file.metadata:
        return
    types = file.get_list("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"{file.path}: tokenizer.ggml.token_type must hold {len(tokens)} types, got {len(types)}")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
