import asyncio
import json
import threading
from typing import Any

import pytest

from api import validation
from api.errors import ApiError, InvalidRequest, UnknownParameter, UnsupportedParameter, error_object
from api.schemas.anthropic import MessagesRequest
from api.schemas.chat import AssistantMessage, ChatCompletionRequest
from api.schemas.responses import ENCRYPTED_REASONING, LOGPROBS, InputItemsQuery, ResponseRequest
from api.validation import parse_request, validate

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
EVERYWHERE = {"model": "m", "messages": [USER], "max_tokens": 5}  # what each endpoint needs of these is enough for it
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse(unknown_fields: Any = "reject", **fields: Any) -> tuple[ChatCompletionRequest, list[str]]:
    return validate(ChatCompletionRequest, {"model": "m", "messages": [USER], **fields}, unknown_fields)


def message(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse(messages=[fields])
    return raised.value


def test_the_smallest_request_asks_for_nothing_special():
    request, ignored = parse()
    assert ignored == []
    assert request.token_limit is None
    assert not request.stream
    assert not request.include_usage


def test_null_is_as_good_as_absent_for_every_optional_field():
    optional = [name for name, field in ChatCompletionRequest.model_fields.items() if not field.is_required()]
    request, _ = parse(**dict.fromkeys(optional))
    assert request.token_limit is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("logprobs", False),
        ("top_logprobs", 0),
        ("stream", False),
        ("store", False),
        ("tools", []),
        ("tool_choice", "none"),
        ("tool_choice", "auto"),
        ("parallel_tool_calls", True),
        ("parallel_tool_calls", False),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("service_tier", "auto"),
        ("reasoning_effort", "medium"),
        ("verbosity", "medium"),
        ("stop", []),
        ("logit_bias", {}),
        ("metadata", {"a": "b"}),
        ("user", "me"),
    ],
)
def test_a_default_spelt_out_is_fine(field: str, value: Any):
    parse(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("prompt_cache_options", {"mode": "implicit"}),
        ("prompt_cache_retention", "24h"),
        ("verbosity", "low"),
        ("service_tier", "priority"),
        ("store", True),
        ("moderation", {"model": "m"}),
        ("web_search_options", {}),
    ],
)
def test_a_documented_field_that_is_not_done_is_named(field: str, value: Any):
    with pytest.raises(UnsupportedParameter, match=f"'{field}'") as raised:
        parse(**{field: value})
    assert raised.value.param == field


@pytest.mark.parametrize(
    ("schema", "fields", "instead"),
    [
        (ChatCompletionRequest, {"verbosity": "low"}, 'null or "medium".'),
        (ChatCompletionRequest, {"service_tier": "priority"}, 'null, "auto" or "default".'),
        (ChatCompletionRequest, {"audio": {}}, "send null."),
        (ResponseRequest, {"include": ["file_search_call.results"]}, f'"{LOGPROBS}" or "{ENCRYPTED_REASONING}".'),
    ],
)
def test_a_value_that_is_not_done_is_answered_with_those_that_are(schema: Any, fields: dict[str, Any], instead: str):
    body = {name: value for name, value in EVERYWHERE.items() if name in schema.model_fields}
    with pytest.raises(UnsupportedParameter) as raised:
        validate(schema, body | fields, "reject")
    assert raised.value.message.endswith(instead)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": None}, "invalid_type", "model"),
        ({"messages": []}, "empty_array", "messages"),
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": ["hi"]}, "invalid_type", "messages[0]"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": 2.1}, "decimal_above_max_value", "temperature"),
        ({"temperature": -0.1}, "decimal_below_min_value", "temperature"),
        ({"temperature": 10**400}, "invalid_type", "temperature"),
        ({"top_p": 1.5}, "decimal_above_max_value", "top_p"),
        ({"min_p": -1}, "decimal_below_min_value", "min_p"),
        ({"top_k": 1.5}, "invalid_type", "top_k"),
        ({"top_k": -2}, "integer_below_min_value", "top_k"),
        ({"max_tokens": 0}, "integer_below_min_value", "max_tokens"),
        ({"max_completion_tokens": -1}, "integer_below_min_value", "max_completion_tokens"),
        ({"max_tokens": 10**30}, "integer_above_max_value", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "invalid_value", "max_tokens"),
        ({"presence_penalty": 3}, "decimal_above_max_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "decimal_below_min_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "decimal_below_min_value", "repetition_penalty"),
        ({"seed": 2**63}, "integer_above_max_value", "seed"),
        ({"seed": 1.5}, "invalid_type", "seed"),
        ({"priority": True}, "invalid_type", "priority"),
        ({"priority": 1.0}, "invalid_type", "priority"),
        ({"priority": 2**31}, "integer_above_max_value", "priority"),
        ({"priority": -(2**31) - 1}, "integer_below_min_value", "priority"),
        ({"stop": ""}, "empty_string", "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "array_above_max_length", "stop"),
        ({"stop": ["a", 1]}, "invalid_type", "stop[1]"),
        ({"stop": "x" * 1025}, "string_above_max_length", "stop"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"1": 1, "01": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"7": 101}}, "decimal_above_max_value", "logit_bias.7"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, None, "stream_options.include_obfuscation"),
        ({"user": 5}, "invalid_type", "user"),
        ({"metadata": {"a": 5}}, "invalid_type", "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "object_above_max_length", "metadata"),
        ({"n": 0}, "integer_below_min_value", "n"),
        ({"n": 129}, "integer_above_max_value", "n"),
        ({"n": True}, "invalid_type", "n"),  # equal to 1 in Python
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "integer_above_max_value", "top_logprobs"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"min_tokens": -1}, "integer_below_min_value", "min_tokens"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
        ({"tools": [{"type": "custom"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [TOOL, TOOL]}, "invalid_value", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 1}, "invalid_value", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "invalid_value",
            "tool_choice",
        ),
        ({"reasoning_effort": "extreme"}, "invalid_value", "reasoning_effort"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_its_field(fields: dict[str, Any], code: str | None, param: str):
    with pytest.raises(InvalidRequest) as raised:
        parse(**fields)
    error = error_object(raised.value)["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["code"] == (code or "unsupported_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": [{"role": None, "content": "hi"}]}, "messages[0].role", "expected one of 'system', 'developer'"),
        ({"messages": [{"role": [], "content": "hi"}]}, "messages[0].role", "but got an array"),
        ({"response_format": {"type": None}}, "response_format.type", "expected one of 'text', 'json_object'"),
        ({"tools": [TOOL | {"type": None}]}, "tools[0].type", "expected one of 'function', but got null"),
        ({"reasoning_effort": True}, "reasoning_effort", "expected one of 'none', 'minimal'"),
        ({"stop": 5}, "stop", "expected a string or an array of strings, but got an integer"),
    ],
)
def test_a_value_of_a_wrong_type_is_answered_with_what_it_may_be(fields: dict[str, Any], param: str, says: str):
    with pytest.raises(InvalidRequest) as raised:
        parse(**fields)
    assert raised.value.param == param and raised.value.code == "invalid_type"
    assert says in raised.value.message


@pytest.mark.parametrize(
    ("schema", "kind"),
    [(ChatCompletionRequest, "custom"), (ResponseRequest, "web_search"), (MessagesRequest, "web_search_20250305")],
)
def test_a_tool_that_nobody_here_runs_is_answered_with_what_the_user_can_do(schema: Any, kind: str):
    body = {name: value for name, value in EVERYWHERE.items() if name in schema.model_fields}
    with pytest.raises(InvalidRequest, match=f"'tools\\[0\\].type': '{kind}'.*switched off in the client"):
        validate(schema, body | {"tools": [{"type": kind, "name": "x"}]}, "reject")


def test_a_number_in_a_query_is_an_integer_where_its_field_is_one():
    with pytest.raises(InvalidRequest) as raised:
        validate(InputItemsQuery, {"limit": "0"}, "reject")
    assert raised.value.code == "integer_below_min_value"


def test_a_missing_field_is_named():
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'messages'") as raised:
        validate(ChatCompletionRequest, {"model": "m"}, "reject")
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.name"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"name": "a"}}}}, "text.format.name"),
    ],
)
def test_a_field_that_is_missing_is_not_looked_for_in_what_is_called_as_the_type_is(fields: dict[str, Any], param: str):
    with pytest.raises(InvalidRequest) as raised:  # a chat's form: it has the name, one object deeper
        validate(ResponseRequest, {"model": "m", "input": "hi", **fields}, "reject")
    assert (raised.value.param, raised.value.code) == (param, "missing_required_parameter")


def test_messages_are_judged_by_their_role():
    assert message(content="x").param == "messages[0].role"
    assert "'bob'" in message(role="bob", content="x").message
    assert message(role="user").param == "messages[0].content"
    assert message(role="user", content=None).param == "messages[0].content"
    assert message(role="user", content=[]).code == "empty_array"
    assert message(role="tool", content="x").param == "messages[0].tool_call_id"
    assert message(role="assistant").param == "messages[0]"
    assert message(role="user", content="x", tool_calls=[CALL]).param == "messages[0].tool_calls"
    assert message(role="assistant", content="x", function_call={"name": "f"}).param == "messages[0].function_call"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_a_part_that_is_no_text_is_refused_by_name(kind: str):
    error = message(role="user", content=[{"type": "text", "text": "look"}, {"type": kind, kind: {}}])
    assert error.param == "messages[0].content[1].type"
    assert f"'{kind}'" in error.message
    assert ("reads text only" in error.message) == (kind != "refusal")


def test_text_parts_are_one_text():
    request, _ = parse(messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}])
    assert request.messages[0].text == "ab"


def test_an_answer_of_ours_can_be_sent_back_as_it_came():
    own: dict[str, Any] = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls"))
    parse(messages=[USER, {"role": "assistant", "content": "hello", "annotations": [], **own}, USER])


def test_a_tool_round_trip_is_understood():
    own = {"content": None, "refusal": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
    request, _ = parse(messages=[USER, {"role": "assistant", **own}, tool])
    assistant = request.messages[1]
    assert isinstance(assistant, AssistantMessage)
    assert assistant.tool_calls is not None
    assert assistant.tool_calls[0].function.name == "f"


def test_an_answer_that_was_cut_while_it_reasoned_is_taken_without_content():
    request, _ = parse(messages=[USER, {"role": "assistant", "content": None, "reasoning_content": "Hm"}, USER])
    assert request.messages[1].text == ""


def test_a_tool_may_return_nothing():
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    request, _ = parse(messages=[USER, called, {"role": "tool", "tool_call_id": "call_1", "content": []}])
    assert request.messages[2].text == ""


def test_a_field_nobody_documents_is_refused_by_name_wherever_it_is():
    for fields, name in [
        ({"frobnicate": 1}, "frobnicate"),
        ({"messages": [{**USER, "mood": "good"}]}, "messages[0].mood"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ]:
        with pytest.raises(UnknownParameter) as raised:
            parse(**fields)
        assert raised.value.param == name


@pytest.mark.parametrize(
    ("schema", "fields", "meant"),
    [
        (ChatCompletionRequest, {"max_token": 5}, "max_tokens"),
        (ChatCompletionRequest, {"messages": [{**USER, "nam": "x"}]}, "messages[0].name"),
        (ChatCompletionRequest, {"tools": [{**TOOL, "functions": {}}]}, "tools[0].function"),
        (ResponseRequest, {"max_tokens": 5}, "max_output_tokens"),
        (ResponseRequest, {"input": [{**USER, "contents": "x"}]}, "input[0].content"),
        (InputItemsQuery, {"limits": "5"}, "limit"),
        (ChatCompletionRequest, {"frobnicate": 1}, None),
        (ChatCompletionRequest, {"messages": [{**USER, "tool_calls": []}]}, None),  # the assistant's
        (MessagesRequest, {"seed": 1}, None),  # like speed, which is not done
        (ChatCompletionRequest, {"max_token" + "s" * 5_000_000: 5}, None),
    ],
)
def test_a_misspelt_field_is_answered_with_the_one_it_is_like(schema: Any, fields: dict[str, Any], meant: str | None):
    body = {name: value for name, value in EVERYWHERE.items() if name in schema.model_fields}
    with pytest.raises(UnknownParameter) as raised:
        validate(schema, body | fields, "reject")
    suggested = f"Did you mean '{meant}'?"
    assert suggested in raised.value.message if meant else "Did you mean" not in raised.value.message
    assert "UNKNOWN_FIELDS=warn" in raised.value.message


def test_unknown_fields_are_left_out_and_reported_where_the_settings_say_so():
    part = {"type": "text", "text": "hi", "weight": 2}
    messages = [{"role": "user", "content": [part], "mood": "good"}]
    request, ignored = parse("warn", messages=messages, frobnicate=1)
    assert set(ignored) == {"frobnicate", "messages[0].mood", "messages[0].content[0].weight"}
    assert request.messages[0].text == "hi"
    assert part["weight"] == 2  # what the caller holds is not changed


def test_a_wrong_value_is_refused_also_where_unknown_fields_are_not():
    with pytest.raises(InvalidRequest) as raised:
        parse("warn", frobnicate=1, temperature=9)
    assert raised.value.param == "temperature"


def test_too_many_unknown_fields_are_refused_even_where_some_are_let_pass():
    with pytest.raises(UnknownParameter) as raised:
        parse("warn", **{f"field{number}": 1 for number in range(101)})
    assert "UNKNOWN_FIELDS" not in raised.value.message  # it is set so already


def test_a_million_wrong_messages_are_one_error():
    with pytest.raises(InvalidRequest) as raised:
        parse(messages=[1] * 1_000_000)
    assert raised.value.param == "messages[0]"


def test_what_is_nested_deeply_can_be_refused():
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    for fields in ({"model": nested}, {"temperature": nested}, {"messages": [{"role": nested, "content": "x"}]}):
        with pytest.raises(InvalidRequest):
            parse(**fields)


def test_a_large_body_is_parsed_off_the_event_loop(monkeypatch: pytest.MonkeyPatch):
    threads: list[str] = []

    def parse_here(body: bytes) -> dict[str, Any]:
        threads.append(threading.current_thread().name)
        return json.loads(body)

    monkeypatch.setattr(validation, "parse_json_object", parse_here)
    for size in (10, validation.LARGE_BODY_BYTES):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}]}).encode()
        request, _ = asyncio.run(parse_request(ChatCompletionRequest, body, "reject"))
        assert len(request.messages[0].text) == size
    assert threads[0] == threading.main_thread().name != threads[1]


def test_one_stop_string_is_a_list_of_one():
    assert parse(stop="end")[0].stop == ["end"]


def test_minus_one_switches_top_k_off_as_in_vllm():
    assert parse(top_k=-1)[0].top_k == 0
