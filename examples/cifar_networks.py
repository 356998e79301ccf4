"""Networks of examples/cifar.py, for images of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution of 3 x 3 that keeps the size, with He's initialisation."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., *Deep Residual Learning*, CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.second, self.second_norm = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        y = y + self.shortcut(x)
        return F.relu(y)


class WideBlock(nn.Module):
    """The same with normalisation first (Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first_norm, self.first = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride)
        self.second_norm, self.second = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = F.relu(self.first_norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        z: Tensor = self.second(F.relu(self.second_norm(self.first(y)))) + shortcut
        return z


class PyramidBlock(nn.Module):
    """Growing widths, and a zero-padded shortcut (Han et al., *Deep Pyramidal Residual Networks*, 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = outputs - inputs, stride
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.first, self.second = conv(inputs, outputs, stride), conv(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.first(self.norms[0](x))
        y = self.norms[2](self.second(F.relu(self.norms[1](y))))
        shortcut = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        z: Tensor = y + F.pad(shortcut, (0, 0, 0, 0, 0, self.more))
        return z


def network(block: type[nn.Module], stem: int, stages: list[list[int]], classes: int) -> nn.Module:
    """Return a network of residual blocks.

    Args:
        block: class of the blocks. If it normalises first, the head has the last normalisation.
        stem: the width of the first convolution.
        stages: the widths of the blocks of each stage; from the second stage on, the first block halves the image.
        classes: number of classes.
    """
    norm_first = block is not BasicBlock
    layers: list[nn.Module] = [conv(3, stem)]
    if block is not WideBlock:
        layers.append(nn.BatchNorm2d(stem))
    if not norm_first:
        layers.append(nn.ReLU())
    width = stem
    for stage, widths in enumerate(stages):
        for place, wider in enumerate(widths):
            layers.append(block(width, wider, 2 if stage and place == 0 else 1))
            width = wider
    if norm_first:
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def small(classes: int) -> nn.Module:
    """Return a ResNet with 4 blocks and 0.2 million parameters, for CPUs."""
    return network(BasicBlock, 16, [[16], [32], [64, 64]], classes)


def resnet18(classes: int) -> nn.Module:
    """Return the ResNet-18 for small images: 11.2 million parameters."""
    return network(BasicBlock, 64, [[64] * 2, [128] * 2, [256] * 2, [512] * 2], classes)


def wrn28_2(classes: int) -> nn.Module:
    """Return a WideResNet of 28 layers and twice the width: 1.5 million parameters."""
    return network(WideBlock, 16, [[32] * 4, [64] * 4, [128] * 4], classes)


def wrn28_10(classes: int) -> nn.Module:
    """Return a WideResNet of 28 layers and ten times the width: 36.5 million parameters."""
    return network(WideBlock, 16, [[160] * 4, [320] * 4, [640] * 4], classes)


def pyramidnet110(classes: int) -> nn.Module:
    """Return a PyramidNet of 110 layers that widens by 270: 28.5 million parameters."""
    widths = [round(16 + 270 * (block + 1) / 54) for block in range(54)]
    return network(PyramidBlock, 16, [widths[:18], widths[18:36], widths[36:]], classes)


NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {
    build.__name__: build for build in (small, resnet18, wrn28_2, wrn28_10, pyramidnet110)
}
