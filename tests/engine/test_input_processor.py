"""What an engine refuses when it arrives: prompts and parameters that it could never serve."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.engines import GREEDY, MakeEngine, complete, is_idle, tokens_of
from helpers.other_tokenizers import wrapped
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mlx_paged import BeamSearchParams, SamplingParams


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "empty"),
        ("", "empty|tokenizer"),
        ([3, 97], "97 is outside the model's vocabulary of 97"),
        ([-1], "-1 is outside the model's vocabulary of 97"),
        ([1] * 33, "33 tokens.*32"),
        ("text", "no tokenizer"),
    ],
    ids=["no tokens", "no text", "above the vocabulary", "negative", "too long for the context", "text"],
)
def test_a_bad_prompt_is_refused_when_it_arrives_and_changes_nothing(
    make_engine: MakeEngine, prompt: Any, message: str
) -> None:
    engine = make_engine(max_model_len=32)
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt)
    assert is_idle(engine)
    assert engine.add_request([1, 2]) == 0


@pytest.mark.parametrize("prompt", [[1.0], ["a"], [True], [1, None]])
def test_a_prompt_of_other_things_than_token_ids_is_a_type_error(make_engine: MakeEngine, prompt: Any) -> None:
    with pytest.raises(TypeError, match="token ids"):
        make_engine().add_request(prompt)


def test_token_ids_may_be_numpy_integers(make_engine: MakeEngine) -> None:
    engine = make_engine()
    plain = complete(engine, [5, 6, 7], GREEDY)
    array = complete(engine, np.array([5, 6, 7], np.int32), GREEDY)
    assert tokens_of(array) == tokens_of(plain)
    assert all(type(token) is int for token in array.prompt_token_ids)


def test_a_prompt_that_can_never_fit_the_pool_is_refused_with_both_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(num_kv_blocks=4)
    with pytest.raises(ValueError, match=r"17 tokens .* need 5 blocks of 4 tokens and the pool has 4"):
        engine.add_request([1] * 17)
    with pytest.raises(ValueError, match=r"10 tokens and 8 more need 5 blocks of 4 tokens and the pool has 4"):
        engine.add_request([1] * 10, SamplingParams(max_tokens=8))
    assert len(tokens_of(complete(engine, [1] * 10, SamplingParams(temperature=0, max_tokens=7)))) == 7
    assert len(tokens_of(complete(engine, [1] * 16, SamplingParams(temperature=0)))) == 1
    assert is_idle(engine)


def test_a_prompt_as_long_as_the_context_leaves_no_room_and_one_shorter_leaves_a_token(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=20)
    with pytest.raises(ValueError, match="20 tokens and the context is 20"):
        engine.add_request([1] * 20)
    output = complete(engine, [1] * 19, SamplingParams(temperature=0)).outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_parameters_that_the_engine_can_never_serve_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=3)
    for params, message in (
        (BeamSearchParams(beam_width=4), "beam_width=4 .* max_num_seqs is 3"),
        (SamplingParams(stop="x"), "tokenizer"),
        (SamplingParams(logit_bias={97: 1.0}), "97 is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add_request([1], params)
    assert is_idle(engine)


@pytest.mark.parametrize(
    "single, before, behind",
    [
        ("$A", [], []),
        ("<s> $A", [1], []),
        ("<s> <pad> $A", [1, 3], []),
        ("$A </s>", [], [2]),
        ("<s> $A </s>", [1], [2]),
    ],
)
def test_a_text_gets_what_the_tokenizer_puts_before_it_only_once_and_nothing_behind_it(
    make_engine: MakeEngine, single: str, before: list[int], behind: list[int]
) -> None:
    tokenizer = words_with(single)
    plain = [4, 5]
    assert tokenizer.encode("the dog") == before + plain + behind, "the premise"
    engine = make_engine(tokenizer)
    for text, expected in (
        ("the dog", before + plain),
        ("<s> <pad> the dog", [1, 3, *plain]),
        ("<s> the dog", [1, *plain]),
        ("the dog</s>", [*before, *plain, 2]),
        ("<s>", [1]),
    ):
        assert engine.make_request(text, GREEDY).prompt_token_ids == expected
        assert make_engine(tokenizer).make_request(text, GREEDY).prompt_token_ids == expected, "as the first text"


def words_with(single: str) -> TokenizerWrapper:
    """A tokenizer of two words, and of texts written as `single` says."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "the": 4, "dog": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = [(name, vocabulary[name]) for name in ("<s>", "</s>", "<pad>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return wrapped(backend)
