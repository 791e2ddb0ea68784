from __future__ import annotations

import pytest

from client.data.chat import checked, encode
from fedtune.errors import DataError

TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "on the log"},
]
PLAIN = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ message['content'] + eos_token }}",
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}",
)
# Reasoning models leave the earlier answers' thoughts out, so an earlier turn changes when another follows.
FORGETFUL = PLAIN.replace("message['content'] + eos_token", "(message['content'] if loop.last else '…') + eos_token")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_is_learnt(tokenizer, template):
    tokenizer.chat_template = template
    ids, learnt = encode(TURNS, tokenizer, "row 1")
    whole = "<bos>[user]the cat[assistant]sat<eos>[user]the dog[assistant]on the log<eos>"
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt]) == (
        "sat<eos>on the log<eos>"
    )


def test_a_conversation_without_the_assistant_learns_nothing(tokenizer):
    for tokenizer.chat_template in (PLAIN, MARKED):
        assert not any(encode(TURNS[:1], tokenizer, "row 1")[1])


def test_the_assistant_may_begin(tokenizer):
    tokenizer.chat_template = PLAIN
    ids, learnt = encode(TURNS[1:2], tokenizer, "row 1")
    assert len(ids) == len(learnt)
    assert any(learnt)


def refused(messages, tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"^ann\.jsonl") as error:
        encode(checked(messages, "ann.jsonl"), tokenizer, "ann.jsonl")
    return str(error.value)


def test_no_chat_template(tokenizer):
    message = refused(TURNS, tokenizer, None)
    assert "has no chat template; take an instruction-tuned model (model.path)" in message


def test_a_template_that_changes_earlier_turns(tokenizer):
    message = refused(TURNS, tokenizer, FORGETFUL)
    assert "ann.jsonl: the chat template renders the conversation up to message 2 otherwise once more follows" in message
    assert "{% generation %}" in message
    tokenizer.chat_template = FORGETFUL
    assert any(encode(TURNS[:2], tokenizer, "one turn")[1])  # as the message advises


def test_a_template_that_refuses_the_conversation(tokenizer):
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    assert "the chat template refuses the conversation: one turn only" in refused(TURNS, tokenizer, template)


@pytest.mark.parametrize("messages", [[], "hello", None, [{"role": "user"}], ["hello"], [{"role": "user", "content": 3}]])
def test_messages_that_are_none(tokenizer, messages):
    assert 'wanted [{"role": "user", "content": "…"}' in refused(messages, tokenizer, PLAIN)
