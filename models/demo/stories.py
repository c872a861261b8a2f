"""Short plain-English stories with facts to recall: the text that the demo model learns from and is tested on.

A story is an opening, a few facts ("The kite was red."), and a plot told in a fixed order of beats. Every fact stands
in one sentence of its own, and the answer to its question repeats that sentence, so the words just before the value
are the same in both places. Everything is drawn from a `random.Random`, so a seed gives the same text everywhere.

Training and held-out stories can never coincide: a story's checksum decides to which of the two it belongs.
This module knows nothing of tokens or of the model.
"""

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mlx_paged.models.demo.sentences import (
    ANY_REQUESTS,
    CONNECTORS,
    ENDINGS,
    FALLBACK,
    GIRLS,
    GIVERS,
    HERO_REQUESTS,
    KINDS,
    OPENINGS,
    PEOPLE,
    PLOTS,
    PREPOSITIONS,
    SMALL_TALK,
    SYSTEM_MESSAGES,
)


class Fact(NamedTuple):
    """A question about a story, the sentence that answers it, and the word in that sentence that had to be recalled."""

    question: str
    answer: str
    value: str


class Story(NamedTuple):
    """A story and the facts that can be asked about it, in the order in which the text states them."""

    text: str
    facts: list[Fact]


class Cast(NamedTuple):
    """Who a story is about."""

    hero: str
    friend: str

    def fill(self, template: str) -> str:
        """Write the names and the hero's pronouns into a sentence."""
        girl = self.hero in GIRLS
        return template.format(
            hero=self.hero, friend=self.friend, child="girl" if girl else "boy", he="she" if girl else "he",
            him="her" if girl else "him", his="her" if girl else "his", His="Her" if girl else "His", key="{key}",
        )  # fmt: skip


def draw_cast(rng: random.Random) -> Cast:
    """Draw two different people."""
    return Cast(*rng.sample(PEOPLE, 2))


def in_present_tense(fact: Fact) -> Fact:
    """The same fact asked and told with "is" in place of "was"; other verbs keep their tense."""
    return Fact(fact.question.replace(" was ", " is "), fact.answer.replace(" was ", " is "), fact.value)


def draw_facts(rng: random.Random, count: int, *, repeat_kinds: bool = True) -> tuple[list[Fact], list[str]]:
    """Draw facts, no two about the same key, and a sentence that leads up to each.

    Keys and values are drawn uniformly and independently of each other. Returns the facts and the sentences, which
    still have `{hero}` and `{friend}` in them.
    """
    names = list(KINDS)
    chosen = rng.choices(names, k=count) if repeat_kinds else rng.sample(names, min(count, len(names)))
    used: set[str] = set()
    facts, intros = [], []
    for name in chosen:
        kind = KINDS[name]
        key = rng.choice([key for key in kind.keys if key not in used])
        used.add(key)
        how = rng.choice(GIVERS if name == "gift" else PREPOSITIONS)
        slots = {"key": key, "value": rng.choice(kind.values), "how": how}
        question, answer = rng.choice(kind.questions).format(**slots), kind.statement.format(**slots)
        facts.append(Fact(question, answer, slots["value"]))
        intros.append(rng.choice(kind.intros).replace("{key}", key))
    return facts, intros


def draw_plot(rng: random.Random, cast: Cast, min_words: int) -> list[str]:
    """Draw sentences that tell one plot, and further plots until there are at least `min_words` words."""
    sentences: list[str] = []
    plots = rng.sample(PLOTS, len(PLOTS))
    while True:
        sentences += [cast.fill(rng.choice(beat)) for beat in plots.pop()]
        if sum(len(sentence.split()) for sentence in sentences) >= min_words or not plots:
            return sentences
        sentences.append(rng.choice(CONNECTORS))


def draw_story(rng: random.Random, *, cast: Cast | None = None, num_facts: int = 3, min_plot_words: int = 0,
               repeat_kinds: bool = True) -> Story:  # fmt: skip
    """Draw a story: opening, facts, at least `min_plot_words` words of plot, ending."""
    cast = cast or draw_cast(rng)
    facts, intros = draw_facts(rng, num_facts, repeat_kinds=repeat_kinds)
    sentences = [cast.fill(rng.choice(OPENINGS))]
    for fact, intro in zip(facts, intros, strict=True):
        if rng.random() < 0.7:
            sentences.append(cast.fill(intro))
        sentences.append(fact.answer)
    sentences += draw_plot(rng, cast, min_plot_words)
    sentences.append(cast.fill(rng.choice(ENDINGS)))
    return Story(" ".join(sentences), facts)


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the held-out sixteenth of all texts, which training never sees."""
    return zlib.crc32(text.encode()) % 16 == 0


def held_out_story(
    index: int, *, min_distance_words: int = 90, num_facts: int | None = None, repeat_kinds: bool = False
) -> Story:
    """The held-out story of this number, the same on every machine.

    At least `min_distance_words` words (a word is about one token) lie between the last fact and the end of the text,
    up to about 700. `num_facts` is drawn from 2 to 5 unless given. With `repeat_kinds`, a story may state several
    facts of one kind, say the colours of two things, which are harder to tell apart.
    """
    rng = random.Random(f"held out {index} {min_distance_words} {num_facts} {repeat_kinds}")
    while True:
        count = num_facts or rng.randint(2, 5)
        story = draw_story(rng, num_facts=count, min_plot_words=min_distance_words, repeat_kinds=repeat_kinds)
        if is_held_out(story.text):
            return story


def question_prompt(story: Story, fact: Fact) -> str:
    """The user message that asks for a fact: the story, a line break, the question."""
    return f"{story.text}\n{fact.question}"


def list_words() -> list[str]:
    """Every word that can stand in a slot of a fact, for a vocabulary to hold whole."""
    return sorted({word for kind in KINDS.values() for word in kind.keys + kind.values} | {*GIVERS, *PREPOSITIONS})


def first_words() -> list[str]:
    """Every word that a message can begin with, where it has no space before it."""
    texts = [*OPENINGS, *SYSTEM_MESSAGES, *ANY_REQUESTS, *HERO_REQUESTS, FALLBACK]
    texts += [text for kind in KINDS.values() for text in (kind.statement, *kind.questions)]
    texts += [text for turn in SMALL_TALK for text in turn]
    return sorted({text.split()[0].strip(".,!?") for text in texts})


def all_sentences() -> Iterator[str]:
    """Every sentence that there is, with sample words in its slots."""
    slots = {"key": "kite", "value": "red", "how": "under"}
    for kind in KINDS.values():
        yield from (text.format(**slots) for text in (kind.statement, *kind.questions))
        yield from (Cast("Mia", "Tom").fill(intro).format(key="kite") for intro in kind.intros)
    templates = [*OPENINGS, *ENDINGS, *HERO_REQUESTS, *(way for plot in PLOTS for beat in plot for way in beat)]
    yield from (cast.fill(template) for cast in (Cast("Mia", "Tom"), Cast("Tom", "Mia")) for template in templates)
    yield from (*CONNECTORS, *ANY_REQUESTS, *SYSTEM_MESSAGES, FALLBACK, "What colour is the kite?")
    yield from (text for turn in SMALL_TALK for text in turn)
