"""Text to token ids and back, and the special tokens and chat template around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from mixattn.models.chat_template import ChatTemplate
from mixattn.models.hf_config import read_json

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULT_TEMPLATE = "default"
_TOOL_TEMPLATE = "tool_use"


class Tokenizer:
    """A model's tokenizer.

    Args:
        backend: of the ``tokenizers`` package; its post-processor adds the special tokens of ``encode``.
        special_tokens: text of those of ``SPECIAL_TOKEN_NAMES`` that the model has.
        chat_templates: jinja by name; ``default``, and ``tool_use`` where tools have one of their own.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self._template_sources = dict(chat_templates or {})
        self._templates: dict[str, ChatTemplate] = {}

    @property
    def vocab_size(self) -> int:
        """Ids in use, added tokens included; the model's matrices may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def chat_templates(self) -> dict[str, str]:
        """Jinja by name."""
        return dict(self._template_sources)

    @property
    def has_chat_template(self) -> bool:
        return _DEFAULT_TEMPLATE in self._template_sources

    def set_chat_template(self, source: str) -> None:
        """Uses this jinja instead of the model's own; ValueError when its syntax is wrong."""
        self._templates = {_DEFAULT_TEMPLATE: ChatTemplate(source, self.special_tokens)}
        self._template_sources = {_DEFAULT_TEMPLATE: source}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. Special tokens written out in it become their ids.

        Args:
            add_special_tokens: put those around it that the model wants, such as the beginning-of-sequence token. Text
                from a chat template has them already: give False.
        Raises:
            UnicodeEncodeError: (a ValueError) ``text`` holds half of a surrogate pair.
        """
        text.encode("utf-8")  # tokenizers would say that this is no string
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return str(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def decode_stream(self, context_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> DecodeStream:
        """A decoder to be fed one id at a time: ``stream.step(tokenizer.backend, token_id)`` is new text or None.

        Args:
            context_ids: ids before the first, whose text is not given out.
        """
        return DecodeStream(ids=list(context_ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as text, to be encoded with ``add_special_tokens=False``; arguments as ``ChatTemplate``'s.

        Raises:
            ValueError: the model has no chat template, or as ``ChatTemplate.render``.
        """
        name = _TOOL_TEMPLATE if tools and _TOOL_TEMPLATE in self._template_sources else _DEFAULT_TEMPLATE
        if name not in self._template_sources:
            raise ValueError("the model has no chat template: give one (chat_template), or use plain prompts")
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self._template_sources[name], self.special_tokens)
        return self._templates[name].render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **template_kwargs,
        )

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        token_id: int | None = None if token is None else self.backend.token_to_id(token)
        return token_id


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face's layout: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    What ``encode`` adds around a text is what tokenizer.json says; ``add_bos_token`` of tokenizer_config.json is not
    looked at, as in transformers 5.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: a file is not what it should be.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a tokenizer in another format must be converted to it")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(f"{path}: not a valid tokenizer.json: {error}") from error
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    special_tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special_tokens[name] = token
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens.values()])
    return Tokenizer(backend, special_tokens=special_tokens, chat_templates=_folder_templates(folder, config))


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: from chat_template.jinja, else from tokenizer_config.json, which has one or a list."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {_DEFAULT_TEMPLATE: file.read_text(encoding="utf-8")}
    templates = config.get("chat_template")
    if isinstance(templates, str):
        return {_DEFAULT_TEMPLATE: templates}
    try:
        return {entry["name"]: entry["template"] for entry in templates or ()}
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of name and template"
        ) from error


def add_bos_eos(backend: Backend, special_tokens: Mapping[str, str], *, add_bos: bool, add_eos: bool) -> None:
    """Makes ``encode`` put the beginning- and end-of-sequence tokens, where the model has them, around every text."""
    bos = special_tokens.get("bos_token") if add_bos else None
    eos = special_tokens.get("eos_token") if add_eos else None
    used = [token for token in (bos, eos) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(used)],
    )


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, then ``<s>`` and ``</s>``: for models without a vocabulary of their own."""
    vocab = {symbol: idx for idx, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens.values()])
    add_bos_eos(backend, special_tokens, add_bos=True, add_eos=False)
    return Tokenizer(backend, special_tokens=special_tokens)
