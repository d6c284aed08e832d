"""The shipped checkpoint has the real format, loads in the stock classes, and follows its prompts."""

import json
import stat
from typing import Any

import pytest
import torch
from safetensors import safe_open

from zcore.demo import CHECKPOINT
from zcore.demo.architecture import make_text_encoder, make_transformer, make_vae
from zcore.demo.check import judge
from zcore.demo.evaluate import Trial, draw_cases, generate_all, load

WEIGHTS = {
    "text_encoder/model.safetensors": make_text_encoder,
    "transformer/diffusion_pytorch_model.safetensors": make_transformer,
    "vae/diffusion_pytorch_model.safetensors": make_vae,
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The unmodified stock pipeline on the shipped folder, in float32."""
    return load(CHECKPOINT)


def test_it_is_small_and_world_readable() -> None:
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


def test_its_files_contain_no_paths_of_the_training_machine() -> None:
    for path in CHECKPOINT.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_its_chat_template_is_that_of_qwen(pipeline: Any) -> None:
    messages = [{"role": "user", "content": "a red circle"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    text = pipeline.tokenizer.apply_chat_template(messages, enable_thinking=True, **options)
    assert text == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    without_thinking = pipeline.tokenizer.apply_chat_template(messages, enable_thinking=False, **options)
    assert without_thinking == text + "<think>\n\n</think>\n\n"
    ids = pipeline.tokenizer(text)["input_ids"]
    assert len(ids) == 3 + 8
    assert pipeline.tokenizer.decode(ids) == text


def test_any_text_survives_its_tokenizer(pipeline: Any) -> None:
    for text in ("Ein großes Herz, bitte!", "紅い丸", "🙂\n\t 3.5"):
        assert pipeline.tokenizer.decode(pipeline.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 160), (256, 256)])
def test_it_follows_prompts_that_training_never_showed(pipeline: Any, width: int, height: int) -> None:
    cases = draw_cases(40)
    images = generate_all(pipeline, cases, Trial("8 steps", width, height))
    verdicts = [judge(case.composition, pixels) for case, pixels in zip(cases, images, strict=True)]
    single = [v for v, case in zip(verdicts, cases, strict=True) if case.composition.kind == "object"]
    for measure, least in (("background", 0.95), ("colour", 0.95), ("position", 0.95), ("shape", 0.95)):
        assert sum(bool(getattr(v, measure)) for v in single) >= least * len(single), measure
    others = [v.all_right for v, case in zip(verdicts, cases, strict=True) if case.composition.kind != "object"]
    assert sum(others) >= 0.75 * len(others)


def test_another_seed_gives_another_image(pipeline: Any) -> None:
    cases = [case for case in draw_cases(4, held_out=False) if case.composition.kind == "object"][:1]
    first, again = (generate_all(pipeline, cases, Trial("8 steps"))[0] for _ in range(2))
    assert (first == again).all()
    other = generate_all(pipeline, [type(cases[0])(cases[0].composition, cases[0].text, 99)], Trial("8 steps"))[0]
    assert (first != other).any()


def test_a_half_precision_image_is_nearly_the_same(pipeline: Any) -> None:
    cases = draw_cases(8)
    exact = generate_all(pipeline, cases, Trial("float32"))
    rounded = generate_all(load(CHECKPOINT, torch.bfloat16), cases, Trial("bfloat16"))
    for one, other in zip(exact, rounded, strict=True):
        assert abs(one.astype(float) - other.astype(float)).mean() < 6
