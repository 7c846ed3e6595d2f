"""Conversations as the tokenizer's chat template writes them, and which of the tokens are the assistant's."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from slsam_ds.cli.labels import IGNORED, agreement, masked
from slsam_ds.cli.refusal import UsageError, path_of, refusals

Message = dict[str, Any]


def use_template(tokenizer: PreTrainedTokenizerBase, asked: str | None) -> None:
    """Make a chat template the tokenizer's only one, which is saved with the model.

    Args:
        tokenizer: Gets the template.
        asked: The name of one of its templates, or a file with another one; None: leave them as they are.

    Raises:
        UsageError: Neither.
    """
    if asked is None:
        return
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if asked in named:
        tokenizer.chat_template = named[asked]
        return
    flag = f"--chat_template {asked}"
    path = path_of(flag, asked)
    if not path.is_file():
        there = f"the tokenizer has {', '.join(sorted(named))}" if named else "the tokenizer has no named templates"
        raise UsageError(f"{flag}: neither the name of a chat template nor a file; {there}")
    with refusals(OSError, UnicodeDecodeError, prefix=f"{flag}: cannot be read: "):
        tokenizer.chat_template = path.read_text(encoding="utf-8")


class Conversations:
    """From messages to token ids and labels.

    Where a tokenizer has several templates, `default` is used, and `tool_use` for conversations with tools.

    Args:
        tokenizer: Of the model, with a chat template.
        source: Names the data in messages.

    Raises:
        UsageError: Several chat templates, and none is the default one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self._tokenizer = tokenizer
        named = tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named:
            raise UsageError(
                f"{source}: the tokenizer's chat templates are {', '.join(sorted(named))}, and none is named default: "
                "choose one with --chat_template"
            )

    def encode(self, messages: list[Message], tools: list[Any] | None, where: str) -> tuple[list[int], list[int], int]:
        """Token ids, labels, and the number of assistant turns that could not be located.

        Args:
            messages: At least one; see `read_messages`. Turns of weight 0 are not learned.
            tools: What the assistant may call; see `read_tools`.
            where: Names the row in messages.

        Raises:
            UsageError: The template refuses them, or leaves something out.
        """
        with refusals(Exception, prefix=f"{where}: the chat template rejects it: "):  # it may compute anything
            self._check_complete(messages, tools, where)
            template = self._tokenizer.get_chat_template(tools=tools)
            leaves_out = any(message.get("weight") == 0 for message in messages)  # which marks cannot tell
            if "{% generation" in template.replace("{%-", "{%") and not leaves_out:
                out = self._tokenizer.apply_chat_template(
                    messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
                )
                ids = list(out["input_ids"])
                return ids, [token if on else IGNORED for token, on in zip(ids, out["assistant_masks"], strict=True)], 0
            text = self._render(messages, tools)
            spans = []
            for turn, message in enumerate(messages):
                if message["role"] == "assistant" and message.get("weight") != 0:
                    before = self._render(messages[:turn], tools, add_generation_prompt=True) if turn else ""
                    spans.append((before, self._render(messages[: turn + 1], tools)))
        ids = self._ids(text)
        located = [
            (agreement(self._ids(before), ids), agreement(self._ids(after), ids))
            for before, after in spans
            if text.startswith(before) and text.startswith(after)
        ]
        return ids, masked(ids, located), len(spans) - len(located)

    def _check_complete(self, messages: list[Message], tools: list[Any] | None, where: str) -> None:
        """Refuse to lose, in silence, what the template does not write."""
        silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        lost = None
        if tools and self._renders_alike((messages, tools), (messages, None)):
            lost = "tools"
        elif silent != messages and self._renders_alike((messages, tools), (silent, tools)):
            lost = "tool calls"
        if lost is not None:
            raise UsageError(
                f"{where}: the chat template leaves out the {lost}: choose one that writes them, with --chat_template"
            )

    def _renders_alike(self, given: tuple[Any, Any], others: tuple[Any, Any]) -> bool:
        text = self._render(*given)
        try:
            return text == self._render(*others)
        except Exception:  # what the template cannot do without, it writes
            return False

    def _render(self, messages: list[Message], tools: list[Any] | None, **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_messages(value: Any, where: str) -> list[Message]:
    """The messages of a row, without the empty keys that `datasets` fills in, and their parts of text joined.

    Args:
        value: A list of messages, or JSON of one; None: there are none.
        where: Names the column in messages.

    Raises:
        UsageError: It is anything else.
    """
    value = _parsed(value)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UsageError(f'{where}: expected a list of messages, like [{{"role": "user", "content": "..."}}]')
    return [_read_message(message, f"{where}: message {number}") for number, message in enumerate(value, start=1)]


def _read_message(value: Mapping[str, Any], where: str) -> Message:
    message = {key: item for key, item in value.items() if item is not None}
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_of(part, where) for part in message["content"])
    calls = message.get("tool_calls")
    for key in ("role",) if calls and "content" not in message else ("role", "content"):
        if not isinstance(message.get(key), str):
            raise UsageError(f"{where} has no {key} that is text")
        check_text(message[key], f"{where}: its {key}")
    return message


def _text_of(part: Any, where: str) -> str:
    """Of a part of a message, `{"type": "text", "text": ...}`."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UsageError(f'{where} has a part that is no text ({kind}); expected {{"type": "text", "text": "..."}}')


def read_tools(value: Any, where: str) -> list[Any] | None:
    """The tools of a row.

    Args:
        value: A list of JSON schemas, or JSON of one; None: there are none.
        where: Names the column in messages.

    Raises:
        UsageError: It is anything else.
    """
    value = _parsed(value)
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UsageError(f'{where}: expected a list of tools, like [{{"type": "function", "function": {{...}}}}]')
    return [dict(tool) for tool in value]


def _parsed(value: Any) -> Any:
    """What a text holds, as columns do of which files cannot have, or should not guess, the structure."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_text(value: Any, where: str) -> None:
    """Raises: UsageError: Not text, or text that no tokenizer takes."""
    if not isinstance(value, str):
        raise UsageError(f"{where} holds {type(value).__name__}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write it, but it is no character, and no tokenizer takes it
        raise UsageError(
            f"{where} holds half a surrogate pair, as character {error.start + 1}; expected text"
        ) from None
