"""A checkpoint in the real layout with random weights: small enough for tests, deep enough that every part matters.

Written by `ZImagePipeline.save_pretrained` of diffusers, with its own classes. Padding tokens and modulation weights
are enlarged, because with their usual small initial values a wrong padding or time would hardly show.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")
# How Qwen's tokenizers split text.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def build_tiny_checkpoint(folder: Path) -> Path:
    """Write random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        _write_tokenizer(folder / "tokenizer")
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            transformer=_transformer(),
        ).save_pretrained(folder)
    return folder


def _text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=256 + len(SPECIAL_TOKENS) + len(THINK_TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return Qwen3Model(config).eval()


def _transformer() -> ZImageTransformer2DModel:
    network = ZImageTransformer2DModel(
        dim=96,
        n_heads=3,
        n_kv_heads=3,
        n_layers=4,
        n_refiner_layers=2,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("pad_token"):
                weight.normal_()
            elif "adaLN" in name:
                weight.mul_(3)
    return network.eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=1024,
        force_upcast=True,
    ).eval()


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes and control tokens; as in the real one, the think tokens are not "special"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
