"""Checkpoints between here and transformers: what opens there, and what comes back.

The test with a model needs torch, which is too large for the extra `dev`: `pip install -e '.[dev,torch]'`.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

import moss_jax
from moss_jax.convert import load_config
from moss_jax.shipped import shipped
from moss_jax.text import Tokenizer
from moss_jax.video import preprocess

TINY = shipped("moss-tiny")
TEXTS = ["What number is on the card? It's 7.", "  déjà vu\n\n", "<|silence|>"]


@pytest.fixture
def exported(tmp_path, model):
    """A checkpoint with a normalisation of its own."""
    saved = moss_jax.save(tmp_path / "exported", model, tokenizer=TINY)
    file = saved / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    file.write_text(json.dumps(settings))
    return saved


def test_the_config_opens_and_comes_back(exported, tmp_path):
    config = transformers.AutoConfig.from_pretrained(exported)
    assert isinstance(config, transformers.MllamaConfig)
    special = Tokenizer.moss_tiny().special
    text = config.text_config
    assert (text.bos_token_id, text.eos_token_id) == (special.begin_of_text, special.eot)
    assert text.pad_token_id < text.vocab_size
    config.save_pretrained(tmp_path / "again")
    transformers.AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").is_file()
    assert not (tmp_path / "again" / "preprocessor_config.json").exists()
    assert load_config(tmp_path / "again") == load_config(exported)


def test_a_config_without_tokenizer_opens(golden, tmp_path):
    saved = moss_jax.save(tmp_path / "saved", golden.model)
    assert transformers.AutoConfig.from_pretrained(saved).text_config.pad_token_id is None


def test_the_tokenizer_opens(exported, tmp_path):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported), Tokenizer.load(exported)
    for text in TEXTS[:2]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(TEXTS[2])["input_ids"] == [ours.special.silence]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.special.begin_of_text, ours.special.eot)
    assert theirs.pad_token == "<|finetune_right_pad_id|>"
    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert (again.special, again.encode(TEXTS[0])) == (ours.special, ours.encode(TEXTS[0]))


@pytest.mark.parametrize("size", [(28, 28), (14, 28)])
def test_the_processor_makes_the_same_pixels(exported, size):
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert isinstance(processor, transformers.MllamaProcessor)
    vision = load_config(exported).vision
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = processor.image_processor(images=rgb, return_tensors="np")["pixel_values"]
    assert np.shape(theirs) == (1, 1, 1, 3, 28, 28)
    ours = preprocess(rgb, image_size=28, mean=vision.image_mean, std=vision.image_std)
    np.testing.assert_allclose(theirs[0, 0, 0].transpose(1, 2, 0), ours, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_the_model_opens_computes_the_same_and_comes_back(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    ours, tokenizer = moss_jax.load(TINY), Tokenizer.moss_tiny()
    ids = tokenizer.encode(TEXTS[0])
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits.numpy()
    state = ours.init_state(1, text_capacity=64, bank_capacity=1)
    logits, _ = ours.decode(state, jnp.array([ids]))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)

    theirs.save_pretrained(tmp_path / "again")
    again = moss_jax.load(tmp_path / "again")
    assert again.config == ours.config
    pairs = zip(nnx.to_flat_state(nnx.state(again)), nnx.to_flat_state(nnx.state(ours)), strict=True)
    for (path, x), (_, y) in pairs:
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))
