"""Small models, one shape of structure each: ``TOYS[name]() -> (model, inputs)``.

Parameters and inputs are small integers in float64, so that sums are exact in any order; toys whose
ops leave the integers are listed in ``INEXACT``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Toy = tuple[nn.Module, tuple[Tensor, ...]]

TOKENS, WIDTH, HIDDEN, HEADS = 5, 8, 12, 2


class Net(nn.Module):
    """Named layers and tensors around one function."""

    def __init__(
        self, run: Callable[..., Any], buffers: dict[str, Tensor] | None = None, /, **parts: Any
    ) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, Tensor):
                part = nn.Parameter(part)
            setattr(self, name, part)
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def linear(inputs: int = WIDTH, outputs: int = WIDTH, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias)


def tokens(*shape: int) -> Tensor:
    return torch.empty(shape or (2, TOKENS, WIDTH))


def heads(x: Any, count: int = HEADS) -> Any:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without softmax: stays in the integers."""
    return (q @ k.transpose(-1, -2)) @ v


def qkv(width: int = WIDTH, keys: int = WIDTH) -> dict[str, nn.Module]:
    return {
        "embed": linear(),
        "q": linear(width, width),
        "k": linear(width, keys),
        "v": linear(width, keys),
        "out": linear(width, width),
        "head": linear(),
    }


def plain_mlp() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.up(x)))

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def gated_mlp() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.gate(x)) * m.up(x))

    return Net(run, gate=linear(8, 12), up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def fused_gate_up() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        gate, up = m.gate_up(x).chunk(2, dim=-1)
        return m.down(F.relu(gate) * up)

    return Net(run, gate_up=linear(8, 24), down=linear(12, 8)), (tokens(),)


def squared_mlp() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = m.up(x)
        return m.down(h * h + h.square())

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def attention() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.head(x + m.out(joined(attend(q, k, v))))

    return Net(run, **qkv()), (tokens(),)


def softmax_attention() -> Toy:
    def run(m: Any, x: Tensor, mask: Tensor) -> Any:
        x = m.embed(x)
        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.head(x + m.out(joined(F.scaled_dot_product_attention(q, k, v, mask))))

    return Net(run, **qkv()), (tokens(), tokens(2, 1, TOKENS, TOKENS))


def causal_attention() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

    return Net(run, **qkv()), (tokens(),)


def grouped_query_attention() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        return m.out(joined(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))

    return Net(run, **qkv(16, 8)), (tokens(2, TOKENS, 16),)


def repeated_key_heads() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = heads(m.q(x), 4), heads(m.k(x), 2), heads(m.v(x), 2)
        k = k.repeat_interleave(2, dim=1)
        v = v[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, TOKENS, 4)
        return m.out(joined(attend(q, k, v)))

    return Net(run, **qkv(16, 8)), (tokens(2, TOKENS, 16),)


def joint_attention() -> Toy:
    def run(m: Any, image: Tensor, text: Tensor) -> Any:
        q, k, v = (heads(layer(image)) for layer in (m.q, m.k, m.v))
        added = (heads(layer(text)) for layer in (m.add_q, m.add_k, m.add_v))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), added, strict=True))
        x: Any = joined(attend(q, k, v))
        image, text = x.split([TOKENS, 3], dim=1)
        return m.out(image), m.add_out(text)

    added = {name: linear() for name in ("add_q", "add_k", "add_v", "add_out")}
    return Net(run, **qkv(), **added), (tokens(), tokens(2, 3, WIDTH))


def qk_norm() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(F.scaled_dot_product_attention(m.norm_q(q), m.norm_k(k), v)))

    return Net(run, norm_q=nn.RMSNorm(4, 1e-6), norm_k=nn.RMSNorm(4, 1e-6), **qkv()), (tokens(),)


def rotate_half() -> Toy:
    def run(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos + torch.cat([-b, a], dim=-1) * sin

        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(attend(rotate(q), rotate(k), v)))

    return Net(run, **qkv()), (tokens(), tokens(TOKENS, 4), tokens(TOKENS, 4))


def rotate_pairs() -> Toy:
    def run(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        def rotate(x: Tensor) -> Tensor:
            a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            return x * cos + torch.stack([-b, a], dim=-1).flatten(3) * sin

        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(attend(rotate(q), rotate(k), v)))

    return Net(run, **qkv()), (tokens(), tokens(TOKENS, 4), tokens(TOKENS, 4))


def rotate_complex() -> Toy:
    def run(m: Any, x: Tensor, angle: Tensor) -> Any:
        def rotate(x: Tensor) -> Tensor:
            z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(3)

        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(attend(rotate(q), rotate(k), v)))

    return Net(run, **qkv()), (tokens(), tokens(TOKENS, 2))


def rotate_in_place() -> Toy:
    def run(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        def rotate(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
            out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
            return out

        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(joined(attend(rotate(q), rotate(k), v)))

    return Net(run, **qkv()), (tokens(), tokens(TOKENS, 2), tokens(TOKENS, 2))


def residual_chain() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        for up, down in zip(m.ups, m.downs, strict=True):
            x = x + down(F.relu(up(x)))
        return m.head(x)

    ups, downs = (
        nn.ModuleList(linear(*size) for _ in range(2)) for size in ((WIDTH, 12), (12, WIDTH))
    )
    return Net(run, embed=linear(), ups=ups, downs=downs, head=linear()), (tokens(),)


def in_place_residual() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        x += m.down(F.relu(m.up(x)))
        return m.head(x.mul_(2))

    parts = {"embed": linear(), "up": linear(8, 12), "down": linear(12, 8), "head": linear()}
    return Net(run, **parts), (tokens(),)


def in_place_halves() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = torch.zeros(2, TOKENS, 24, dtype=x.dtype)
        h[..., :12] = F.relu(m.a(x))
        h[..., 12:] += m.b(x)
        return m.down(h)

    return Net(run, a=linear(8, 12), b=linear(8, 12), down=linear(24, 8)), (tokens(),)


def norms() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        x = x + m.down(F.silu(m.up(m.norm(x))))
        return m.head(m.rms(x))

    parts = {"embed": linear(), "norm": nn.LayerNorm(8), "rms": nn.RMSNorm(8, 1e-6)}
    layers = {"up": linear(8, 12), "down": linear(12, 8), "head": linear()}
    return Net(run, **parts, **layers), (tokens(),)


def hand_written_norm() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        x = m.embed(x)
        variance = x.pow(2).mean(-1, keepdim=True)
        return m.head(x * torch.rsqrt(variance + 1e-6) * (1 + m.scale) + x.std(-1, keepdim=True))

    return Net(run, embed=linear(), scale=torch.empty(8), head=linear()), (tokens(),)


def adaln_zero() -> Toy:
    def run(m: Any, x: Tensor, t: Tensor) -> Any:
        x = m.embed(x)
        parts = m.modulation(F.relu(m.time(t)))[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        x = x + gate * m.mix(x * (1 + scale) + shift)
        x = x + gate2 * m.down(F.relu(m.up(x * (1 + scale2) + shift2)))
        return m.head(x)

    parts = {"embed": linear(), "time": linear(4, 6), "modulation": linear(6, 48), "mix": linear()}
    layers = {"up": linear(8, 12), "down": linear(12, 8), "head": linear()}
    return Net(run, **parts, **layers), (tokens(), tokens(2, 4))


def scale_shift_table() -> Toy:
    def run(m: Any, x: Tensor, t: Tensor) -> Any:
        x = m.embed(x)
        time = m.time(t)
        shift, scale, gate = (m.table[None] + time.reshape(2, 3, -1)).chunk(3, dim=1)
        return m.head(x + gate * m.mix(x * (1 + scale) + shift))

    parts = {"embed": linear(), "time": linear(4, 24), "mix": linear(), "head": linear()}
    return Net(run, table=torch.empty(3, WIDTH), **parts), (tokens(), tokens(2, 4))


def concatenated_inputs() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = (heads(layer(x)) for layer in (m.q, m.k, m.v))
        return m.out(torch.cat([joined(attend(q, k, v)), F.relu(m.up(x))], dim=-1))

    return Net(run, **{**qkv(), "out": linear(20, 8)}, up=linear(8, 12)), (tokens(),)


def fused_qkv() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = m.qkv(x).reshape(2, TOKENS, 3, HEADS, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return m.out(joined(attend(q, k, v)))

    return Net(run, qkv=linear(8, 24), out=linear()), (tokens(),)


def stacked() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        a, b = torch.stack([m.a(x), m.b(x)], dim=1).relu().unbind(1)
        return m.c(a) + m.d(b)

    return Net(run, a=linear(8, 12), b=linear(8, 12), c=linear(12, 8), d=linear(12, 8)), (tokens(),)


def padded() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.pad(F.relu(m.up(x)), (1, 3)))

    return Net(run, up=linear(8, 12), down=linear(16, 8)), (tokens(),)


def expanded() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = m.up(x)[:, None].expand(-1, 3, -1, -1).reshape(-1, TOKENS, 12)
        return m.down(h + m.scalar.expand(12)) + m.wide(m.up(x).repeat(1, 1, 2)).repeat(3, 1, 1)

    parts = {"up": linear(8, 12), "down": linear(12, 8), "wide": linear(24, 8)}
    return Net(run, scalar=torch.empty(1), **parts), (tokens(),)


def patchify() -> Toy:
    def run(m: Any, image: Tensor) -> Any:
        x = m.patch(image).flatten(2).transpose(1, 2) + m.position
        x = m.head(F.relu(m.mix(x)))
        return torch.einsum("bhwpqc->bchpwq", x.reshape(2, 2, 2, 2, 2, 3)).reshape(2, 3, 4, 4)

    parts = {"patch": nn.Conv2d(3, WIDTH, 2, 2), "mix": linear(), "head": linear(8, 12)}
    return Net(run, {"position": torch.empty(1, 4, WIDTH)}, **parts), (tokens(2, 3, 4, 4),)


def depthwise_glu() -> Toy:
    def run(m: Any, image: Tensor) -> Any:
        x, gate = m.depth(F.relu(m.up(image))).chunk(2, dim=1)
        return m.down(x * F.relu(gate))

    up, down = nn.Conv2d(3, 24, 1), nn.Conv2d(12, 3, 1)
    depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    return Net(run, up=up, depth=depth, down=down), (tokens(2, 3, 4, 4),)


def group_norm() -> Toy:
    def run(m: Any, image: Tensor) -> Any:
        return m.down(F.silu(m.norm(m.up(image))))

    parts = {"up": nn.Conv2d(3, 12, 1), "norm": nn.GroupNorm(3, 12), "down": nn.Conv2d(12, 3, 1)}
    return Net(run, **parts), (tokens(2, 3, 4, 4),)


def linear_attention() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = (layer(x).transpose(1, 2).unflatten(1, (HEADS, -1)) for layer in (m.q, m.k, m.v))
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        h = (v @ F.relu(k).transpose(-1, -2)) @ F.relu(q)
        h = h[:, :, :-1] + h[:, :, -1:]
        return m.out(h.flatten(1, 2).transpose(1, 2))

    return Net(run, **qkv()), (tokens(),)


def merged_batch_heads() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        q, k, v = (heads(layer(x)).reshape(-1, TOKENS, 4) for layer in (m.q, m.k, m.v))
        h = torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
        return m.out(joined(h.view(2, HEADS, TOKENS, 4)))

    return Net(run, **qkv()), (tokens(),)


def embedding_table() -> Toy:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        labels = y.long().abs().flatten() % 3
        x = m.embed(x) + m.table(labels)[:, None] + m.extra[labels][:, None]
        return m.head(F.relu(x))

    parts = {"embed": linear(), "table": nn.Embedding(3, WIDTH), "head": linear()}
    return Net(run, extra=torch.empty(3, WIDTH), **parts), (tokens(), tokens(2, 1))


def position_buffer() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.head(F.relu(m.embed(x) + m.position[:, :TOKENS]))

    return Net(run, {"position": torch.empty(1, 9, 8)}, embed=linear(), head=linear()), (tokens(),)


def position_in_graph() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.head(F.relu(m.embed(x) + torch.arange(WIDTH, dtype=x.dtype)))

    return Net(run, embed=linear(), head=linear()), (tokens(),)


def tied_weights() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.second(F.relu(m.first(x)))))

    first, second = linear(), linear()
    second.weight = first.weight
    return Net(run, first=first, second=second, down=linear()), (tokens(),)


def aliased_buffer() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.up(x))) + m.shadow.sum()

    up = linear(8, 12)
    return Net(run, {"shadow": up.weight.detach()[2:5]}, up=up, down=linear(12, 8)), (tokens(),)


def written_buffer() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = m.up(x)
        m.mean.add_(1)
        return m.down(F.relu(h + m.mean))

    return Net(run, {"mean": torch.empty(12)}, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def unknown_op() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(m.up(x).cumsum(-1))

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def returned_parameter() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.up(x))), m.up.bias * 2

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def returned_middle() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = F.relu(m.up(x))
        return m.down(h), h

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def sliced_channels() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = F.relu(m.up(x))
        return m.down(h[..., 2:8]) + m.other(h[..., :4]) + h[..., 10].unsqueeze(-1)

    return Net(run, up=linear(8, 12), down=linear(6, 8), other=linear(4, 8)), (tokens(),)


def strided_channels() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(F.relu(m.up(x))[..., ::2])

    return Net(run, up=linear(8, 12), down=linear(6, 8)), (tokens(),)


def raw_matmul() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = torch.addmm(m.bias, x.flatten(0, 1), m.up)
        return torch.einsum("nk,km->nm", F.relu(h), m.down) @ m.last.t()

    parts = {"bias": torch.empty(12), "up": torch.empty(8, 12)}
    return Net(run, down=torch.empty(12, 6), last=torch.empty(8, 6), **parts), (tokens(),)


def softmax_over_channels() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        return m.down(m.up(x).softmax(-1))

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def movement() -> Toy:
    def run(m: Any, x: Tensor) -> Any:
        h = F.relu(m.up(x)).movedim(-1, 0).unsqueeze(1).squeeze().permute(1, 2, 0)
        return m.down(h.contiguous().type_as(x).to(x.dtype).clone())

    return Net(run, up=linear(8, 12), down=linear(12, 8)), (tokens(),)


def two_uses_of_a_weight() -> Toy:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        return m.down(F.relu(m.up(x))).sum(1) + m.down(F.relu(m.other(y))).sum(1)

    return Net(run, up=linear(8, 12), other=linear(4, 12), down=linear(12, 8)), (
        tokens(),
        tokens(2, 3, 4),
    )


MAKERS = (
    *(plain_mlp, gated_mlp, fused_gate_up, squared_mlp, attention, softmax_attention),
    *(causal_attention, grouped_query_attention, repeated_key_heads, joint_attention, qk_norm),
    *(rotate_half, rotate_pairs, rotate_complex, rotate_in_place, residual_chain),
    *(in_place_residual, in_place_halves, norms, hand_written_norm, adaln_zero, scale_shift_table),
    *(concatenated_inputs, fused_qkv, stacked, padded, expanded, patchify, depthwise_glu),
    *(group_norm, linear_attention, merged_batch_heads, embedding_table, position_buffer),
    *(position_in_graph, tied_weights, aliased_buffer, written_buffer, unknown_op),
    *(returned_parameter, returned_middle, sliced_channels, strided_channels, raw_matmul),
    *(softmax_over_channels, movement, two_uses_of_a_weight),
)

INEXACT = {
    *("softmax_attention", "causal_attention", "grouped_query_attention", "qk_norm"),
    *("rotate_complex", "norms", "hand_written_norm", "group_norm", "softmax_over_channels"),
}


def _filled(maker: Callable[[], Toy]) -> Callable[[], Toy]:
    def make() -> Toy:
        generator = torch.Generator().manual_seed(0)

        def fill(tensor: Tensor) -> None:
            tensor.copy_(torch.randint(-4, 5, tensor.shape, generator=generator))
            if maker.__name__ in INEXACT:
                tensor.mul_(0.1)  # softmax over large scores is one-hot and hides its inputs

        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            model, inputs = maker()
        finally:
            torch.set_default_dtype(default)
        model.eval()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers(), *inputs):
                fill(tensor)
        return model, inputs

    return make


TOYS: dict[str, Callable[[], Toy]] = {maker.__name__: _filled(maker) for maker in MAKERS}
