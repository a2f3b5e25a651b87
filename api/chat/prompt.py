"""From a chat request to what the ring and the answer's reader need: prompt ids, a grammar, and the answer's format.

The model's chat template makes the prompt; what the request asks of the answer (tools, response_format, reasoning)
decides what the template gets and what a grammar enforces. Whatever the served model cannot do is refused by name here.
Called by the service, in a thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from api.chat.harmony_turns import harmony_turns
from api.chat.template_variables import TemplateVariables, template_variables
from api.chat.tool_use import ToolUse, tool_use
from api.chat.turns import Turn, generic_turns, native_turns, with_placed_instructions
from api.errors import InvalidRequest, UnsupportedParameter
from api.output import harmony
from api.output.parser import CONTENT, REASONING, OutputFormat
from api.schemas.chat import AssistantMessage, ChatCompletionRequest, JsonObjectFormat, JsonSchemaFormat, Message
from api.structured import grammar
from api.structured.harmony import harmony_answer
from api.tokenizer import ChatTokenizer, context_length_exceeded

_IDS_OF_NINE = "[TOOL_CALLS]"  # templates of models that begin calls so refuse other ids


@dataclass(frozen=True)
class ChatPrompt:
    token_ids: list[int]
    grammar: str | None
    output: OutputFormat
    banned_ids: frozenset[int] = frozenset()  # that the answer must not have


def chat_prompt(chat: ChatCompletionRequest, tokenizer: ChatTokenizer, max_tokens: int) -> ChatPrompt:
    """What the request comes to with this model.

    Control tokens that the request's text spells out are encoded as text. Raises InvalidRequest where the template
    cannot render the messages, UnsupportedParameter where it has no place for a field or the model cannot do what is
    asked, and ContextLengthExceeded where the text is surely longer than `max_tokens`.
    """
    if not tokenizer.template.exists:
        raise InvalidRequest("The served model has no chat template, so it cannot take messages.", param="messages")
    if chat.logprobs:
        tokenizer.load_bytes()
    try:
        _check_size(chat, tokenizer, max_tokens)
        return _chat_prompt(chat, tokenizer)
    except RecursionError:
        raise InvalidRequest("The request is nested too deeply to be written into a prompt.") from None


def _chat_prompt(chat: ChatCompletionRequest, tokenizer: ChatTokenizer) -> ChatPrompt:
    is_harmony = tokenizer.template.is_harmony
    use = tool_use(chat, tokenizer.native_tools)
    if is_harmony and use.offered and not use.is_native:
        raise UnsupportedParameter("The served model's chat template has no place for 'tools'.", param="tools")
    variables = template_variables(chat, tokenizer.template)
    content = _content_grammar(chat)
    continues = bool(chat.continue_final_message)
    render = partial(_render, tokenizer=tokenizer, use=use, variables=variables, continues=continues)
    try:
        token_ids = render(chat.messages)
    except InvalidRequest as error:
        if not use.is_native or is_harmony:
            raise
        # Templates have rules of their own for tools; what is only text they may still take.
        use = use.generic()
        render = partial(render, use=use)
        try:
            token_ids = render(chat.messages)
        except InvalidRequest:
            raise error from None
    _check_names(chat.messages, token_ids, render)
    if variables.thinking is False and not continues:
        token_ids = _without_thinking(token_ids, tokenizer, variables)
    output = OutputFormat(
        markers=tokenizer.markers(use.tool_format),
        first=_first_part(token_ids, tokenizer, continues=continues),
        tool_format=use.tool_format,
        tools=use.offered,
        only_calls=use.is_required,
        only_one_call=not use.is_parallel,
        content_is_enforced=content is not None and not is_harmony,  # there no text is taken for a marker
        continues_text=continues,
        has_messages=is_harmony,
        shown_as=harmony.SHOWN_AS if is_harmony else {},
    )
    if is_harmony:
        ignore_eos = bool(chat.ignore_eos)
        rules = _harmony_grammar(content, use, variables, tokenizer, continues=continues, ignore_eos=ignore_eos)
        return ChatPrompt(token_ids, rules, output)
    rules = _answer_grammar(content, use, tokenizer)
    if rules is not None and variables.thinking is not False:
        rules = _after_reasoning(rules, output, tokenizer)
    return ChatPrompt(token_ids, rules, output, _banned_ids(use, tokenizer))


def _first_part(token_ids: list[int], tokenizer: ChatTokenizer, *, continues: bool) -> str:
    """The part that the answer begins in."""
    if tokenizer.is_in_thinking(token_ids):
        return REASONING
    return CONTENT if continues else tokenizer.first_part or CONTENT


# -- the prompt ------------------------------------------------------------------------------------------------------


def _render(
    messages: Sequence[Message],
    *,
    tokenizer: ChatTokenizer,
    use: ToolUse,
    variables: TemplateVariables,
    continues: bool,
) -> list[int]:
    template = tokenizer.template
    if not use.is_native:
        turns = generic_turns(messages, template, use.offered)
        return template.render(turns, variables=variables.values, continues=continues)
    native = tokenizer.native_tools
    short_ids = native is not None and native.start == _IDS_OF_NINE
    turns: list[Turn]
    if template.is_harmony:
        turns = harmony_turns(messages, template)
    else:
        turns = with_placed_instructions(native_turns(messages, template, short_ids=short_ids), template)
    return template.render(turns, use.offered, variables.values, continues=continues)


def _without_thinking(token_ids: list[int], tokenizer: ChatTokenizer, variables: TemplateVariables) -> list[int]:
    """The prompt with a closed block of reasoning at its end, as templates with a switch write it themselves."""
    if tokenizer.thinking_markers is None:
        return token_ids
    start, end = tokenizer.thinking_markers
    if tokenizer.is_in_thinking(token_ids):
        return token_ids + tokenizer.encode_prompt(f"{end}\n\n", add_special_tokens=False)
    if tokenizer.template.thinking_switch is None and "reasoning_effort" not in variables.values:
        return token_ids + tokenizer.encode_prompt(f"{start}\n\n{end}\n\n", add_special_tokens=False)
    return token_ids


# -- the grammar -----------------------------------------------------------------------------------------------------


def _answer_grammar(content: str | None, use: ToolUse, tokenizer: ChatTokenizer) -> str | None:
    """What content and calls must look like, None where they are free."""
    calls_are_enforced = use.tool_format is not None and use.is_enforced
    if tokenizer.first_part is not None and (content is not None or calls_are_enforced):
        field = "tool_choice" if calls_are_enforced else "response_format"
        raise UnsupportedParameter(
            f"Unsupported parameter: '{field}'. The served model writes headers into its answers, which no grammar "
            "of this server knows.",
            param=field,
        )
    if use.tool_format is None or not use.is_enforced:
        return content
    calls = grammar.tool_calls(
        use.callable,
        begin=f"{use.tool_format.start}\n",
        end=f"\n{use.tool_format.end}",
        required=use.is_required or content is not None,
        parallel=use.is_parallel,
        special_tokens=tokenizer.special_tokens,
    )
    return calls if content is None or use.is_required else grammar.either(content, calls)


def _harmony_grammar(
    content: str | None,
    use: ToolUse,
    variables: TemplateVariables,
    tokenizer: ChatTokenizer,
    *,
    continues: bool,
    ignore_eos: bool,
) -> str | None:
    """The same for a model that writes harmony, its reasoning and the lack of it included."""
    functions = use.callable if use.tool_format is not None else ()
    # Who wants no end of the answer cannot have a grammar; then a call that is written is nobody's.
    is_forbidden = use.is_forbidden and not ignore_eos
    is_free = content is None and not (functions and use.is_enforced) and not is_forbidden
    if is_free and variables.thinking is not False:
        return None
    return harmony_answer(
        tokenizer.special_tokens.ids,
        content=content,
        functions=functions,
        calls_only=use.is_required,
        reasons=variables.thinking is not False,
        is_begun=continues,
    )


def _banned_ids(use: ToolUse, tokenizer: ChatTokenizer) -> frozenset[int]:
    return frozenset([tokenizer.call_token_id] if use.is_forbidden and tokenizer.call_token_id is not None else [])


def _after_reasoning(rules: str, output: OutputFormat, tokenizer: ChatTokenizer) -> str:
    if tokenizer.thinking_markers is None:
        return rules
    start, end = tokenizer.thinking_markers
    begin = None if output.first == REASONING else start
    return grammar.after_reasoning(rules, begin=begin, end=end, special_tokens=tokenizer.special_tokens)


def _content_grammar(chat: ChatCompletionRequest) -> str | None:
    match chat.response_format:
        case JsonObjectFormat():
            return grammar.json_object()
        case JsonSchemaFormat(json_schema=described):
            if described.schema_ is None:
                return grammar.json_object()
            param = "response_format.json_schema.schema"
            return grammar.json_schema(described.schema_, strict=described.strict, param=param)
    return None


# -- what is refused -------------------------------------------------------------------------------------------------


def _check_size(chat: ChatCompletionRequest, tokenizer: ChatTokenizer, max_tokens: int) -> None:
    """Refuses megabytes before they are tokenized."""
    calls = (message.tool_calls or () for message in chat.messages if isinstance(message, AssistantMessage))
    num_turns = len(chat.messages) + sum(map(len, calls))
    if num_turns > max_tokens:  # each is a token at least
        raise context_length_exceeded(max_tokens, f"more than {num_turns} tokens")
    length = sum(map(len, _texts(chat)))
    if length > tokenizer.max_characters(max_tokens):
        raise context_length_exceeded(max_tokens, f"{length} characters")


def _texts(chat: ChatCompletionRequest) -> Iterator[str]:
    """All that the template may write into the prompt."""
    for message in chat.messages:
        yield message.text
        if isinstance(message, AssistantMessage):
            yield message.reasoning_content or ""
            for call in message.tool_calls or ():
                yield call.function.name + call.function.arguments
    for tool in chat.tools or ():
        yield json.dumps(tool.function.parameters) + (tool.function.description or "")
    yield json.dumps(chat.chat_template_kwargs)


def _check_names(
    messages: Sequence[Message], token_ids: list[int], render: Callable[[Sequence[Message]], list[int]]
) -> None:
    """Templates use names of some roles, or of none; only the prompt without them tells.

    A result's name is that of the function, which its call says already, so it is fine where it makes no difference.
    """
    named = [(place, message) for place, message in enumerate(messages) if message.name and message.role != "tool"]
    first_places = {message.role: place for place, message in reversed(named)}
    for role, place in first_places.items():
        nameless = [
            message.model_copy(update={"name": None}) if message.role == role else message for message in messages
        ]
        try:
            is_used = render(nameless) != token_ids
        except InvalidRequest:  # the template insists on names
            is_used = True
        if not is_used:
            name = f"messages[{place}].name"
            raise UnsupportedParameter(
                f"The served model's chat template has no place for '{name}': leave names out, or write them into the "
                "'content'.",
                param=name,
            )
