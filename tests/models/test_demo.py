"""The bundled demo model: it remembers what stands many blocks back, and only if those blocks are the right ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers.budget import budget

from mlx_paged import LLM, SamplingParams
from mlx_paged.attention.metadata import AttentionMetadata
from mlx_paged.models.demo.stories import Fact, Story, held_out_story, is_held_out, question_prompt
from mlx_paged.runner import input_builder as batch

BLOCK_SIZE = 16
NUM_QUESTIONS = budget(40, 400)
ANSWER = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(block_size=BLOCK_SIZE, num_kv_blocks=2000, max_num_seqs=32)


def held_out_questions(count: int = NUM_QUESTIONS) -> list[tuple[Story, Fact]]:
    """Questions about stories that no training text contains."""
    questions: list[tuple[Story, Fact]] = []
    index = 0
    while len(questions) < count:
        story = held_out_story(index)
        assert is_held_out(story.text)
        questions += [(story, fact) for fact in story.facts]
        index += 1
    return questions[:count]


def encode(llm: LLM, story: Story, fact: Fact) -> list[int]:
    return llm.encode_chat([{"role": "user", "content": question_prompt(story, fact)}])


def share_of_right_answers(llm: LLM, count: int = NUM_QUESTIONS) -> float:
    questions = held_out_questions(count)
    outputs = llm.generate([encode(llm, story, fact) for story, fact in questions], ANSWER)
    right = [output.outputs[0].text == fact.answer for output, (_, fact) in zip(outputs, questions, strict=True)]
    return sum(right) / len(right)


def test_facts_stand_more_than_four_blocks_before_the_answer(llm: LLM) -> None:
    for story, fact in held_out_questions():
        before_fact = story.text[: story.text.index(fact.value)]
        num_tokens_before = len(llm.tokenizer.encode(before_fact)) + 8  # the template's own tokens at the start
        assert len(encode(llm, story, fact)) - num_tokens_before > 4 * BLOCK_SIZE


def test_at_least_95_percent_of_held_out_questions_are_answered_right(llm: LLM) -> None:
    assert share_of_right_answers(llm) >= 0.95


def test_a_block_of_another_sequence_in_a_table_ruins_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class MixedUp(AttentionMetadata):
        def __init__(self, block_tables: mx.array, *rest: Any, **slots: mx.array) -> None:
            block_tables = mx.array(block_tables)
            block_tables[:, 1] = mx.roll(block_tables[:, 1], 1)  # each reads its second block from its neighbour
            super().__init__(block_tables, *rest, **slots)

    monkeypatch.setattr(batch, "AttentionMetadata", MixedUp)
    llm = LLM(block_size=BLOCK_SIZE, num_kv_blocks=2000, max_num_seqs=32, prefix_caching=False)
    assert share_of_right_answers(llm, count=12) < 0.9


@pytest.mark.parametrize("prompt", ["Tell me a story.", "Write a story about a garden."])
def test_it_tells_a_story_that_ends(llm: LLM, prompt: str) -> None:
    output = llm.chat([{"role": "user", "content": prompt}], SamplingParams(temperature=0, max_tokens=500)).outputs[0]
    sentences = output.text.split(". ")
    assert output.finish_reason == "stop"
    assert len(sentences) >= 8
    assert len(set(sentences)) > 0.8 * len(sentences), "it repeats itself"
    assert output.text[0].isupper()
    assert output.text.rstrip()[-1] in ".!?"


def test_a_conversation_goes_on_from_the_blocks_of_its_earlier_turns(llm: LLM) -> None:
    story = held_out_story(0)
    messages = [{"role": "user", "content": question_prompt(story, story.facts[0])}]
    first = llm.chat(messages, ANSWER)
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": story.facts[1].question},
    ]
    second = llm.chat(messages, ANSWER)
    known = len(first.prompt_token_ids) + len(first.outputs[0].token_ids)
    assert second.num_cached_tokens >= known - BLOCK_SIZE
    assert second.outputs[0].text == story.facts[1].answer


def test_mlx_lm_loads_the_folder_too(demo_folder: Path) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(demo_folder))
    messages = [{"role": "user", "content": "Tell me a story."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert len(mlx_lm.generate(model, tokenizer, prompt, max_tokens=12).split()) >= 6


def test_the_folder_stays_small(demo_folder: Path) -> None:
    assert sum(path.stat().st_size for path in demo_folder.iterdir() if path.is_file()) <= 8_000_000
