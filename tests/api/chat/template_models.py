"""Small tokenizers with chat templates of the kinds that models have: thinking, tools in several formats, neither.

Folders without weights, made of the tiny model's tokenizer; enough for everything the api does with a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from api.output.harmony import TOKENS
from api.tokenizer import ChatTokenizer

QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools>\n\nAnswer with <tool_call></tool_call> to call one.<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""

# Always thinks: the prompt opens the block, and nothing switches it off.
DEEPSEEK_R1 = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content }}{%- endif %}
    {%- if message.role == 'user' %}{{- '<|User|>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}
"""

MISTRAL = """
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- raise_exception('Only user, assistant and tool roles are supported') }}
    {%- elif message.role == 'user' %}
        {%- if tools and loop.last %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}
        {{- '[TOOL_RESULTS]' + message.tool_call_id + message.content + '[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS]' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception('ids have length 9') }}{%- endif %}
            {{- call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
"""

# LFM2's calls: [name(argument="value")]
PYTHONIC = """
{%- if tools %}
    {{- '<|im_start|>system\n<|tool_list_start|>' + (tools | tojson) + '<|tool_list_end|><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<|tool_call_start|>[' + call.function.name + '(' }}
        {%- for name, value in call.function.arguments.items() %}{{- name + '=' + (value | tojson) }}{%- endfor %}
        {{- ')]<|tool_call_end|>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# User and assistant take turns, and there is no system (Gemma 2).
STRICT = """
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\n' }}{%- endif %}
"""


# gpt-oss: the rules of its template (what it shows, drops and refuses), in fewer words than its own.
HARMONY = """
{%- macro system() -%}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
    {{- (model_identity or 'You are a model.') + '\n\nReasoning: ' + reasoning_effort + '\n\n' }}
    {%- if builtin_tools %}{{- '# Tools\n\n' + (builtin_tools | join) + '\n\n' }}{%- endif %}
    {{- '# Valid channels: analysis, commentary, final.' }}
    {%- if tools %}{{- '\nCalls to these tools must go to the commentary channel: functions.' }}{%- endif %}
{%- endmacro %}
{{- '<|start|>system<|message|>' + system() + '<|end|>' }}
{%- if messages[0].role in ['developer', 'system'] %}
    {%- set instructions = messages[0].content %}
    {%- set said = messages[1:] %}
{%- else %}
    {%- set said = messages %}
{%- endif %}
{%- if instructions or tools %}
    {{- '<|start|>developer<|message|>' }}
    {%- if instructions %}{{- '# Instructions\n\n' + instructions + '\n\n' }}{%- endif %}
    {%- if tools %}
        {{- '# Tools\n\nnamespace functions {\n\n' }}
        {%- for tool in tools %}
            {{- '// ' + tool.function.description + '\ntype ' + tool.function.name + ' = (' }}
            {%- for name, schema in (tool.function.parameters.properties or {}).items() %}
                {{- name + ': ' + (schema.type or 'any') + ',' }}
            {%- endfor %}
            {{- ') => any;\n\n' }}
        {%- endfor %}
        {{- '} // namespace functions' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set called = namespace(name=none) %}
{%- for message in said %}
    {%- if message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if called.name is none %}{{- raise_exception('there was no tool call before a tool message') }}{%- endif %}
        {{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- (message.content | tojson) + '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {%- for text in [message.content, message.thinking] %}
            {%- if text and '<|channel|>analysis<|message|>' in text %}
                {{- raise_exception('channels belong into fields of their own') }}
            {%- endif %}
        {%- endfor %}
        {%- if 'tool_calls' in message %}
            {%- if message.content and message.thinking %}
                {{- raise_exception('cannot have both content and thinking beside tool calls') }}
            {%- endif %}
            {%- set later = namespace(final=false) %}
            {%- for other in said[loop.index:] %}
                {%- if other.role == 'assistant' and 'tool_calls' not in other %}
                    {%- set later.final = true %}
                {%- endif %}
            {%- endfor %}
            {%- set thought = message.content or message.thinking %}
            {%- if thought and not later.final %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}
            {%- endif %}
            {%- set call = message.tool_calls[0].function %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- (call.arguments | tojson) + '<|call|>' }}
            {%- set called.name = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if 'thinking' in message %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
            {%- set called.name = none %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
"""


def template_model(
    model: Path,
    folder: Path,
    template: str | None,
    *,
    added: Sequence[str] = (),
    special: Sequence[str] = (),
    **tokenizer_config: str,
) -> ChatTokenizer:
    """The tiny model's tokenizer with another template (None: without), and tokens that stand for one text each."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if tokenizer_config:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | tokenizer_config))
    shutil.copy(model / "config.json", folder)
    return ChatTokenizer(folder)


def harmony_model(model: Path, folder: Path) -> ChatTokenizer:
    """The tiny model's tokenizer, as one of gpt-oss."""
    return template_model(model, folder, HARMONY, special=TOKENS, eos_token="<|return|>")
