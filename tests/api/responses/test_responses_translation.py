"""Requests of /v1/responses as chats: what items come to, and errors in this endpoint's own words."""

from __future__ import annotations

from typing import Any

import pytest

from api.errors import ApiError, UnknownParameter, UnsupportedParameter
from api.responses.context import ContextItem, from_turn
from api.responses.store import StoredItem
from api.responses.translation import Chat, chat_of, encrypted_reasoning
from api.schemas.responses import InputTokensRequest, ResponseRequest
from api.validation import validate

FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Oslo"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "rain"}


def asked(**fields: Any) -> ResponseRequest:
    return validate(ResponseRequest, {"model": "tiny", "input": "hello", **fields}, "reject")[0]


def context(request: ResponseRequest) -> list[ContextItem]:
    return [
        ContextItem(item, f"input[{place}]", StoredItem("x", "{}"))
        for place, item in enumerate(request.items)
        if item.type != "item_reference"
    ]


def translated(**fields: Any) -> Chat:
    request = asked(**fields)
    return chat_of(request, context(request), request.model)


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    chat = translated(input=list(items), **fields).request
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        translated(**fields)
    return caught.value


def tool_call(call_id: str = "call_1") -> dict[str, Any]:
    function = {"name": CALL["name"], "arguments": CALL["arguments"]}
    return {"id": call_id, "type": "function", "function": function}


def test_instructions_come_first_and_a_string_is_a_message_of_the_user():
    chat = translated(input="hello", instructions="be brief").request
    assert [(message.role, message.text) for message in chat.messages] == [("system", "be brief"), ("user", "hello")]


@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant"])
def test_messages_need_no_type(role: str):
    of_input = {"role": role, "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}
    assert messages(of_input) == messages({"type": "message", **of_input}) == [{"role": role, "content": "ab"}]


def test_an_answer_that_comes_back_is_the_assistant_s():
    parts = [
        {"type": "output_text", "text": "a", "annotations": [], "logprobs": []},
        {"type": "refusal", "refusal": "no"},
    ]
    answer = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": parts}
    assert messages(answer) == [{"role": "assistant", "content": "ano"}]


def test_calls_belong_to_the_message_before_them():
    second = {**CALL, "call_id": "call_2"}
    said = {"role": "assistant", "content": "let me see"}
    assert messages(said, CALL, second, OUTPUT, {**OUTPUT, "call_id": "call_2"}) == [
        {**said, "tool_calls": [tool_call(), tool_call("call_2")]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
        {"role": "tool", "content": "rain", "tool_call_id": "call_2"},
    ]


def test_calls_after_an_output_are_a_message_of_their_own():
    second = {**CALL, "call_id": "call_2"}
    roles = [message["role"] for message in messages(CALL, OUTPUT, second, {**OUTPUT, "call_id": "call_2"})]
    assert roles == ["assistant", "tool", "assistant", "tool"]


def test_an_output_may_have_parts():
    parts = [{"type": "input_text", "text": "ra"}, {"type": "input_text", "text": "in"}]
    assert messages(CALL, {**OUTPUT, "output": parts})[1]["content"] == "rain"
    assert messages(CALL, {**OUTPUT, "output": []})[1]["content"] == ""


@pytest.mark.parametrize(
    "reasoning",
    [
        {"summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"summary": [], "encrypted_content": encrypted_reasoning("hm")},
        {"summary": [{"type": "summary_text", "text": "hm"}]},
        {"summary": [], "content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": "of another"},
    ],
)
@pytest.mark.parametrize("follower", [{"role": "assistant", "content": "ok"}, CALL])
def test_reasoning_belongs_to_the_answer_after_it(reasoning: dict[str, Any], follower: dict[str, Any]):
    item = {"type": "reasoning", "id": "rs_1", "status": "completed", **reasoning}
    (with_reasoning,), (without,) = messages(item, follower), messages(follower)
    assert with_reasoning == {**without, "reasoning_content": "hm"}


def test_words_between_reasoning_and_a_call_are_of_the_same_turn():
    first, second = (
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]} for text in "ab"
    )
    words = {"role": "assistant", "content": "ok"}
    (turn,) = messages(first, words, second, CALL)
    assert (turn["reasoning_content"], turn["content"]) == ("a\n\nb", "ok")
    assert turn["tool_calls"] == messages(CALL)[0]["tool_calls"]


def test_reasoning_that_no_answer_follows_is_a_message_of_its_own():
    item = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    cut = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert messages(item) == [cut]
    assert messages(item, {"role": "user", "content": "go on"}) == [cut, {"role": "user", "content": "go on"}]


def test_settings_become_those_of_a_chat():
    chat = translated(
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_logprobs=2,
        reasoning={"effort": "low", "summary": "auto"},
        parallel_tool_calls=False,
        tools=[FUNCTION],
        tool_choice={"type": "function", "name": "weather"},
        text={"format": {"type": "json_schema", "name": "a", "schema": {"enum": [None]}, "strict": True}},
    ).request
    assert (chat.token_limit, chat.temperature, chat.top_p, chat.num_top_logprobs) == (7, 0.5, 0.9, 2)
    assert (chat.reasoning_effort, chat.parallel_tool_calls) == ("low", False)
    sent = chat.model_dump(by_alias=True, exclude_unset=True, include={"tools", "response_format"})
    function = {name: value for name, value in FUNCTION.items() if name != "type"}
    assert sent["tools"] == [{"type": "function", "function": function}]
    schema = {"name": "a", "schema": {"enum": [None]}, "strict": True}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert chat.tool_choice is not None and not isinstance(chat.tool_choice, str)
    assert chat.tool_choice.model_dump() == {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("fields", "num_top"),
    [
        ({}, None),
        ({"top_logprobs": 0}, None),
        ({"top_logprobs": 3}, 3),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, 3),
    ],
)
def test_logprobs_are_asked_for_by_include_or_by_their_number(fields: dict[str, Any], num_top: int | None):
    assert translated(**fields).request.num_top_logprobs == num_top


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [FUNCTION, FUNCTION]}, "tools"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"input": [{"role": "user", "content": "a"}, OUTPUT]}, "input[1]"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]}, "input[0].encrypted_content"),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "plain.?"}]},
            "input[0].encrypted_content",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_own_words(fields: dict[str, Any], param: str):
    assert refusal(**fields).param == param


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions"),
        ("messages[1].tool_calls[0].id", "input[0]"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format", "text.format"),
        ("response_format.json_schema.schema.properties.a", "text.format.schema.properties.a"),
        ("reasoning_effort", "reasoning.effort"),
        ("tools[3].function.parameters", "tools[3].parameters"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("tool_choice.allowed_tools.tools[0].function.name", "tool_choice.tools[0].name"),
        ("temperature", "temperature"),
    ],
)
def test_errors_of_the_chat_name_the_field_of_this_endpoint(theirs: str, ours: str):
    chat = translated(instructions="be brief")
    with pytest.raises(ApiError) as caught, chat.in_own_words():
        raise UnsupportedParameter(f"Unsupported parameter: '{theirs}'.", param=theirs)
    assert (caught.value.param, caught.value.message) == (ours, f"Unsupported parameter: '{ours}'.")


NOT_DONE = [
    ("access_programs", {"cyber": "standard"}),
    ("background", True),
    ("background_options", {"completion_window": "soonest"}),
    ("context_management", [{"type": "compaction"}]),
    ("conversation", "conv_1"),
    ("image", {"context_compression": "auto"}),
    ("max_tool_calls", 3),
    ("moderation", {"model": "m"}),
    ("multi_agent", {"enabled": True}),
    ("prompt", {"id": "pmpt_1"}),
    ("prompt_cache_options", {"mode": "explicit"}),
    ("prompt_cache_retention", "24h"),
    ("service_tier", "flex"),
]


@pytest.mark.parametrize(("field", "value"), NOT_DONE)
def test_a_documented_field_that_is_not_done_is_refused_by_name(field: str, value: Any):
    error = refusal(**{field: value})
    assert isinstance(error, UnsupportedParameter)
    assert error.param == field
    assert translated(**{field: None}).request == translated().request


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"include": ["message.output_text.logprobs", "file_search_call.results"]}, "include[1]"),
        ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**FUNCTION, "async": True}]}, "tools[0].async"),
        ({"input": [{**CALL, "namespace": "crm"}]}, "input[0].namespace"),
        ({"input": [{"role": "assistant", "content": "a", "phase": "commentary"}]}, "input[0].phase"),
    ],
)
def test_a_part_of_a_field_that_is_not_done_is_refused_by_name(fields: dict[str, Any], param: str):
    error = refusal(**fields)
    assert isinstance(error, UnsupportedParameter)
    assert error.param == param


@pytest.mark.parametrize(
    ("fields", "param", "value"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "web_search_call"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "input_image",
        ),
        ({"input": [CALL, {**OUTPUT, "output": [{"type": "input_file"}]}]}, "input[1].output[0].type", "input_file"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "grammar"),
        ({"truncation": "oldest"}, "truncation", "oldest"),
        ({"include": ["everything"]}, "include[0]", "everything"),
    ],
)
def test_a_kind_that_is_not_done_is_refused_by_name(fields: dict[str, Any], param: str, value: str):
    error = refusal(**fields)
    assert (error.param, error.code) == (param, "invalid_value")
    assert value in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"input": [{"role": "user", "content": "a", "name": "b"}]}, "input[0].name"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
    ],
)
def test_what_no_reference_documents_is_refused_by_name(fields: dict[str, Any], param: str):
    error = refusal(**fields)
    assert isinstance(error, UnknownParameter)
    assert error.param == param


def test_values_that_ask_for_nothing_are_fine():
    neutral = {
        "background": False,
        "context_management": [],
        "include": [],
        "metadata": None,
        "prompt_cache_retention": "in_memory",
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "auto",
        "stream": False,
        "stream_options": None,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "truncation": "disabled",
    }
    assert translated(**neutral).request.messages == translated().request.messages


def test_a_count_takes_what_makes_the_prompt_and_nothing_else():
    body = {"input": "hello", "instructions": "be brief", "tools": [FUNCTION], "truncation": "auto", "model": None}
    validate(InputTokensRequest, body, "reject")
    with pytest.raises(UnknownParameter):
        validate(InputTokensRequest, {**body, "temperature": 1}, "reject")
    with pytest.raises(UnsupportedParameter):
        validate(InputTokensRequest, {**body, "personality": "friendly"}, "reject")


def test_a_cut_context_keeps_what_instructs():
    roles = ["system", "user", "assistant", "developer", "user", "assistant"]
    items = context(asked(input=[{"role": role, "content": role} for role in roles]))
    assert [place for place, item in enumerate(items) if item.begins_a_turn] == [1, 4]
    kept = [item.source for item in from_turn(items, 4)]
    assert kept == ["input[0]", "input[3]", "input[4]", "input[5]"]
