"""What a client is told when something is wrong, in the form of the dialect that it speaks."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


_MAX_MESSAGE = 2000  # characters, of what a client has sent not all


class ApiError(Exception):
    """A request that is refused, or that ends without its answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        """retry_after: seconds until the same request may do better; 0: it would fare the same."""
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 3]}..."
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _OPENAI_TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        default = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, default)
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def response(self, path: str, request_id: str) -> Response:
        """The whole answer, in the dialect of the endpoint at `path`."""
        body = self.anthropic(request_id) if path.startswith("/v1/messages") else self.openai()
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        return JSONResponse(body, self.status, headers)


class PromptRefused(ApiError):
    """A prompt that is longer than the context, in the words that each dialect's clients look for."""

    def __init__(self, message: str, num_tokens: int | None, most: int | None, param: str | None) -> None:
        """num_tokens: of the prompt. most: that a prompt may have. param: the field that it came in."""
        super().__init__(400, message, param=param, code="context_length_exceeded")
        self._numbers = num_tokens, most

    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read, some of which know the case by its message alone."""
        body = super().openai()
        body["error"]["message"] = f"This model's maximum context length is {self._numbers[1]} tokens: {self.message}"
        return body

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        body = super().anthropic(request_id)
        body["error"]["message"] = "prompt is too long: {} tokens > {} maximum".format(*self._numbers)
        return body


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that asks for what can't be done."""
    return ApiError(400, message, param=param, code=code)
