"""The JSON object that a request brings: read within bounds, strictly, field by field."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, cast, overload

from starlette.types import Receive, Scope

from mlx_paged.server.errors import ApiError, bad_request

T = TypeVar("T")

_MAX_SHOWN = 100  # characters of a value in a message
_MAX_PARSED_AT_ONCE = 1 << 16  # bytes, beside which others need not wait
_MAX_VALUES = 2_000_000  # no thread does anything while so many are parsed, which takes a second
_SEPARATORS = (b",", b"[", b"{")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


class ClientDisconnected(Exception):
    """The client went away while its request was read."""


async def read_object(scope: Scope, receive: Receive, max_bytes: int, timeout: float) -> dict[str, Any]:
    """Read a request's body, which must be a JSON object.

    max_bytes: of the body. timeout: seconds in which all of it must have come. Raises ApiError.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise ApiError(415, "Content-Type must be application/json")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise ApiError(415, "Content-Encoding is not supported: send the body as it is")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout):
            content = await _read(receive, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {timeout:g} seconds") from None
    if len(content) < _MAX_PARSED_AT_ONCE:
        return parse_object(content)
    return await asyncio.to_thread(parse_object, content)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        content += message.get("body", b"")
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(content)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {max_bytes} bytes, the most that this server takes (--max-body)")


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse JSON as its standard has it: UTF-8, no NaN, no key twice. Raises ApiError."""
    if not content.strip():
        raise bad_request("the body is empty, and must be a JSON object")
    if sum(map(content.count, _SEPARATORS)) > _MAX_VALUES:
        raise bad_request(f"the body is too large for JSON: it has more than {_MAX_VALUES:,} commas and brackets")
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except RecursionError:
        raise bad_request("the JSON is nested too deep") from None
    except UnicodeEncodeError:
        raise bad_request("the JSON has half of a surrogate pair in it, which is no text") from None
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8") from None
    except ValueError as error:
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise bad_request(f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {show(twice)} stands twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def show(value: object) -> str:
    """A value as messages show it: in JSON, and not all of it."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class Fields:
    """The fields of a JSON object. One that is null counts as absent; what nobody has taken is left over."""

    def __init__(self, values: Any, where: str = "") -> None:
        """where: what the object is called in messages, as "messages[2]". Raises ApiError if it is no object."""
        if not isinstance(values, Mapping):
            raise bad_request(f"{where or 'it'} must be an object, got {show(values)}", param=where or None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self.where = where
        self.left = set(self._values)

    def path(self, name: str) -> str:
        """What a field is called in messages."""
        return f"{self.where}.{name}" if self.where else name

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @overload
    def take(self, name: str, kind: type[T]) -> T | None: ...
    @overload
    def take(self, name: str, kind: type[T], default: T) -> T: ...
    def take(self, name: str, kind: type[T], default: T | None = None) -> T | None:
        """Return a field that must be of a kind: bool, int, float (a whole number too), str, list or dict."""
        self.left.discard(name)
        value = self._values.get(name)
        if value is None:
            return default
        types: Any = (int, float) if kind is float else kind
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, f"must be {_NAMES[kind]}")
        return cast(T, value)

    def take_any(self, name: str) -> Any:
        """Return a field of whatever kind; None if it is absent."""
        self.left.discard(name)
        return self._values.get(name)

    def take_with(self, name: str, read: Callable[[Any], T]) -> T | None:
        """Return what `read` makes of a field, whose ValueError says what it must be; None if it is absent."""
        value = self.take_any(name)
        if value is None:
            return None
        try:
            return read(value)
        except (ValueError, TypeError) as error:
            raise self.error(name, str(error)) from None

    def error(self, name: str, problem: str) -> ApiError:
        """The error that a field has a value with this problem."""
        value = self._values.get(name)
        return bad_request(f"{self.path(name)} {problem}, got {show(value)}", param=self.path(name))
