"""The draft model that a configuration names, ready to run, if its vocabulary is the model's."""

import os
import warnings
from typing import Any

from mlx_paged.attention.chunks import check_chunks
from mlx_paged.config import EngineConfig, SpeculativeConfig, excerpt
from mlx_paged.errors import EngineWarning, ModelError, model_errors_of
from mlx_paged.models import loading
from mlx_paged.models.patch import PatchedModel, patch_model


def load_draft(
    model: PatchedModel, config: EngineConfig, tokenizer: Any, max_model_len: int | None
) -> PatchedModel | None:
    """Load the draft model, if one is asked for, as it is to be run. Raises ModelError for one that can't be used.

    model: whose tokens are guessed. An EngineWarning says where none can be: recurrent layers have no states to go
    back to. tokenizer: that model's, None if it has none.
    """
    asked = None if config.speculative_config is None else SpeculativeConfig.of(config.speculative_config)
    if asked is not None and model.num_entries:
        family = getattr(model.model, "model_type", type(model.model).__name__)
        text = f"{family} models run without drafts (speculative_config): their recurrent layers can't go back"
        warnings.warn(text, EngineWarning, stacklevel=5)
        return None
    if asked is None or asked.model is None:
        return None
    is_name = isinstance(asked.model, str | os.PathLike)
    if not (is_name or loading.is_model(asked.model)):
        wanted = "model must be a name, a folder, or an mlx-lm model that is already loaded"
        raise ModelError(f"speculative_config: {wanted}, got {excerpt(asked.model)}")
    name, draft_model = "the draft model", asked.model
    if is_name:
        name = f"draft model {asked.model}"
        with model_errors_of(name):
            draft_model, its_tokenizer, *_ = loading.load(asked.model, config.dtype)
        difference = None if tokenizer is None else first_difference(tokenizer.get_vocab(), its_tokenizer.get_vocab())
        if difference is not None:
            raise ModelError(f"{name} can't guess this model's tokens: {difference}; give one of the same vocabulary")
    context = loading.context_of_model(draft_model)
    if context is not None and asked.num_speculative_tokens >= context:
        wanted = f"num_speculative_tokens must be less than that, not {asked.num_speculative_tokens}"
        raise ModelError(f"{name} was made for {context} tokens of context: {wanted}")
    with model_errors_of(name):
        draft = patch_model(draft_model, max_model_len)
        if draft.chunked:
            check_chunks(draft.groups, config.block_size)
        draft = draft if config.kv_cache_dtype is None else draft.quantised(config.kv_cache_dtype)
    if draft.num_entries:
        raise ModelError(f"{name} has recurrent layers, which can't go back after a wrong guess: give another one")
    return draft


def first_difference(vocabulary: dict[str, int], other: dict[str, int]) -> str | None:
    """Say which is the first token id that two vocabularies give different texts; None if there is none.

    What only one of them has, as later versions of a tokenizer do, is never guessed right, and harms nothing.
    """
    texts, other_texts = ({token_id: text for text, token_id in each.items()} for each in (vocabulary, other))
    for token_id in sorted(texts.keys() & other_texts.keys()):
        if texts[token_id] != other_texts[token_id]:
            named = [excerpt(each[token_id], 40) for each in (texts, other_texts)]
            return f"token {token_id} is {named[0]} here and {named[1]} there"
    return None
