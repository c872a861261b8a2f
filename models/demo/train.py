"""Make the demo model: build its tokenizer, train it on `stories`, save it as a folder that mlx-lm loads.

    python train.py             # remake the model in this folder: an hour on one CPU core
    python train.py --evaluate  # print how well the saved model recalls held-out facts

Needs this package, torch, numpy, safetensors and tokenizers.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mlx_paged.models.demo import stories
from mlx_paged.models.demo.documents import ASSISTANT, END, FINISHING, PAD, USER, build_tokenizer, draw_batches
from mlx_paged.models.demo.network import (
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MAX_POSITIONS,
    NORM_EPS,
    ROPE_THETA,
    Transformer,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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
