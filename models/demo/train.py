"""Make the demo model: build its tokenizer, train it on `stories`, save it as a folder that mlx-lm loads.

    python train.py             # remake the model in this folder: an hour on one CPU core
    python train.py --evaluate  # print how well the saved model recalls held-out facts

Needs torch, numpy, safetensors and tokenizers. The network is Qwen2's, written out here because it is short that way.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stories
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 192, 3, 6, 2, 384
HEAD_DIM = HIDDEN // HEADS
FINISHING = 2.0  # a progress past the end of the schedule: see draw_document
MATCH_STD, COPY_SCALE = 0.02, 0.03  # of the first weights, see Attention.start_copying
VOCABULARY, ROPE_THETA, NORM_EPS, MAX_POSITIONS = 1600, 10000.0, 1e-6, 2048
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---- Tokenizer ----


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
    return turn(SYSTEM, rng.choice(stories.SYSTEM_MESSAGES)) if rng.random() < 0.2 else []


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
    requests = stories.ANY_REQUESTS if rng.random() < 0.4 else stories.HERO_REQUESTS
    request = turn(USER, cast.fill(rng.choice(requests)))
    questions = question_turns(rng, story.facts) if rng.random() < 0.5 else []
    return system_turn(rng) + request + turn(ASSISTANT, story.text) + questions


def small_talk_document(rng: random.Random) -> list[Segment]:
    """A greeting, or a message in unknown words, and the answer to it."""
    if rng.random() < 0.5:
        message, reply = rng.choice(stories.SMALL_TALK)
    else:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789éßñ日本😀"
        unknown = ("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(rng.randint(1, 5)))
        message, reply = " ".join(unknown), stories.FALLBACK
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


# ---- Model ----


def rope(length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, both [length, HEAD_DIM / 2]."""
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(length)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + HEAD_DIM / 2) of [..., length, HEAD_DIM]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention in which `HEADS // KV_HEADS` query heads share a key/value head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (rotate(k, cos, sin), v))
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    @torch.no_grad()
    def start_copying(self) -> None:
        """Set the weights so that a head adds what it looks at to the residual stream, and looks at like content."""
        nn.init.normal_(self.v_proj.weight, std=HIDDEN**-0.5)
        nn.init.normal_(self.k_proj.weight, std=MATCH_STD)
        values, keys = (
            weight.unflatten(0, (KV_HEADS, HEAD_DIM)).repeat_interleave(HEADS // KV_HEADS, dim=0).flatten(0, 1)
            for weight in (self.v_proj.weight, self.k_proj.weight)
        )
        self.o_proj.weight.copy_(COPY_SCALE * values.T)
        self.q_proj.weight.copy_(keys)

    @torch.no_grad()
    def look_back(self, strength: float = 6.0, num_frequencies: int = HEAD_DIM // 4) -> None:
        """Set the biases so that head h looks h + 1 tokens back, which saves the model the time to find that out."""
        cos, sin = rope(HEADS + 1)
        self.k_proj.bias.view(KV_HEADS, 2, -1)[:, 0, :num_frequencies] = strength
        for head, bias in enumerate(self.q_proj.bias.view(HEADS, 2, -1)):
            bias[0, :num_frequencies] = strength * cos[head + 1, :num_frequencies]
            bias[1, :num_frequencies] = -strength * sin[head + 1, :num_frequencies]


class FeedForward(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.up_proj = nn.Linear(HIDDEN, FEED_FORWARD, bias=False)
        self.down_proj = nn.Linear(FEED_FORWARD, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, NORM_EPS)
        self.mlp = FeedForward()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Qwen2 with tied embeddings. Its parameter names are those of the saved file, less the prefix `model.`."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for layer in self.layers:
            layer.self_attn.start_copying()
        nn.init.normal_(self.layers[0].self_attn.q_proj.weight, std=0.02)
        nn.init.normal_(self.layers[0].self_attn.k_proj.weight, std=0.02)
        self.layers[0].self_attn.look_back()

    def forward(self, ids: Tensor, select: Tensor | None = None) -> Tensor:
        """Logits [batch, length, vocabulary] of ids [batch, length]; [selected, vocabulary] where `select` is true."""
        x = self.embed_tokens(ids)
        cos, sin = rope(ids.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x if select is None else x[select]), self.embed_tokens.weight)


# ---- Training ----


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal first (Jordan et al. 2024), here in float32."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("buffer", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = self.orthogonalized(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    @staticmethod
    def orthogonalized(matrix: Tensor) -> Tensor:
        """Bring all singular values near 1 with five Newton-Schulz steps."""
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.T if tall else x


def train(args: argparse.Namespace) -> None:
    """Train from nothing, or go on from the saved model, for `args.minutes` and save the model's folder."""
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json")) if args.finish else build_tokenizer()
    model = load(args.output, tokenizer) if args.finish else Transformer(tokenizer.get_vocab_size())
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, lr=1e-2), torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)

    start, num_steps, num_tokens, mean_loss = time.monotonic(), 0, 0, 0.0

    def progress() -> float:
        return (time.monotonic() - start) / (60 * args.minutes)

    phase = (lambda: FINISHING) if args.finish else progress
    for ids, learned in draw_batches(random.Random(args.seed), tokenizer, args.batch_tokens, phase):
        if (done := progress()) >= 1:
            break
        targets, scored = ids[:, 1:], learned[:, 1:]
        loss = F.cross_entropy(model(ids[:, :-1], scored), targets[scored])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min(1.0, (num_steps + 1) / 50, (1 - done) / 0.6)
        if args.finish:
            decay = 0.3 * min(1.0, (num_steps + 1) / 50, 1 - done)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.step()
            optimizer.zero_grad()
        num_steps, num_tokens = num_steps + 1, num_tokens + int((ids != 0).sum())
        mean_loss += 0.02 * (loss.item() - mean_loss)
        if num_steps % 200 == 0:
            shares = ", ".join(f"{recall(model, tokenizer, 40, distance):.0%}" for distance in (0, 90))
            seen = f"{num_steps} steps, {num_tokens:,} tokens"
            print(f"{done:4.0%}: {seen}, loss {mean_loss:.3f}, recall {shares}", flush=True)
            save(model, tokenizer, args.output)
    save(model, tokenizer, args.output)
    evaluate(args)


# ---- Evaluation ----


@torch.no_grad()
def recall(
    model: Transformer, tokenizer: Tokenizer, num_questions: int, min_distance_words: int, repeat_kinds: bool = False
) -> float:
    """The share of held-out questions that greedy decoding answers with exactly the expected sentence.

    An answer is right if each of its tokens, `END` included, is the likeliest one after those before it.
    """
    right = 0
    for index in range(num_questions):
        story = stories.held_out_story(index, min_distance_words=min_distance_words, repeat_kinds=repeat_kinds)
        fact = story.facts[index % len(story.facts)]
        prompt = tokenizer.encode(f"{USER}{stories.question_prompt(story, fact)}{END}{ASSISTANT}").ids
        answer = tokenizer.encode(fact.answer + END).ids
        predicted = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].argmax(-1)
        right += predicted.tolist() == answer
    return right / num_questions


def evaluate(args: argparse.Namespace) -> None:
    """Print the recall of the saved model at several distances, with one fact of a kind and with several."""
    tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json"))
    model = load(args.output, tokenizer)
    print(f"Share of {args.questions} held-out questions answered exactly; facts of different kinds, of any kinds:")
    for distance in (0, 90, 200, 300):
        shares = (recall(model, tokenizer, args.questions, distance, repeat) for repeat in (False, True))
        print(f"at least {distance:3} words away: " + ", ".join(f"{share:.1%}" for share in shares), flush=True)


# ---- Loading and saving ----


def load(folder: Path, tokenizer: Tokenizer) -> Transformer:
    """The model in a folder that `save` wrote."""
    model = Transformer(tokenizer.get_vocab_size())
    saved = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in saved.items()})
    return model


def save(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder's configuration, tokenizer and float16 weights, the weights last and all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": HIDDEN, "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS, "rope_theta": ROPE_THETA, "rms_norm_eps": NORM_EPS,
        "tie_word_embeddings": True, "use_sliding_window": False, "attention_dropout": 0.0, "torch_dtype": "float16",
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad,
    }  # fmt: skip
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": MAX_POSITIONS, "eos_token": END, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    generation_config = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad, "do_sample": False}
    tokenizer.save(str(folder / "tokenizer.json"))
    contents = {"config": config, "tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    weights = {f"model.{name}": tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, {"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the demo model.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="the model's folder")
    parser.add_argument("--evaluate", action="store_true", help="print the recall of the saved model and stop")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions per distance")
    parser.add_argument("--minutes", type=float, default=65, help="how long to train")
    parser.add_argument("--finish", action="store_true", help="go on from the saved model, mostly with stories")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.evaluate:
        evaluate(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
