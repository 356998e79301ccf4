"""Networks that the benchmarks train: each with its inputs, and its loss on a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def twice_differentiable() -> AbstractContextManager[None]:
    """Use attention with second derivatives; fused attention has none."""
    return sdpa_kernel(SDPBackend.MATH)


class Block(nn.Module):
    """A block of a transformer, normalised before attention and before its MLP.

    Args:
        width: of each position.
        heads: of the attention.
        causal: whether a position attends only to itself and earlier ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and MLP."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.first_norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        y: Tensor = x + self.mlp(self.second_norm(x))
        return y


class VisionTransformer(nn.Module):
    """A ViT/16 for 224 x 224 images, with a class token and learned positions."""

    def __init__(self, width: int, heads: int, layers: int = 12, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


class GPT(nn.Module):
    """A causal language model whose head shares the embedding's weights."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the next token at every position."""
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return F.linear(self.norm(self.blocks(hidden)), self.tokens.weight)


class Residual(nn.Module):
    """A block of a ResNet: relu(body(x) + shortcut(x))."""

    def __init__(self, body: list[nn.Module], width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(*convolution(width_in, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(width_in: int, width: int, size: int, stride: int) -> list[nn.Module]:
    """Return a convolution that keeps the size of an image (up to the stride), and its BatchNorm."""
    return [nn.Conv2d(width_in, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width)]


def basic(width_in: int, width: int, stride: int) -> Residual:
    """Return a block of ResNet-18: two convolutions of 3 x 3."""
    body = [*convolution(width_in, width, 3, stride), nn.ReLU(), *convolution(width, width, 3, 1)]
    return Residual(body, width_in, width, stride)


def bottleneck(width_in: int, width: int, stride: int) -> Residual:
    """Return a block of ResNet-50, whose outputs are four times as wide as its convolution of 3 x 3."""
    inner = width // 4
    body = [*convolution(width_in, inner, 1, 1), nn.ReLU(), *convolution(inner, inner, 3, stride), nn.ReLU()]
    return Residual([*body, *convolution(inner, width, 1, 1)], width_in, width, stride)


def resnet(
    stem: list[nn.Module], block: Callable[[int, int, int], Residual], width: int, depths: list[int], classes: int
) -> nn.Module:
    """Return stages of ``depths`` blocks, each twice as wide as the last; the stem has 64 channels."""
    layers, width_in = list(stem), 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(block(width_in, width << stage, 2 if stage and i == 0 else 1))
            width_in = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes))


def resnet18() -> nn.Module:
    """Return the ResNet-18 for 32 x 32 images, 11.2 million parameters."""
    return resnet([*convolution(3, 64, 3, 1), nn.ReLU()], basic, 64, [2, 2, 2, 2], 100)


def resnet50() -> nn.Module:
    """Return the ResNet-50 for 224 x 224 images, 25.6 million parameters, strides in the 3 x 3 as in torchvision."""
    stem = [*convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return resnet(stem, bottleneck, 256, [3, 4, 6, 3], 1000)


def mlp() -> nn.Module:
    """Return a perceptron of three layers, 3.7 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 100)
    )


def missing_timm() -> str | None:
    """Return why timm cannot be used here, or None."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision does not fit this torch
        return f"timm cannot be imported ({error})"
    return None


def vit(name: str, width: int, heads: int) -> nn.Module:
    """Return timm's model called ``name`` with random weights; without timm, one of the same shapes."""
    if missing_timm() is not None:
        return VisionTransformer(width, heads)
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def vit_tiny() -> nn.Module:
    """Return the ViT-Ti/16 for 224 x 224 images, 5.7 million parameters."""
    return vit("vit_tiny_patch16_224", 192, 3)


def vit_small() -> nn.Module:
    """Return the ViT-S/16 for 224 x 224 images, 22.1 million parameters."""
    return vit("vit_small_patch16_224", 384, 6)


def gpt() -> nn.Module:
    """Return a GPT of four blocks of width 256 over 128 positions and 8192 tokens, 5.3 million parameters."""
    return GPT(8192, 128, 256, 4, 4)


def gpt2() -> nn.Module:
    """Return a GPT of the shapes of GPT-2 small, 12 blocks of width 768 over 1024 positions, 124 million parameters."""
    return GPT(50257, 1024, 768, 12, 12)


@dataclass(frozen=True)
class Network:
    """A module with the description of its inputs.

    Attributes:
        build: makes the module, from torch's random state.
        shape: shape of one input: channels, height and width of an image, or positions of a text.
        classes: number of classes; for a text, of tokens.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int

    @property
    def takes_tokens(self) -> bool:
        """True if inputs are texts."""
        return len(self.shape) == 1

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """Return ``n`` random inputs and their targets; for a text, the next token at every position."""
        if self.takes_tokens:
            tokens = torch.randint(self.classes, (n, self.shape[0] + 1))
            return tokens[:, :-1], tokens[:, 1:]
        return torch.randn(n, *self.shape), torch.randint(self.classes, (n,))

    @staticmethod
    def loss(output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy over inputs, and over the positions of texts."""
        return F.cross_entropy(output.flatten(0, -2), target.flatten())


NETWORKS: dict[str, Network] = {
    "mlp": Network(mlp, (3, 32, 32), 100),
    "resnet18": Network(resnet18, (3, 32, 32), 100),
    "resnet50": Network(resnet50, (3, 224, 224), 1000),
    "vit_tiny": Network(vit_tiny, (3, 224, 224), 1000),
    "vit_small": Network(vit_small, (3, 224, 224), 1000),
    "gpt": Network(gpt, (128,), 8192),
    "gpt2": Network(gpt2, (1024,), 50257),
}
