"""Chat templates as published models have them, in the control tokens of a tiny tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from ifkv.testing import tiny_tokenizer

# Llama 3.2's: a system message always, today's date in it, texts trimmed.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\n\n" }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n\n'+ message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n\n' }}
{%- endif %}
"""
# Qwen 2.5's and 3's: a system message by itself; thinking that can be switched off.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
# Mistral Small's: a system message of its own, with the date, where none is given.
MISTRAL_SMALL = """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You are Mistral. The current date is " + today + ".\n\n" %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '<|im_start|>' + system_message + '<|im_end|>' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {{- '<|im_start|>' + message['content'] + '<|im_end|>' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
# Gemma's: no system role, and a mark around what a model is trained to say.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>model\n' + message['content'] | trim + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}"
)
# Llama 2's: the system message within the user's.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Ignores what it does not know.
DEAF = (
    "{% for message in messages %}{% if message['role'] in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + message['role'] + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}<|im_start|>assistant"
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with a template, and with tokens for thoughts that are not special."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<|fim|>", "<note>", "\n\n"])
    tokenizer.chat_template = template
    return tokenizer


class OwnWay:
    """Like Mistral's own tokenizer: no template, and no letters are ever a control token."""

    chat_template = None
    bos_token, eos_token, pad_token_id = "<s>", "</s>", 0
    all_special_tokens = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]")
    all_special_ids = tuple(range(5))
    eos_token_id = 2

    def __init__(self, loses_spaces: bool = False):
        self.loses_spaces = loses_spaces

    def __len__(self) -> int:
        return 5 + 256

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5 + byte for byte in text.encode()]}

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        tools: Any = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **_: Any,
    ) -> list[int]:
        assert tokenize
        ids = [1]
        for message in conversation:
            made = self(message["content"])["input_ids"]
            if self.loses_spaces:
                made = [token for token in made if token != 5 + ord(" ")]
            if message["role"] == "system":
                raise ValueError("Conversation roles must be user and assistant")
            ids += [3, *made, 4] if message["role"] == "user" else [*made, 2]
        return ids

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        text = b""
        for token in [ids] if isinstance(ids, int) else [int(each) for each in ids]:
            if token >= 5:
                text += bytes([token - 5])
            elif not skip_special_tokens:
                text += self.all_special_tokens[token].encode()
        return text.decode(errors="replace")
