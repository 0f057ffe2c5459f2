"""Chat templates: transformers' text for the same messages, and clear errors for what a template cannot take."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mixattn.models.chat_template import ChatTemplate
from mixattn.models.loader import LoadedModel
from mixattn.models.tokenizer import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  What is 2+2?\n"}
ASSISTANT = {"role": "assistant", "content": "It is"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, USER],
    "unicode": [{"role": "user", "content": "naïve 😀 <b>&amp;</b> {{ 7 * 7 }} {% raw %}"}],
    "none-values": [{"role": "user", "content": "a", "name": None}],
    "assistant-last": [USER, ASSISTANT],
    "trailing-space": [USER, {"role": "assistant", "content": "It is "}],
}
TEMPLATES = {
    "llama3": "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}\n{% endif %}"
    "{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
    "    {% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}"
    "{{ m.role }}{{ ns.n }}: {{ m.content }}\n{% endfor %}",
    "variables": "{{ eos_token }}|{{ pad_token is defined }}|{{ enable_thinking | default(true) }}"
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ add_generation_prompt }}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é&'>", "parameters": {"b": 1, "a": [None]}}}]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_smollm2_text_equals_transformers(
    smollm2: LoadedModel,
    smollm2_reference_tokenizer: Any,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    expected = smollm2_reference_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert "<|im_start|>user" in expected
    text = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert text == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_templates_of_other_families_give_transformers_text(
    smollm2: LoadedModel, smollm2_reference_tokenizer: Any, messages: list[dict[str, Any]], name: str
) -> None:
    options: dict[str, Any] = {"tools": TOOLS, "enable_thinking": False}
    expected = smollm2_reference_tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **options
    )
    template = ChatTemplate(TEMPLATES[name], smollm2.tokenizer.special_tokens)
    assert template.render(messages, add_generation_prompt=True, **options) == expected


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["smollm2", *TEMPLATES])
@pytest.mark.parametrize("conversation", ["assistant-last", "trailing-space"])
def test_continue_final_message_equals_transformers(
    smollm2: LoadedModel, smollm2_reference_tokenizer: Any, template: str | None, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    source = template or smollm2_reference_tokenizer.chat_template
    expected = smollm2_reference_tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert expected.rstrip().endswith("It is")
    rendered = ChatTemplate(source, smollm2.tokenizer.special_tokens).render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == expected
    assert messages[-1]["content"].startswith("It is") and "TAG" not in messages[-1]["content"]


def test_text_parts_are_joined_by_newlines(smollm2: LoadedModel) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    as_parts = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    assert as_parts == smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "one\ntwo"}])


def test_strftime_now_gives_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([USER], add_generation_prompt=False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def test_model_without_a_template_says_so() -> None:
    tokenizer = byte_tokenizer()
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="the model has no chat template"):
        tokenizer.apply_chat_template([USER])
    tokenizer.set_chat_template("{{ messages[0].content }}")
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template([USER]) == USER["content"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must hold at least one message"),
        (["hi"], r"messages\[0\] must be a mapping with role and content, got str"),
        ([USER, {"content": "x"}], r"messages\[1\]\.role must be a string, got None"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string or a list of parts, got int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content: parts must be of type text, got 'image_url'",
        ),
        ([{"role": "user", "content": ["x"]}], r"parts must be of type text, got 'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"a text part's text must be a string, got None"),
    ],
)
def test_message_out_of_form_is_an_error_naming_it(messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate("x", {}).render(messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{{ messages[0]['content'] + 1 }}", "refuses these messages"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages: .*not safely callable|unsafe"),
    ],
)
def test_template_that_refuses_is_a_value_error(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render([USER], add_generation_prompt=False)


def test_template_with_wrong_syntax_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the chat template is not valid jinja"):
        ChatTemplate("{% for m in messages %}", {})


def test_continue_final_message_without_one_is_an_error() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {})
    with pytest.raises(ValueError, match="exclude each other"):
        template.render([USER], add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(ValueError, match="needs a content in the last message"):
        template.render([{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match="leaves the last message out"):
        template.render([ASSISTANT], add_generation_prompt=False, continue_final_message=True)


def test_variables_of_the_caller_do_not_replace_the_messages() -> None:
    """Names come from requests: none may break the call or put in other messages."""
    template = ChatTemplate("{{ messages[0].content }}{{ self is defined }}", {})
    text = template.render([{"role": "user", "content": "mine"}], add_generation_prompt=False, self=1, context=2)
    assert text.startswith("mine")
