"""What the demo model reads while it is trained: its tokenizer, and documents that are made of stories."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mlx_paged.models.demo import sentences, stories

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS
VOCABULARY = 1600
FINISHING = 2.0  # a progress past the end of the schedule: see draw_document
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE in which each list word of the stories is one token with the space before it.

    It splits text as Qwen2's does, because loaders rebuild the tokenizer of a `qwen2` model from its vocabulary and
    merges alone. List words and the first words of messages are counted so often that the trainer merges them first;
    what room is left goes to the commonest words of the templates, and any other text falls back to pieces and bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" {word}" for word in stories.list_words()] + stories.first_words()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 1000 + [f" {text}" for text in stories.all_sentences()], trainer)
    assert all(len(tokenizer.encode(word).ids) == 1 for word in words)
    return tokenizer


# ---- Documents ----

Segment = tuple[str, bool]  # a text and whether the model learns to write it


def turn(role: str, content: str) -> list[Segment]:
    """A turn of a conversation, rendered as the chat template does. The model learns the assistant's turns."""
    return [(role, False), (content + END, role == ASSISTANT)]


def system_turn(rng: random.Random) -> list[Segment]:
    """A system message, in one conversation of five."""
    return turn(SYSTEM, rng.choice(sentences.SYSTEM_MESSAGES)) if rng.random() < 0.2 else []


def question_turns(rng: random.Random, facts: list[stories.Fact], text: str = "") -> list[Segment]:
    """All questions in any order, the first of them after `text` in the same message, each with its answer."""
    segments = []
    for fact in rng.sample(facts, len(facts)):
        fact = stories.in_present_tense(fact) if rng.random() < 0.15 else fact
        segments += turn(USER, f"{text}\n{fact.question}" if text else fact.question)
        segments += turn(ASSISTANT, fact.answer)
        text = ""
    return segments


def list_document(rng: random.Random, max_facts: int) -> list[Segment]:
    """Facts without a story around them, then the questions: the densest practice in telling facts apart."""
    facts, _ = stories.draw_facts(rng, rng.randint(1, max_facts))
    if rng.random() < 0.25:
        facts = [stories.in_present_tense(fact) for fact in facts]
    return system_turn(rng) + question_turns(rng, facts, " ".join(fact.answer for fact in facts))


def echo_document(rng: random.Random, max_facts: int) -> list[Segment]:
    """Facts, then the same facts in another order: practice in finding them again, without questions."""
    facts, _ = stories.draw_facts(rng, rng.randint(1, max_facts))
    again = " ".join(fact.answer for fact in rng.sample(facts, len(facts)))
    return [(" ".join(fact.answer for fact in facts) + "\n", False), (again + END, True)]


def recall_document(rng: random.Random, max_facts: int, max_plot_words: int) -> list[Segment]:
    """A story, then questions about it."""
    story = draw_training_story(rng, num_facts=rng.randint(2, max_facts), min_plot_words=rng.randint(0, max_plot_words))
    if rng.random() < 0.1:
        return turn(SYSTEM, story.text) + question_turns(rng, story.facts)
    return system_turn(rng) + question_turns(rng, story.facts, story.text)


def story_document(rng: random.Random) -> list[Segment]:
    """A story to write: as plain text, or as the answer to a request and perhaps asked about afterwards.

    It has one fact mostly: after several in a row greedy writing repeats them, since copying is what else is learned.
    """
    cast = stories.draw_cast(rng)
    story = draw_training_story(rng, cast=cast, num_facts=1 if rng.random() < 0.85 else 2, repeat_kinds=False)
    if rng.random() < 0.4:
        return [(story.text + END, True)]
    requests = sentences.ANY_REQUESTS if rng.random() < 0.4 else sentences.HERO_REQUESTS
    request = turn(USER, cast.fill(rng.choice(requests)))
    questions = question_turns(rng, story.facts) if rng.random() < 0.5 else []
    return system_turn(rng) + request + turn(ASSISTANT, story.text) + questions


def small_talk_document(rng: random.Random) -> list[Segment]:
    """A greeting, or a message in unknown words, and the answer to it."""
    if rng.random() < 0.5:
        message, reply = rng.choice(sentences.SMALL_TALK)
    else:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789éßñ日本😀"
        unknown = ("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(rng.randint(1, 5)))
        message, reply = " ".join(unknown), sentences.FALLBACK
    return system_turn(rng) + turn(USER, message) + turn(ASSISTANT, reply)


def draw_training_story(rng: random.Random, **options: Any) -> stories.Story:
    """Draw stories until one is not held out."""
    while stories.is_held_out((story := stories.draw_story(rng, **options)).text):
        pass
    return story


def draw_document(rng: random.Random, progress: float) -> list[Segment]:
    """Draw what to learn next, at a `progress` from 0 to 1.

    Short lists of facts come first, then more and more stories. The last quarter has many facts in every document, for
    most questions per token while the learning rate falls to zero. FINISHING is mostly stories to write.
    """
    ramp = min(1.0, max(0.0, (progress - 0.08) / 0.23))
    lists, recalls, tales = 0.86 - 0.66 * ramp, 0.04 + 0.34 * ramp, 0.08 + 0.3 * ramp
    list_facts, story_facts = 4 + round(4 * ramp), 3 + round(3 * ramp)
    if progress > 0.75:
        lists, recalls, tales = 0.5, 0.24, 0.24
        list_facts = story_facts = 10
    if progress == FINISHING:
        lists, recalls, tales = 0.06, 0.26, 0.66
        list_facts = story_facts = 8
    kind = rng.random()
    if kind < lists:
        draw = echo_document if rng.random() < 0.5 * (1 - ramp) else list_document
        return draw(rng, list_facts)
    if kind < lists + recalls:
        return recall_document(rng, story_facts, max_plot_words=round(350 * ramp))
    return story_document(rng) if kind < lists + recalls + tales else small_talk_document(rng)


def draw_batches(
    rng: random.Random, tokenizer: Tokenizer, num_tokens: int, progress: Callable[[], float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of about `num_tokens` tokens: ids and which of them to learn, both [documents, length].

    Documents of like length share a batch, each in a row of its own, padded on the right: no document is cropped or
    sees another.
    """
    while True:
        documents, total = [], 0
        while total < 12 * num_tokens:
            ids, learned = [], []
            for text, learn in draw_document(rng, progress()):
                segment = tokenizer.encode(text).ids
                ids += segment
                learned += [learn] * len(segment)
            documents.append((torch.tensor(ids), torch.tensor(learned)))
            total += len(ids)
        documents.sort(key=lambda document: len(document[0]))
        batches: list[list[tuple[Tensor, Tensor]]] = [[]]
        for document in documents:
            if len(batches[-1]) + 1 > num_tokens / len(document[0]):
                batches.append([])
            batches[-1].append(document)
        rng.shuffle(batches)
        for batch in filter(None, batches):
            columns = zip(*batch, strict=True)
            yield tuple(pad_sequence(column, batch_first=True) for column in columns)
