"""Sizes of the miniature: each part of a Z-Image pipeline, untrained, in the classes of diffusers and transformers.

Each part is of the class that the real checkpoint names, only smaller; the whole stays below 20 MB in bfloat16.
`axes_lens` is that of the real model, so the limits on prompt length and image size are the same.
"""

from typing import Any, Final

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import Qwen3Config, Qwen3Model

from zcore.demo.train_tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE

TEXT_WIDTH: Final = 128
LATENT_CHANNELS: Final = 16
PIXELS_PER_LATENT: Final = 8
SHIFT: Final = 3.0
AXES_DIMS: Final = (8, 12, 12)
"""Dimensions of a head rotated by caption position, row and column."""
ROPE_THETA: Final = 256.0

_TRANSFORMER: Final[dict[str, Any]] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": LATENT_CHANNELS,
    "dim": 192,
    "n_layers": 5,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": TEXT_WIDTH,
    "rope_theta": ROPE_THETA,
    "t_scale": 1000.0,
    "axes_dims": list(AXES_DIMS),
    "axes_lens": [1536, 512, 512],
}
_VAE: Final[dict[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": LATENT_CHANNELS,
    "norm_num_groups": 8,
    "sample_size": 256,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "force_upcast": True,
}


def make_transformer() -> Any:
    """Return an untrained `ZImageTransformer2DModel`: 5 + 1 + 1 blocks of width 192."""
    return ZImageTransformer2DModel(**_TRANSFORMER)


def make_vae() -> Any:
    """Return an untrained `AutoencoderKL`: 16 latent channels, eight pixels per latent."""
    return AutoencoderKL(**_VAE)


def make_text_encoder() -> Any:
    """Return an untrained `Qwen3Model` of width 128.

    Its output is read before the last of the 5 layers, which exists only for the format.
    """
    end = VOCABULARY_SIZE - len(SPECIAL_TOKENS)
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=TEXT_WIDTH,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end + 2,
    )
    return Qwen3Model(config)


def make_scheduler() -> Any:
    """Return the schedule of Z-Image Turbo: flow matching with shift 3, independent of the image size."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT, use_dynamic_shifting=False)
