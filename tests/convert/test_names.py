"""Tensor names of transformers 4 and 5, and the mapping between tensors and parameters."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from moss_jax.convert import to_hugging_face
from moss_jax.convert.names import canonical, entries

PAIRS = [
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ("language_model.model.norm.weight", "model.language_model.norm.weight"),
    (
        "language_model.model.layers.3.cross_attn.q_proj.weight",
        "model.language_model.layers.3.cross_attn.q_proj.weight",
    ),
    ("vision_model.class_embedding", "model.vision_model.class_embedding"),
    (
        "vision_model.transformer.layers.0.mlp.fc1.bias",
        "model.vision_model.transformer.layers.0.mlp.fc1.bias",
    ),
    ("multi_modal_projector.bias", "model.multi_modal_projector.bias"),
    ("patch_merger.weight", "model.patch_merger.weight"),
]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_both_spellings_have_one_canonical_name(old, new):
    assert canonical(old) == canonical(new) == old


def test_entries_cover_every_parameter_once(small_config, random_model):
    for mode in ("average", "channelFusion"):
        config = small_config(mode)
        flat = dict(nnx.to_flat_state(nnx.state(random_model(config))))
        paths = [entry.path for entry in entries(config)]
        assert len(paths) == len(set(paths))
        assert set(paths) == set(flat)
        names = [name for entry in entries(config) for name in entry.names]
        assert len(names) == len(set(names))


def test_split_undoes_join(small_config):
    """On tensors whose elements are all different."""
    rng = np.random.default_rng(0)
    for entry in entries(small_config("channelFusion")):
        tensors = [rng.permutation(int(np.prod(shape))).reshape(shape) for shape in entry.shapes]
        for tensor, back in zip(tensors, entry.split(entry.join(tensors)), strict=True):
            np.testing.assert_array_equal(tensor, back)


def test_export_is_the_original_tensor_for_tensor(golden):
    original = load_file(golden.folder / "model.safetensors")
    exported = dict(to_hugging_face(golden.model.config, nnx.state(golden.model)))
    assert set(exported) == set(original)
    for name, tensor in exported.items():
        assert tensor.dtype == original[name].dtype, name
        assert tensor.tobytes() == original[name].tobytes(), name


def test_gradients_are_exported_under_the_same_names(small_config, random_model):
    model = random_model(small_config())
    doubled = jax.tree.map(lambda x: 2 * x, nnx.state(model))
    plain = dict(to_hugging_face(model.config, nnx.state(model)))
    for name, tensor in to_hugging_face(model.config, doubled):
        np.testing.assert_array_equal(tensor, 2 * plain[name])
