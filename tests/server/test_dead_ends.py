"""A form that no output can complete is the request's own fault, and told so by every dialect."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from helpers.servers import post

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER: Any = [{"role": "user", "content": "hi"}]
ASKED: dict[str, Any] = {
    CHAT: {"messages": USER, "max_tokens": 500},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 500},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"messages": USER, "max_tokens": 500},
}
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
NO_TOKEN = {"guided_regex": "[ab]{30}", "bad_words": ["a", "b"]}
CASES = [
    (CHAT, {"guided_grammar": 'start: "a" start'}, "can't be completed"),
    (CHAT, {"guided_json": ENDLESS}, "can't be completed"),
    *((path, NO_TOKEN, "leave no token") for path in ASKED),
]


@pytest.mark.parametrize("path, form, reason", CASES)
def test_a_form_that_can_not_be_completed_is_a_bad_request_with_the_reason(
    path: str, form: dict[str, Any], reason: str, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        whole = post(url + path, ASKED[path] | form)
        stream = post(url + path, ASKED[path] | form | {"stream": True})
    assert whole.status_code == 400 and not caplog.messages
    error = whole.json()["error"]
    assert error["type"] == "invalid_request_error" and reason in error["message"]
    assert "ValueError" not in error["message"] and "DeadEnd" not in error["message"]
    last = json.loads([line for line in stream.text.splitlines() if line.startswith("data: ")][-1][6:])
    if path == RESPONSES:
        assert last["type"] == "response.failed"
        assert last["response"]["error"] == {"code": "invalid_prompt", "message": error["message"]}
    else:
        assert last["error"] == error
