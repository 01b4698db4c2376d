"""Random state dicts with the released names and shapes, and the released behaviour in plain torch.

Nothing of the project is used here: names, shapes and semantics are written down once more.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def layer(shapes, name, *shape):
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]


def tokenizer_shapes(*, width=512, latent=512, channels=0, codebook=0):
    """Released tokenizer: `channels` of FSQ or a VQ `codebook` of this many codes."""
    shapes: dict[str, tuple[int, ...]] = {}
    layer(shapes, "vqvae.encoder.model.0", width, 263, 3)
    for stage in (2, 3):
        layer(shapes, f"vqvae.encoder.model.{stage}.0", width, width, 4)
        layer(shapes, f"vqvae.decoder.model.{stage}.2", width, width, 3)
        for stack in (f"vqvae.encoder.model.{stage}.1", f"vqvae.decoder.model.{stage}.0"):
            for block in range(3):
                layer(shapes, f"{stack}.model.{block}.conv1", width, width, 3)
                layer(shapes, f"{stack}.model.{block}.conv2", width, width, 1)
    layer(shapes, "vqvae.encoder.model.4", latent, width, 3)
    layer(shapes, "vqvae.decoder.model.0", width, latent, 3)
    layer(shapes, "vqvae.decoder.model.4", width, width, 3)
    layer(shapes, "vqvae.decoder.model.6", 263, width, 3)
    if channels:
        layer(shapes, "vqvae.quantizer.project_in", channels, latent)
        layer(shapes, "vqvae.quantizer.project_out", latent, channels)
    else:
        shapes["vqvae.quantizer.codebook"] = codebook, latent
    return shapes


def transformer_shapes(*, layers, width, codes, text_width, tied=False):
    hidden = 256 * math.ceil(int(8 * width / 3) / 256)
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (codes + (2 if tied else 1), width),
        "transformer.wte.weight": (codes + 2, width),
        "transformer.ln_f.scale": (width,),
        "llama_proj.weight": (width, text_width),
        "llama_proj.bias": (width,),
    }
    for i in range(layers):
        shapes |= {
            f"transformer.h.{i}.rms_1.scale": (width,),
            f"transformer.h.{i}.rms_2.scale": (width,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * width, width),
            f"transformer.h.{i}.attn.c_proj.weight": (width, width),
            f"transformer.h.{i}.mlp.c_fc1.weight": (hidden, width),
            f"transformer.h.{i}.mlp.c_fc2.weight": (hidden, width),
            f"transformer.h.{i}.mlp.c_proj.weight": (width, hidden),
        }
    return shapes


def draw(shapes, seed=0):
    """Random tensors of these shapes, scaled so that activations stay near 1 and nothing is at its start."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("scale"):
            value = 1 + 0.3 * value
        elif name.endswith("bias"):
            value = 0.3 * value
        elif "wte" not in name and "codebook" not in name:
            value = value * math.sqrt(2 / math.prod(shape[1:]))
        # Latents between saturation and the middle code: the rounding of every channel is then put to use.
        if name.endswith("conv2.weight") or "project_in" in name:
            value = 0.3 * value
        state[name] = value
    return state


def conv(state, name, x, **options):
    return F.conv1d(x, state[f"vqvae.{name}.weight"], state[f"vqvae.{name}.bias"], **options)


def residual(state, name, x, dilations):
    for block, dilation in enumerate(dilations):
        y = conv(state, f"{name}.model.{block}.conv1", F.relu(x), padding=dilation, dilation=dilation)
        x = x + conv(state, f"{name}.model.{block}.conv2", F.relu(y))
    return x


def latents(state, normalized, dilations=(9, 3, 1)):
    """Normalised features (B, T, 263) -> the encoder's output (B, T // 4, E)."""
    x = normalized[:, : normalized.shape[1] // 4 * 4].transpose(1, 2)
    x = F.relu(conv(state, "encoder.model.0", x, padding=1))
    for stage in (2, 3):
        x = conv(state, f"encoder.model.{stage}.0", x, stride=2, padding=1)
        x = residual(state, f"encoder.model.{stage}.1", x, dilations)
    return conv(state, "encoder.model.4", x, padding=1).transpose(1, 2)


def reconstruct(state, quantised, dilations=(9, 3, 1)):
    """Quantised latents (B, N, E) -> normalised features (B, 4 N, 263)."""
    x = F.relu(conv(state, "decoder.model.0", quantised.transpose(1, 2), padding=1))
    for stage in (2, 3):
        x = residual(state, f"decoder.model.{stage}.0", x, dilations)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = conv(state, f"decoder.model.{stage}.2", x, padding=1)
    x = F.relu(conv(state, "decoder.model.4", x, padding=1))
    return conv(state, "decoder.model.6", x, padding=1).transpose(1, 2)


def fsq(state, z_in, levels):
    """Latents (B, N, E) -> indices (B, N) and how far the nearest channel is from a rounding tie (B, N)."""
    z = F.linear(z_in, state["vqvae.quantizer.project_in.weight"], state["vqvae.quantizer.project_in.bias"])
    index, basis = torch.zeros(z.shape[:-1], dtype=torch.int64), 1
    margin = torch.full(z.shape[:-1], math.inf, dtype=z.dtype)
    for channel, level in enumerate(levels):
        half = (level - 1) * (1 + 1e-3) / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        bounded = torch.tanh(z[..., channel] + math.atanh(offset / half)) * half - offset
        index += (torch.round(bounded).long() + level // 2) * basis
        basis *= level
        margin = torch.minimum(margin, ((bounded - bounded.floor()) - 0.5).abs())
    return index, margin


def fsq_vectors(state, indices, levels):
    """Indices (B, N) -> what the decoder is given (B, N, E)."""
    weight = state["vqvae.quantizer.project_out.weight"]
    codes, rest = [], indices.long()
    for level in levels:
        codes.append((rest % level - level // 2).to(weight.dtype) / (level // 2))
        rest = rest // level
    return F.linear(torch.stack(codes, -1), weight, state["vqvae.quantizer.project_out.bias"])


def rms(x, scale):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def rope(x):
    """(heads, n, D): pairs (2 j, 2 j + 1) turned by position * 10000^(-2 j / D); float32 tables."""
    n, dim = x.shape[1:]
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angle.float().cos().to(x.dtype), angle.float().sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def hidden_states(state, text, tokens, heads):
    """One sequence: text states (P, D), then tokens (m,) -> (P + m, C) after the last norm."""
    x = F.linear(text, state["llama_proj.weight"], state["llama_proj.bias"])
    x = torch.cat([x, state["transformer.wte.weight"][torch.tensor(tokens, dtype=torch.long)]])
    n, prefix = len(x), len(text)
    allowed = torch.tensor([[j < (prefix if i < prefix else i + 1) for j in range(n)] for i in range(n)])
    layers = sum(name.endswith("rms_1.scale") for name in state)
    for i in range(layers):
        part = {name: state[f"transformer.h.{i}.{name}"] for name in (
            "rms_1.scale", "rms_2.scale", "attn.c_attn.weight", "attn.c_proj.weight",
            "mlp.c_fc1.weight", "mlp.c_fc2.weight", "mlp.c_proj.weight",
        )}  # fmt: skip
        qkv = F.linear(rms(x, part["rms_1.scale"]), part["attn.c_attn.weight"])
        q, k, v = (y.view(n, heads, -1).transpose(0, 1) for y in qkv.chunk(3, -1))
        scores = rope(q) @ rope(k).transpose(1, 2) / math.sqrt(q.shape[-1])
        attended = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v
        x = x + F.linear(attended.transpose(0, 1).flatten(1), part["attn.c_proj.weight"])
        y = rms(x, part["rms_2.scale"])
        gate, up = F.linear(y, part["mlp.c_fc1.weight"]), F.linear(y, part["mlp.c_fc2.weight"])
        x = x + F.linear(gate * gate.sigmoid() * up, part["mlp.c_proj.weight"])
    return rms(x, state["transformer.ln_f.scale"])


def logits(state, text, tokens, heads):
    """What the last text position and each token predict: (m + 1, head rows)."""
    x = hidden_states(state, text, tokens, heads)
    return F.linear(x[len(text) - 1 :], state["lm_head.weight"])


def sample_greedily(state, text, heads, *, allow_empty=True):
    """The released loop: everything anew for each token, EOS or 50 tokens end it; PAD never comes.

    EOS as the first token: the released code gives token 1; with allow_empty false it is passed over.
    """
    eos = state["transformer.wte.weight"].shape[0] - 2
    tokens: list[int] = []
    while len(tokens) < 50:
        row = logits(state, text, tokens, heads)[-1, : eos + 1]
        if not tokens and not allow_empty:
            row = row[:eos]
        token = int(row.argmax())
        if token == eos:
            return tokens or [1]
        tokens.append(token)
    return tokens


def stop_at(state, text, heads, step):
    """Turn the EOS row towards the hidden state of `step`, so that the greedy motion ends about there."""
    eos = state["transformer.wte.weight"].shape[0] - 2
    state["lm_head.weight"][eos] = 0
    tokens = sample_greedily(state, text, heads)[:step]
    x = hidden_states(state, text, tokens, heads)[-1]
    state["lm_head.weight"][eos] = 8 * x / x.norm() ** 2
    return state


@pytest.fixture(scope="session")
def released():
    """The functions above."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if callable(value)})


@pytest.fixture
def statistics(tmp_path):
    """mean.npy and std.npy of 263 features."""
    rng = np.random.default_rng(7)
    files = {"mean": tmp_path / "mean.npy", "std": tmp_path / "std.npy"}
    np.save(files["mean"], rng.standard_normal(263))
    np.save(files["std"], rng.uniform(0.5, 2, 263).astype(np.float32))
    return files
