"""What /v1/messages takes, as a chat: turns, results of tools, names; and the chat's errors in its own words."""

from typing import Any

import pytest

from api.errors import ApiError, InvalidRequest, UnsupportedParameter, anthropic_error_object
from api.messages.request import Translation, translate
from api.schemas.anthropic import MessagesRequest
from api.schemas.chat import AssistantMessage, NamedTool
from api.validation import validate

BODY = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
WEATHER = {"name": "weather", "description": "of a city", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}


def translated(can_think: bool = True, **fields: Any) -> Translation:
    request, _ = validate(MessagesRequest, {**BODY, **fields}, "reject")
    return translate(request, can_think=can_think)


def conversation(*messages: tuple[str, Any], **fields: Any) -> list[tuple[str, str]]:
    """The chat's messages as role and text."""
    given = [{"role": role, "content": content} for role, content in messages]
    return [(message.role, message.text) for message in translated(messages=given, **fields).chat.messages]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def result(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}


def said(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def refusal(**fields: Any) -> str:
    """What the client reads."""
    with pytest.raises(InvalidRequest) as caught:
        translated(**fields)
    return anthropic_error_object(caught.value, "req_1")["error"]["message"]


def test_the_system_prompt_comes_first_and_blocks_are_put_together():
    assert conversation(("user", "hello"), system="be brief") == [("system", "be brief"), ("user", "hello")]
    blocks = [text("one"), {**text("two"), "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    assert conversation(("user", blocks), system=blocks) == [("system", "one\ntwo"), ("user", "one\ntwo")]
    assert conversation(("user", "hello"), system="") == [("user", "hello")]


def test_messages_of_one_role_are_one_turn_and_what_the_model_wrote_stays_as_it_was():
    turns = [
        ("user", "a"),
        ("user", [text("b")]),
        ("assistant", [text("c"), text("d")]),
        ("assistant", "e"),
        ("user", "f"),
    ]
    assert conversation(*turns) == [("user", "a\nb"), ("assistant", "cde"), ("user", "f")]


def test_a_tool_round_trip_becomes_a_call_and_its_result():
    messages = [
        {"role": "user", "content": "how is it?"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, text("let me see"), CALL],
        },
        {"role": "user", "content": [result([text("sunny"), text("warm")]), text("well?")]},
    ]
    translation = translated(messages=messages, tools=[WEATHER])
    user, assistant, tool, question = translation.chat.messages
    assert isinstance(assistant, AssistantMessage) and assistant.tool_calls is not None
    assert (assistant.text, assistant.reasoning_content) == ("let me see", "hm")
    (call,) = assistant.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == ("toolu_1", "weather", '{"city": "Köln"}')
    assert tool.model_dump(exclude_none=True) == {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny\nwarm"}
    assert (user.text, question.text) == ("how is it?", "well?")
    assert translation.origins == ["messages[0]", "messages[1]", "messages[2].content[0]", "messages[2].content[1]"]


@pytest.mark.parametrize(
    ("block", "read"),
    [
        (result("gone", is_error=True), "Error: gone"),
        (result("fine", is_error=False), "fine"),
        (result(), ""),
        (result([]), ""),
    ],
)
def test_the_model_reads_a_tool_s_result_and_whether_it_failed(block: dict[str, Any], read: str):
    turns = [("user", "a"), ("assistant", [CALL]), ("user", [block])]
    assert conversation(*turns)[-1] == ("tool", read)


def test_an_answer_that_was_empty_can_be_sent_back():
    assert conversation(("user", "a"), ("assistant", []), ("user", "b"))[1] == ("assistant", "")
    assert conversation(("user", "a"), ("assistant", [CALL]), ("user", [result("b")]))[1] == ("assistant", "")


def test_what_the_model_cannot_be_told_is_named():
    blocks = [{"type": "redacted_thinking", "data": "xyz"}, text("b")]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": blocks}, BODY["messages"][0]]
    translation = translated(messages=messages, thinking={"type": "enabled", "budget_tokens": 2000})
    assert translation.ignored == ["messages[1].content[0]", "thinking.budget_tokens"]
    assert translated().ignored == []


def test_anthropic_s_limits_are_wider_than_openai_s():
    name = "x" * 100
    stops = [str(number) for number in range(20)]
    choice = {"type": "tool", "name": name, "disable_parallel_tool_use": True}
    chat = translated(tools=[{**WEATHER, "name": name}], tool_choice=choice, stop_sequences=stops).chat
    assert chat.stop == stops
    assert chat.tools is not None and chat.tools[0].function.name == name
    assert isinstance(chat.tool_choice, NamedTool) and chat.tool_choice.function.name == name
    assert chat.parallel_tool_calls is False


@pytest.mark.parametrize(
    ("fields", "effort", "of_a_model_that_cannot"),
    [
        ({}, None, None),
        ({"thinking": {"type": "disabled"}}, "none", "none"),
        ({"thinking": {"type": "adaptive"}}, "high", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "high", "'thinking'"),
        ({"output_config": {"effort": "high"}}, "high", None),
        ({"output_config": {"effort": "max"}}, "max", "'output_config.effort'"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}, "low", "'output_config.effort'"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}}, "none", "none"),
    ],
)
def test_thinking_and_effort_are_the_chat_s_effort(
    fields: dict[str, Any], effort: str | None, of_a_model_that_cannot: str | None
):
    assert translated(**fields).chat.reasoning_effort == effort
    if of_a_model_that_cannot in (None, "none"):
        assert translated(can_think=False, **fields).chat.reasoning_effort == of_a_model_that_cannot
    else:
        assert of_a_model_that_cannot in refusal(can_think=False, **fields)


def test_a_last_message_of_the_assistant_is_gone_on_with():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "The answer is ("}]
    chat = translated(messages=turns).chat
    assert (chat.messages[-1].text, chat.continue_final_message) == ("The answer is (", True)
    assert not translated().chat.continue_final_message
    (only,) = translated(messages=[turns[0], {"role": "assistant", "content": []}]).chat.messages
    assert only.text == "a"


@pytest.mark.parametrize(
    ("last", "fields", "why"),
    [
        ([CALL], {"tools": [WEATHER]}, "'tool_use'"),
        ([{"type": "thinking", "thinking": "hm"}], {}, "no text"),
        ("a", {"tools": [WEATHER], "tool_choice": {"type": "any"}}, "enforced"),
        ("a", {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, "enforced"),
    ],
)
def test_a_last_message_that_cannot_be_gone_on_with_is_refused(last: Any, fields: dict[str, Any], why: str):
    message = refusal(messages=[*BODY["messages"], {"role": "assistant", "content": last}], **fields)
    assert message.startswith("The answer cannot go on with 'messages[1]'") and why in message


def test_nothing_to_answer_is_refused():
    assert "'messages'" in refusal(messages=[{"role": "assistant", "content": ""}])


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"), (None, None)],
)
def test_the_choice_of_a_tool_has_other_names(choice: Any, said: str | None):
    chat = translated(tools=[WEATHER], tool_choice=choice).chat
    assert chat.tool_choice == said
    assert chat.parallel_tool_calls is None


def test_sampling_and_limits_are_passed_on():
    chat = translated(temperature=0.5, top_p=0.25, top_k=7, stream=True).chat
    assert (chat.temperature, chat.top_p, chat.top_k, chat.stream, chat.token_limit) == (0.5, 0.25, 7, True, 9)


def test_a_result_without_its_call_is_refused():
    message = refusal(messages=said(result("sunny")))
    assert message == "'messages[0].content[0].tool_use_id' names no 'tool_use' block of an earlier message."


@pytest.mark.parametrize(
    ("param", "own"),
    [
        ("messages[1].tool_calls", "messages[0].content[1].content"),
        ("tools[2].function.parameters.properties.x", "tools[2].input_schema.properties.x"),
        ("tools[0].function.name", "tools[0].name"),
        ("response_format", "output_config.format"),
        ("response_format.json_schema.schema.oneOf", "output_config.format.schema.oneOf"),
        ("stop[1]", "stop_sequences[1]"),
        ("max_completion_tokens", "max_tokens"),
        ("messages", "messages"),
        ("stopping", "stopping"),
    ],
)
def test_errors_of_the_chat_name_what_the_client_has_sent(param: str, own: str):
    translation = translated()
    translation.origins[:] = ["system", "messages[0].content[1]"]
    error = translation.in_own_words(UnsupportedParameter(f"No place for '{param}'.", param=param))
    assert isinstance(error, UnsupportedParameter)
    assert (error.message, error.param) == (f"No place for '{own}'.", own)


def test_an_error_about_no_field_stays_as_it_is():
    error = ApiError("gone", retry_after_s=3)
    assert translated().in_own_words(error) is error


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "'messages'"),
        ({"messages": said({"type": "image", "source": {}})}, "'messages[0].content[0].type': 'image'"),
        ({"messages": said({"type": "document", "source": {}})}, "'messages[0].content[0].type': 'document'"),
        ({"messages": said({**text("a"), "citations": [{}]})}, "'messages[0].content[0].citations'"),
        ({"messages": said()}, "'messages[0].content'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}]}, "'tools[0].type'"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "'tools[0].defer_loading'"),
        ({"tools": [WEATHER, WEATHER]}, "tools: Two tools"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "'thinking.budget_tokens'"),
        ({"thinking": {"type": "between_tools"}}, "'thinking.type'"),
        ({"max_tokens": None}, "'max_tokens'"),
        ({"max_tokens": 0, "stream": True}, "'max_tokens'"),
        ({"temperature": 1.1}, "'temperature'"),
        ({"stop_sequences": ["x"] * 65}, "'stop_sequences'"),
        ({"container": "c"}, "'container'"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "'context_management'"),
        ({"mcp_servers": [{}]}, "'mcp_servers'"),
        ({"inference_geo": "us"}, "'inference_geo'"),
        ({"speed": "fast"}, "'speed'"),
        ({"output_config": {"task_budget": {}}}, "'output_config.task_budget'"),
        ({"seed": 1}, "Unknown parameter: 'seed'"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_its_name(fields: dict[str, Any], named: str):
    assert named in refusal(**fields)


def test_null_and_values_that_ask_for_nothing_are_fine():
    nothing = {
        "system": None,
        "stop_sequences": None,
        "temperature": None,
        "top_k": None,
        "tools": None,
        "tool_choice": None,
        "thinking": None,
        "metadata": {"user_id": None},
        "service_tier": "standard_only",
        "container": None,
        "mcp_servers": [],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "diagnostics": {"previous_message_id": None},
        "fallbacks": "default",
        "speed": "standard",
        "cache_control": {"type": "ephemeral"},
        "output_config": {"effort": None, "format": None},
    }
    assert translated(**nothing).chat == translated().chat
