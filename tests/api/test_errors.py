import json

import pytest

from api import errors
from api.errors import ANSWERS, ApiError, InvalidRequest, QueueFull, Unauthorized, error_object, error_response


def subclasses(error: type[ApiError]) -> list[type[ApiError]]:
    return [found for child in error.__subclasses__() for found in (child, *subclasses(child))]


def test_every_error_has_a_line_in_the_table_and_in_the_drawing():
    assert set(ANSWERS) == set(subclasses(ApiError))
    for error, answer in ANSWERS.items():
        assert f"{error.__name__} " in (errors.__doc__ or "")
        assert str(answer.status) in (errors.__doc__ or "")


@pytest.mark.parametrize("error", ANSWERS, ids=lambda error: error.__name__)
def test_every_answer_is_an_error_object_of_openai(error: type[ApiError]):
    response = error_response(error("what is wrong", param="messages"))
    body = json.loads(bytes(response.body))
    assert response.status_code == ANSWERS[error].status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "what is wrong"
    assert body["error"]["param"] == "messages"


def test_the_error_s_own_code_wins_over_the_table_s():
    assert error_object(InvalidRequest("no", code="empty_array"))["error"]["code"] == "empty_array"


def test_a_full_queue_says_when_to_come_back():
    assert error_response(QueueFull("full", retry_after_s=5)).headers["retry-after"] == "5"


def test_a_missing_key_is_told_the_scheme():
    assert error_response(Unauthorized("no key")).headers["www-authenticate"] == "Bearer"
