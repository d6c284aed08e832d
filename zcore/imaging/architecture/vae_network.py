"""The VAE's network: a convolutional encoder and decoder, with attention in the middle of each.

Equals, bit for bit, diffusers' `AutoencoderKL` (Apache-2.0), with its names of weights and configuration; tests compare
both. It is defined here for the reason that `transformer_network` gives. Rombach et al. 2021 (arXiv 2112.10752).
"""

from typing import Literal

import msgspec
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-6
INDEX_LIMIT = 2**31


class VaeConfig(msgspec.Struct, frozen=True):
    """The part of `vae/config.json` that the network depends on. Other values are refused."""

    block_out_channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int
    scaling_factor: float
    shift_factor: float | None = None
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    act_fn: Literal["silu"] = "silu"
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ()
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ()
    latents_mean: None = None
    latents_std: None = None


class VaeNetwork(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = (
            nn.Conv2d(config.latent_channels, config.latent_channels, 1) if config.use_post_quant_conv else None
        )

    def encode(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) to the latents' means and logarithms of variances (B, 32, H / 8, W / 8)."""
        moments = self.encoder(pixels)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """Map (B, 16, h, w) to pixels (B, 3, 8h, 8w)."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class VaeEncoder(nn.Module):
    """Pixels to moments; all blocks but the last one halve each side."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, config.layers_per_block, groups, halves=index < len(widths) - 1)
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MiddleBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 2 * latent channels, H / 8, W / 8)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x))))


class VaeDecoder(nn.Module):
    """Latents to pixels; all blocks but the last one double each side."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, config.layers_per_block + 1, groups, doubles=index < len(widths) - 1)
            for index, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, latent channels, h, w) to (B, 3, 8h, 8w)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """Residual blocks, then one convolution that halves each side."""

    def __init__(self, before: int, width: int, count: int, groups: int, halves: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width if i else before, width, groups) for i in range(count))
        self.downsamplers = nn.ModuleList([Halving(width)] if halves else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, H, W) to (B, width, H / 2, W / 2)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then one convolution that doubles each side."""

    def __init__(self, before: int, width: int, count: int, groups: int, doubles: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width if i else before, width, groups) for i in range(count))
        self.upsamplers = nn.ModuleList([Doubling(width)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, h, w) to (B, width, 2h, 2w)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MiddleBlock(nn.Module):
    """Two residual blocks, with attention between them."""

    def __init__(self, width: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(width, groups)] if attends else [])
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class ResidualBlock(nn.Module):
    """Two normalized convolutions, added to their input."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, NORM_EPS)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, NORM_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, before, H, W) to (B, width, H, W)."""
        # Each step drops the tensor before it, which at full size decides the peak memory.
        hidden = self.norm1(x)
        hidden = functional.silu(hidden)
        hidden = self.conv1(hidden)
        hidden = self.norm2(hidden)
        hidden = functional.silu(hidden)
        hidden = self.conv2(hidden)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class PixelAttention(nn.Module):
    """Attention of every pixel to every pixel, with one head, added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to the same shape."""
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, h * w, width)
        queries, keys, values = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        attended = functional.scaled_dot_product_attention(queries, keys, values)[:, 0]
        return self.to_out[0](attended).transpose(1, 2).reshape(x.shape) + x


class Halving(nn.Module):
    """A convolution with a stride of 2, padded at the right and the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, H, W) to (B, width, H / 2, W / 2)."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width, h, w) to (B, width, 2h, 2w)."""
        if x.numel() * 2 > INDEX_LIMIT:
            x = x.contiguous()  # torch's kernel for other layouts fails: pytorch/pytorch, issue 141831
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
