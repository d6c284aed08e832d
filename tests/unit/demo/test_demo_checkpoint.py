"""The shipped checkpoint: the format is the real one, stock classes load it, and it paints what it is asked for."""

import json
import stat
from typing import Any

import pytest
import torch
from safetensors import safe_open

from zcore.demo import CHECKPOINT
from zcore.demo.architecture import make_text_encoder, make_transformer, make_vae
from zcore.demo.check import judge
from zcore.demo.evaluate import Trial, draw_asks, load, paint_all

WEIGHTS = {
    "text_encoder/model.safetensors": make_text_encoder,
    "transformer/diffusion_pytorch_model.safetensors": make_transformer,
    "vae/diffusion_pytorch_model.safetensors": make_vae,
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The unmodified stock pipeline on the shipped folder, in float32."""
    return load(CHECKPOINT)


def test_it_is_small_and_anyone_may_read_it() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path


def test_it_names_the_classes_of_the_real_checkpoint() -> None:
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if not name.startswith("_")} == {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    assert index["_class_name"] == "ZImagePipeline"
    scheduler = json.loads((CHECKPOINT / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (3.0, False)
    assert json.loads((CHECKPOINT / "transformer" / "config.json").read_text())["axes_lens"] == [1536, 512, 512]


@pytest.mark.parametrize("file", WEIGHTS)
def test_its_tensors_are_those_of_the_stock_class(file: str) -> None:
    stock = WEIGHTS[file]().state_dict()
    with safe_open(CHECKPOINT / file, "pt") as stored:
        assert set(stored.keys()) == set(stock)
        for name, tensor in stock.items():
            assert list(stored.get_slice(name).get_shape()) == list(tensor.shape)
            assert stored.get_slice(name).get_dtype() == "BF16"


def test_its_files_name_no_place_of_the_machine_they_were_made_on() -> None:
    for path in CHECKPOINT.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_it_wraps_a_prompt_as_qwen_does(pipeline: Any) -> None:
    messages = [{"role": "user", "content": "a red circle"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    said = pipeline.tokenizer.apply_chat_template(messages, enable_thinking=True, **options)
    assert said == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    quiet = pipeline.tokenizer.apply_chat_template(messages, enable_thinking=False, **options)
    assert quiet == said + "<think>\n\n</think>\n\n"
    ids = pipeline.tokenizer(said)["input_ids"]
    assert len(ids) == 3 + 8
    assert pipeline.tokenizer.decode(ids) == said


def test_any_text_survives_its_tokenizer(pipeline: Any) -> None:
    for text in ("Ein großes Herz, bitte!", "紅い丸", "🙂\n\t 3.5"):
        assert pipeline.tokenizer.decode(pipeline.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 160), (256, 256)])
def test_it_paints_what_it_was_never_shown(pipeline: Any, width: int, height: int) -> None:
    asks = draw_asks(40)
    painted = paint_all(pipeline, asks, Trial("8 steps", width, height))
    verdicts = [judge(ask.picture, pixels) for ask, pixels in zip(asks, painted, strict=True)]
    single = [v for v, ask in zip(verdicts, asks, strict=True) if ask.picture.kind == "object"]
    for measure, least in (("background", 0.95), ("colour", 0.95), ("position", 0.95), ("shape", 0.95)):
        assert sum(bool(getattr(v, measure)) for v in single) >= least * len(single), measure
    others = [v.all_right for v, ask in zip(verdicts, asks, strict=True) if ask.picture.kind != "object"]
    assert sum(others) >= 0.75 * len(others)


def test_another_seed_paints_another_picture_of_the_same_thing(pipeline: Any) -> None:
    asks = [ask for ask in draw_asks(4, held_out=False) if ask.picture.kind == "object"][:1]
    first, again = (paint_all(pipeline, asks, Trial("8 steps"))[0] for _ in range(2))
    assert (first == again).all()
    other = paint_all(pipeline, [type(asks[0])(asks[0].picture, asks[0].text, 99)], Trial("8 steps"))[0]
    assert (first != other).any()


def test_a_half_precision_picture_shows_the_same(pipeline: Any) -> None:
    asks = draw_asks(8)
    exact = paint_all(pipeline, asks, Trial("float32"))
    rounded = paint_all(load(CHECKPOINT, torch.bfloat16), asks, Trial("bfloat16"))
    for one, other in zip(exact, rounded, strict=True):
        assert abs(one.astype(float) - other.astype(float)).mean() < 6
