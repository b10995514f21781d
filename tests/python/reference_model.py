"""The MatMul-free model as a plain PyTorch module, from the equations of docs/numerics.md."""

import torch
from torch import nn
from torch.nn import functional as F


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def quantize_activations(y):
    """Straight-through: integers / scale in the forward pass, the identity in the backward pass."""
    scale = 127.0 / y.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return y + ((y * scale).round().clamp(-128, 127) / scale - y).detach()


def quantize_weights(w):
    """Straight-through: trits times their scale."""
    scale = w.abs().mean().clamp(min=1e-5)
    return w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class BitLinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(0, 0.02))
        self.norm = RMSNorm(inputs, 1e-6)

    def forward(self, x):
        return F.linear(quantize_activations(self.norm(x)), quantize_weights(self.weight))


class TokenMixer(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.i_proj, self.f_proj = BitLinear(d, d), BitLinear(d, d)
        self.g_proj, self.o_proj = BitLinear(d, d), BitLinear(d, d)
        self.g_norm = RMSNorm(d, eps)

    def forward(self, u, beta):
        i, f, g = self.i_proj(u), self.f_proj(u), self.g_proj(u)
        forget = beta + (1 - beta) * torch.sigmoid(f)
        inputs = F.silu(i) * (1 - forget)
        state = torch.zeros_like(inputs[:, 0])
        states = []
        # Unbound once: indexing every step would make the backward pass quadratic.
        for x, r in zip(inputs.unbind(1), forget.unbind(1)):
            state = r * state + x
            states.append(state)
        h = torch.stack(states, 1)
        return self.o_proj(self.g_norm(g) * F.silu(h))


class ChannelMixer(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.gate_proj, self.down_proj = BitLinear(d, 2 * f), BitLinear(f, d)

    def forward(self, v):
        a, b = self.gate_proj(v).chunk(2, -1)
        return self.down_proj(F.silu(a) * b)


class Block(nn.Module):
    def __init__(self, d, f, eps):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(d, eps), TokenMixer(d, eps)
        self.mlp_norm, self.mlp = RMSNorm(d, eps), ChannelMixer(d, f)

    def forward(self, x, beta):
        x = x + self.attn(self.attn_norm(x), beta)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, layers, eps = config["hidden_size"], config["num_hidden_layers"], config["rms_norm_eps"]
        self.embeddings = nn.Embedding(config["vocab_size"], d)
        if config["use_lower_bound"]:
            self.lower_bounds = nn.Parameter(torch.zeros(layers, d))
        blocks = [Block(d, config["intermediate_size"], eps) for _ in range(layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(d, eps)

    def forward(self, ids):
        x = self.embeddings(ids)
        betas = [0.0] * len(self.layers)
        if hasattr(self, "lower_bounds"):
            p = self.lower_bounds.softmax(0)
            betas = p.cumsum(0) - p[0]
        for layer, beta in zip(self.layers, betas):
            x = layer(x, beta)
        return self.norm(x)


class MatMulFree(nn.Module):
    """Parameters have the names of the authors' checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = BitLinear(config["hidden_size"], config["vocab_size"])

    def forward(self, ids):
        return self.lm_head(self.model(ids))


def next_token_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
