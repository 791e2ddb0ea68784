"""Conversations through the tokenizer's chat template; only what the assistant says is learnt."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from client.allowance import shown
from fedtune.errors import DataError

Messages = list[dict[str, Any]]
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # templates that mark the assistant's part themselves


def checked(messages: Any, where: str) -> Messages:
    """The messages, if they are a list of {role, content}. Raises DataError."""
    wanted = 'wanted [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' is {shown(messages)}; {wanted}")
    for message in messages:
        whole = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not whole:
            raise DataError(f"{where}: a message is {shown(message)}; {wanted}")
    return messages


def encode(messages: Messages, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation, and which of them are the assistant's. Raises DataError."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"{where} has 'messages', and the tokenizer of the model has no chat template; "
            f"take an instruction-tuned model (model.path), or data with prompt + completion"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"{where} has 'messages', which need a fast tokenizer; give the model a tokenizer.json")
    try:
        return _marked(messages, tokenizer) if MARKED.search(template) else _found(messages, tokenizer, where)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the chat template refuses the conversation: {error}") from error


def _marked(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
    )
    return encoded["input_ids"], [bool(flag) for flag in encoded["assistant_masks"]]


def _found(messages: Messages, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """The assistant's part of a turn is what the rendering of the turn adds to the prompt for it."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = [
        _span(messages, turn, whole, tokenizer, where)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learnt = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learnt


def _span(messages: Messages, turn: int, whole: str, tokenizer: Any, where: str) -> tuple[int, int]:
    """Where the assistant's words of this turn begin and end in the rendered conversation."""
    prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True) if turn else ""
    answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    if not answered.startswith(prompt) or not whole.startswith(answered):
        raise DataError(
            f"{where}: the chat template renders the conversation up to message {turn + 1} otherwise once more follows, so "
            f"the assistant's tokens cannot be told; put {{% generation %}} into the template, or give one turn per row"
        )
    return len(prompt), len(answered)
