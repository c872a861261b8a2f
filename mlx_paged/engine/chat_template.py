"""From a conversation to token ids, by the model's own chat template."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from mlx_paged.config import excerpt
from mlx_paged.sampling_params import as_list, is_text

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, and what else a template knows: tool_calls, reasoning_content ...; content is text or
a list of {"type": "text", "text": ...}."""


_INSTRUCTING = ("system", "developer")


class TemplateOptions(TypedDict, total=False):
    """What a template may use beside the messages."""

    tools: Sequence[Mapping[str, Any]] | None
    """Functions that the model may call, as JSON schemas in OpenAI's form."""
    documents: Sequence[Mapping[str, Any]] | None
    """Texts to answer from, each with a "title" and a "text"."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Any other variable of the template, such as enable_thinking."""


class ConversationTokens(list[int]):
    """The token ids of a conversation."""

    num_opening: int = 0
    """How many of the first ones come before all that is said: tools and system message, with which other conversations
    may begin too. 0 where nobody wants to know."""


class ChatTemplate:
    """Writes conversations as a tokenizer's chat template does. May be used by several threads."""

    finds_openings = False
    """Whether `ConversationTokens.num_opening` is of use."""

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        """lock: held while the tokenizer is used."""
        self._tokenizer = tokenizer
        self._lock = lock

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has one."""
        return self._tokenizer is not None and bool(self._tokenizer.has_chat_template)

    @property
    def knows_tools(self) -> bool:
        """Whether it says anything about tool calls; one that is code does."""
        template = getattr(self._tokenizer, "chat_template", None)
        return not isinstance(template, str) or "tool" in template

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ConversationTokens:
        """Write a conversation, ready for the answer. Returns its token ids.

        The other arguments are those of `TemplateOptions`. Raises TypeError for what is no conversation, ValueError for
        one that the template, or a model that reads text, can't take, with the reason.
        """
        conversation = as_list(messages)
        if conversation is None:
            content = excerpt(messages) if isinstance(messages, str) else "..."
            what = f'messages must be a list such as [{{"role": "user", "content": {content}}}]'
            raise TypeError(f"{what}, got {excerpt(messages)}")
        if not conversation:
            raise ValueError("the conversation is empty: give it at least one message")
        if not self.exists:
            raise ValueError("the model has no chat template: use generate with a plain prompt")
        conversation = [_plain(f"messages[{i}]", message) for i, message in enumerate(conversation)]
        if not self.knows_tools:
            conversation = list(map(_without_tools, conversation))
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise TypeError(f"chat_template_kwargs must be a mapping, got {excerpt(chat_template_kwargs)}")
        given = {"tools": tools, "documents": documents, **(chat_template_kwargs or {})}
        variables = {name: value for name, value in given.items() if value is not None}
        variables.setdefault("add_generation_prompt", not variables.get("continue_final_message"))
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(conversation, tokenize=False, **variables)
        except Exception as error:  # a template is a program: it raises what it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the model's chat template does not take this conversation: {reason}") from error
        if not is_text(text):
            raise ValueError("the conversation is not UTF-8 text: it has half of a surrogate pair")
        opening = self._opening(conversation, variables, text) if self.finds_openings else ""
        with self._lock:
            tokens = ConversationTokens(self._tokenizer.encode(text, add_special_tokens=False))
            if opening:  # what follows may be one token with its last one
                tokens.num_opening = len(self._tokenizer.encode(opening, add_special_tokens=False)) - 1
        return tokens

    def _opening(self, conversation: list[dict[str, Any]], variables: dict[str, Any], text: str) -> str:
        """What a conversation's text begins with before anybody says anything."""
        first = next((i for i, each in enumerate(conversation) if each["role"] not in _INSTRUCTING), len(conversation))
        others = [*conversation[:first], {"role": "user", "content": "\ue000"}]
        try:
            with self._lock:
                other = self._tokenizer.apply_chat_template(others, tokenize=False, **variables)
        except Exception:  # a template may ask for more than that
            return ""
        differs = (i for i, (one, another) in enumerate(zip(text, other, strict=False)) if one != another)
        return text[: next(differs, len(other))]


def _plain(name: str, message: Any) -> dict[str, Any]:
    """Make a message as templates expect it, its content as text. Raises ValueError, which calls it by `name`."""
    if not isinstance(message, Mapping):
        raise ValueError(f'{name} must have a "role" and a "content", got {excerpt(message)}')
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{name}: role must be text, got {excerpt(message.get('role'))}")
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    if not ({"content", "tool_calls"} & message.keys()):
        raise ValueError(f"{name} has no content")
    if isinstance(content, list | tuple):
        content = "".join(_text_of(f"{name}: content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be text or a list of parts, got {excerpt(content)}")
    plain["content"] = content
    if "tool_calls" in plain:
        if (calls := as_list(plain["tool_calls"])) is None:
            raise ValueError(f"{name}: tool_calls must be a list, got {excerpt(plain['tool_calls'])}")
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _text_of(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        what = f"a part of type {excerpt(kind)}" if kind is not None else excerpt(part)
        raise ValueError(f'{name}: the model reads text, {{"type": "text", "text": ...}}, and this is {what}')
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{name}: text must be text, got {excerpt(part.get('text'))}")
    return str(part["text"])


def _plain_call(call: Any) -> Any:
    """Make a tool call as templates expect it: its arguments an object, where they come as the JSON of one."""
    try:
        function = dict(call["function"])
        arguments = json.loads(function.get("arguments") or "{}")
    except (KeyError, TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _without_tools(message: dict[str, Any]) -> dict[str, Any]:
    """Write a message's calls, or the result that it is, into its text, for a template that knows neither."""
    content = message["content"]
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [call.get("function") if isinstance(call, Mapping) else call for call in message.get("tool_calls", ())]
    written = [f"<tool_call>\n{json.dumps(each, ensure_ascii=False, default=str)}\n</tool_call>" for each in calls]
    return {**message, "content": "\n".join(filter(None, [content, *written]))}
