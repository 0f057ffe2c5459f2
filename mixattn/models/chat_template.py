"""Chat templates: messages to the text that a model was trained to continue.

Templates come with checkpoints and are not trusted: they run in jinja's immutable sandbox, and see plain data only.
The environment is the one that template authors write for, that of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of the last message while the template runs; ends with a space to see whether the template trims."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: jinja.
        special_tokens: ``bos_token``, ``eos_token`` and so on, variables of the template.
    Raises:
        ValueError: the template's syntax is wrong.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The text of the conversation.

        Args:
            messages: each with a ``role``; ``content`` is a string or a list of text parts, joined by newlines.
            add_generation_prompt: end with what opens the assistant's answer.
            continue_final_message: end within the last message, so that the model goes on with it.
            tools: JSON schemas of functions, for templates that know tools.
            template_kwargs: further variables of the template.
        Raises:
            ValueError: no messages, a message that is not text, both ways of ending, or the template itself refuses.
        """
        if not messages:
            raise ValueError("messages must hold at least one message")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        plain = [_plain_message(message, idx) for idx, message in enumerate(messages)]
        if continue_final_message:
            final = plain[-1].get("content")
            if not isinstance(final, str):
                raise ValueError("continue_final_message needs a content in the last message")
            plain[-1]["content"] = final + _CONTINUE_TAG
        variables: dict[str, Any] = {**self._special_tokens, **template_kwargs}
        variables.update(messages=plain, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            text = self._template.render(variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refuses these messages: {error}") from error
        return _cut_at_tag(text) if continue_final_message else text


def _plain_message(message: Mapping[str, Any], idx: int) -> dict[str, Any]:
    """A copy without keys that are None, the content as one string."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{idx}] must be a mapping with role and content, got {type(message).__name__}")
    plain = {key: value for key, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise ValueError(f"messages[{idx}].role must be a string, got {plain.get('role')!r}")
    content = plain.get("content")
    if isinstance(content, (list, tuple)):
        plain["content"] = "\n".join(_part_text(part, idx) for part in content)
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"messages[{idx}].content must be a string or a list of parts, got {type(content).__name__}")
    return plain


def _part_text(part: Any, idx: int) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise ValueError(f"messages[{idx}].content: parts must be of type text, got {kind!r}")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"messages[{idx}].content: a text part's text must be a string, got {text!r}")
    return text


def _cut_at_tag(text: str) -> str:
    end = text.rfind(_CONTINUE_TAG.strip())
    if end < 0:
        raise ValueError("continue_final_message: the chat template leaves the last message out")
    is_spacing_kept = text.startswith(_CONTINUE_TAG, end)
    return text[:end] if is_spacing_kept else text[:end].rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
