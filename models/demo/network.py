"""The demo model's network, to be trained with torch: Qwen2's, written out because it is short that way."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 192, 3, 6, 2, 384
HEAD_DIM = HIDDEN // HEADS
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 10000.0, 1e-6, 2048
MATCH_STD, COPY_SCALE = 0.02, 0.03  # of the first weights, see Attention.start_copying


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
