"""Loading and saving checkpoint folders: tensor names, shards, round trips, and errors."""

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import moss_jax
from moss_jax import CheckpointError
from moss_jax.convert import checkpoint, configs, load_config, names
from moss_jax.shipped import shipped
from moss_jax.text import TokenizerError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def same(a, b):
    """Asserts that two models have the same config and bitwise equal parameters."""
    assert a.config == b.config
    pairs = zip(nnx.to_flat_state(nnx.state(a)), nnx.to_flat_state(nnx.state(b)), strict=True)
    for (path, x), (other, y) in pairs:
        assert path == other
        assert x.dtype == y.dtype, path
        assert np.asarray(x[...]).tobytes() == np.asarray(y[...]).tobytes(), path


def transformers_5_name(name):
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the golden checkpoint that a test may break."""
    for name in ("config.json", SINGLE):
        shutil.copyfile(golden.folder / name, tmp_path / name)
    return tmp_path


def rewrite(folder, change):
    """Passes the tensors of a checkpoint through `change`."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)


# --------------------------------------------------------------------------------------------- round trips


def test_loads_both_generations_of_tensor_names(golden, folder):
    rewrite(folder, lambda tensors: {transformers_5_name(name): tensor for name, tensor in tensors.items()})
    held = set(load_file(folder / SINGLE))
    assert {
        "lm_head.weight",
        "model.language_model.norm.weight",
        "model.vision_model.class_embedding",
    } <= held
    same(moss_jax.load(folder), golden.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_saving_and_loading_round_trips(golden, tmp_path, dtype, shard_bytes):
    model = moss_jax.load(golden.folder, dtype=dtype)
    saved = moss_jax.save(tmp_path / "new" / "saved", model, shard_bytes=shard_bytes)
    same(moss_jax.load(saved, dtype=dtype), model)
    assert json.loads((saved / "config.json").read_text())["torch_dtype"] == dtype
    assert not any(path.name.startswith(".") for path in saved.parent.iterdir())
    if shard_bytes == 10**9:
        assert {path.name for path in saved.iterdir()} == {"config.json", "preprocessor_config.json", SINGLE}
        tensors = load_file(saved / SINGLE)
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
        return
    index = json.loads((saved / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    tensors = {}
    for shard in shards:
        held = load_file(saved / shard)
        assert {index["weight_map"][name] for name in held} == {shard}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= shard_bytes
        tensors |= held
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_the_saved_tensors_are_the_originals(golden, tmp_path):
    saved = load_file(moss_jax.save(tmp_path / "saved", golden.model) / SINGLE)
    original = load_file(golden.folder / SINGLE)
    assert set(saved) == set(original)
    for name, tensor in original.items():
        assert saved[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("mode", ["max", "bilinear", "channelFusion"])
def test_every_compressor_round_trips(small_config, random_model, tmp_path, mode):
    model = random_model(small_config(mode))
    same(moss_jax.load(moss_jax.save(tmp_path / "saved", model)), model)


def test_loading_rounds_to_the_dtype_asked_for(golden):
    half = moss_jax.load(golden.folder, dtype="bfloat16")
    assert half.dtype == ml_dtypes.bfloat16
    full = np.asarray(golden.model.decoder.embedding[...])
    np.testing.assert_array_equal(half.decoder.embedding[...], full.astype(ml_dtypes.bfloat16))


def test_options_of_load_are_part_of_the_config(golden):
    model = moss_jax.load(golden.folder, rows_before_first_frame="attend", attention="xla")
    assert model.config.rows_before_first_frame == "attend"
    assert model.config.attention == "xla"
    assert load_config(golden.folder) == golden.model.config


def test_the_normalisation_round_trips(golden, tmp_path):
    saved = moss_jax.save(tmp_path / "saved", golden.model)
    preprocessor = json.loads((saved / "preprocessor_config.json").read_text())
    preprocessor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (saved / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vision = moss_jax.load(saved).config.vision
    assert (vision.image_mean, vision.image_std) == ((0.5,) * 3, (0.25,) * 3)
    again = moss_jax.save(tmp_path / "again", moss_jax.load(saved))
    assert load_config(again).vision == vision


def test_the_shipped_checkpoint_is_what_save_writes(tmp_path):
    folder = shipped("moss-tiny")
    saved = moss_jax.save(tmp_path / "saved", moss_jax.load(folder, dtype="bfloat16"), tokenizer=folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_tokenizer_that_does_not_fit_is_refused(golden, tmp_path):
    with pytest.raises(CheckpointError, match="predicts 1024 tokens, the model 320; they must belong"):
        moss_jax.save(tmp_path / "saved", golden.model, tokenizer=shipped("moss-tiny"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read as a tokenizer"):
        moss_jax.save(tmp_path / "saved", golden.model, tokenizer=tmp_path)
    assert not (tmp_path / "saved").exists()


# --------------------------------------------------------------------------------------- tensors as they come

Q, K, V = (f"language_model.model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


def test_parts_of_one_parameter_may_differ_in_type(golden, folder):
    types = {Q: np.float16, K: ml_dtypes.bfloat16, V: np.float64}
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].astype(t) for name, t in types.items()})
    stored = load_file(folder / SINGLE)
    loaded = dict(names.to_hugging_face(golden.model.config, nnx.state(moss_jax.load(folder))))
    for name, tensor in stored.items():
        np.testing.assert_array_equal(loaded[name], tensor.astype(np.float32), err_msg=name)
    half = dict(
        names.to_hugging_face(golden.model.config, nnx.state(moss_jax.load(folder, dtype="bfloat16")))
    )
    for name, tensor in stored.items():
        np.testing.assert_array_equal(half[name], tensor.astype(ml_dtypes.bfloat16), err_msg=name)


@pytest.mark.parametrize("kind", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize(
    ("suffix", "scale"),
    [
        ("", None),
        ("_scale", np.float32(0.37)),
        ("_scale_inv", np.full(1, 0.37, np.float32)),
        ("_scale", np.linspace(0.1, 2, 64, dtype=np.float32)),
        ("_scale", np.linspace(0.1, 2, 64).astype(ml_dtypes.bfloat16)[:, None]),
    ],
)
def test_tensors_in_8_bits_with_and_without_scale(golden, folder, kind, suffix, scale):
    stored = load_file(folder / SINGLE)[Q].astype(kind)
    scales = {} if scale is None else {Q + suffix: np.asarray(scale)}
    rewrite(folder, lambda tensors: tensors | {Q: stored} | scales)
    factor = 1 if scale is None else np.asarray(scale, np.float32).reshape(-1, 1)
    loaded = dict(names.to_hugging_face(golden.model.config, nnx.state(moss_jax.load(folder))))
    np.testing.assert_array_equal(loaded[Q], stored.astype(np.float32) * factor)


def test_buffers_that_follow_from_the_config_are_ignored(golden, folder):
    buffers = {
        "language_model.model.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.language_model.layers.0.self_attn.rotary_emb.cos_cached": np.ones((4, 8), np.float32),
        "vision_model.embeddings.position_ids": np.arange(17)[None],
        Q.replace("weight", "input_scale"): np.ones(1, np.float32),
    }
    rewrite(folder, lambda tensors: tensors | buffers)
    same(moss_jax.load(folder), golden.model)


def test_types_and_scales_that_are_not_supported_are_named(folder):
    odd = {
        Q: np.zeros((64, 64), np.int8),
        K: np.zeros((32, 64), ml_dtypes.float8_e4m3fn),
        f"{K}_scale_inv": np.ones((1, 2), np.float32),
    }
    rewrite(folder, lambda tensors: tensors | odd)
    refuses(
        folder,
        f"{Q} has type I8; supported are F64, F32, F16, BF16, F8_E4M3, F8_E5M2",
        f"the scale of {K} has shape [1, 2]; it must be one number, or one a row",
    )


# ------------------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_value_that_is_not_finite_is_seen(dtype):
    kind = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    x = np.full((3, 70_000), ml_dtypes.finfo(kind).max, kind)
    x[0, :3] = 0, -ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).smallest_subnormal
    assert checkpoint.is_finite(x)
    for index in ((0, 0), (0, 65_535), (0, 65_536), (2, 69_999)):
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            y = x.copy()
            y[index] = value
            assert not checkpoint.is_finite(y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite_are_refused(golden, folder, tmp_path, dtype):
    def spoil(tensors):
        for name, value in ((V, np.nan), ("multi_modal_projector.bias", np.inf)):
            tensors[name].flat[-1] = value
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as error:
        moss_jax.load(folder, dtype=dtype)
    assert str(error.value) == (
        f"{folder}: 2 of its tensors, the first of them {V}, have NaN or infinite values in {dtype}; "
        "take a checkpoint from before the training diverged"
    )


def test_a_model_that_is_not_finite_is_not_saved(golden, tmp_path):
    model = moss_jax.load(golden.folder)
    model.projector.bias[...] = model.projector.bias[...].at[3].set(np.inf)
    with pytest.raises(
        CheckpointError, match=r"1 of its tensors, the first of them multi_modal_projector\.bias"
    ):
        moss_jax.save(tmp_path / "saved", model)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ image processors


def test_transformers_5_nests_the_image_processor_in_another_file(golden, folder):
    """It wins over preprocessor_config.json, as in transformers."""
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "MllamaProcessor"}))
    assert load_config(folder).vision.image_mean == (0.1, 0.2, 0.3)
    nested = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.75]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    vision = moss_jax.load(folder).config.vision
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.75))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {"resample": 3}}))
    refuses(folder, "the image processor.resample is 3; only 2 is supported")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": [1]}))
    refuses(folder, "the image processor must be a JSON object")


# -------------------------------------------------------------------------------------------------- errors


def refuses(folder, *messages):
    with pytest.raises(CheckpointError) as error:
        moss_jax.load(folder)
    for message in (str(folder), *messages):
        assert message in str(error.value)


def test_one_error_lists_all_wrong_tensors(folder):
    def spoil(tensors):
        del tensors["vision_model.class_embedding"]
        tensors["language_model.model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
        tensors["multi_modal_projector.bias"] = np.zeros((63,), np.float32)
        return tensors

    rewrite(folder, spoil)
    refuses(
        folder,
        "missing vision_model.class_embedding",
        "unexpected language_model.model.layers.9.mlp.up_proj.weight",
        "multi_modal_projector.bias has shape [63], not [64]",
    )


def test_a_long_list_of_problems_is_cut(folder):
    rewrite(folder, lambda tensors: {"lm_head.weight": tensors["language_model.lm_head.weight"]})
    refuses(folder, "missing vision_model.class_embedding", f"and {142 - checkpoint.MAX_LISTED} more")


def test_a_byte_order_mark_is_no_obstacle(golden, folder):
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content, encoding="utf-8-sig")
    assert load_config(folder) == golden.model.config


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", SINGLE, INDEX])
def test_a_folder_where_a_file_is_meant(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    refuses(folder, name, "truncated or damaged" if name == SINGLE else "not readable JSON")


@pytest.mark.parametrize("name", ["config.json", SINGLE, "."])
def test_files_without_permission(golden, unprivileged, name):
    tensors = {"a": np.zeros(3, np.float32)}
    config, _ = configs.to_hugging_face(golden.model.config)
    (unprivileged / "mine").mkdir()
    (unprivileged / "mine" / "config.json").write_text(json.dumps(config))
    save_file(tensors, unprivileged / "mine" / SINGLE)
    (unprivileged / "mine" / name).chmod(0)
    try:
        refuses(unprivileged / "mine", "denied")
    finally:
        (unprivileged / "mine").chmod(0o755)


def test_a_truncated_file(folder):
    whole = (folder / SINGLE).read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:size])
        refuses(folder, f"{SINGLE} is missing, truncated or damaged")


def test_one_error_lists_missing_and_damaged_shards(golden, tmp_path):
    saved = moss_jax.save(tmp_path / "saved", golden.model, shard_bytes=200_000)
    first, second, *_ = sorted(saved.glob("model-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    refuses(saved, f"{first.name} is missing", f"{second.name} is missing, truncated or damaged")


def test_no_weights(folder):
    (folder / SINGLE).unlink()
    refuses(folder, f"has neither {SINGLE} nor {INDEX}")


def test_no_folder_and_no_config(folder):
    refuses(folder / "elsewhere", "there is no such folder")
    refuses(folder / SINGLE, "there is no such folder")
    (folder / "config.json").unlink()
    refuses(folder, "it has no config.json")


def test_an_index_without_shards(folder):
    for index in ({}, {"weight_map": ["model.safetensors"]}, {"weight_map": {"a": 1}}):
        (folder / INDEX).write_text(json.dumps(index))
        refuses(folder, f"{INDEX} has no weight_map")


@pytest.mark.parametrize("text", ['{"model_type": "mllama"', "[]", "", "\xff"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", INDEX])
def test_broken_json(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refuses(folder, name, "must hold a JSON object" if text == "[]" else "not readable JSON")


def test_an_unknown_model_type(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2_vl"}
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, "model_type 'qwen2_vl'; supported are mllama and video_mllama")


def test_an_invalid_config(folder):
    config = json.loads((folder / "config.json").read_text()) | {"mllama_pool_stride": 9}
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, "pool stride 9 exceeds the patch grid of 4")


def test_saves_only_into_new_or_empty_folders(golden, tmp_path):
    (tmp_path / "empty").mkdir()
    moss_jax.save(tmp_path / "empty", golden.model)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for taken in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(taken))} exists and is not empty"):
            moss_jax.save(taken, golden.model)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_working_directory_is_saved_into_where_it_is_empty(golden, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    for name in ("here", "link"):
        monkeypatch.chdir(tmp_path / name)
        moss_jax.save(".", golden.model)
        assert {path.name for path in Path.cwd().iterdir()} == {
            "config.json",
            "preprocessor_config.json",
            SINGLE,
        }
        same(moss_jax.load("."), golden.model)
        with pytest.raises(CheckpointError, match=r"^\. exists and is not empty; save to a new folder$"):
            moss_jax.save(".", golden.model)
        for file in Path.cwd().iterdir():
            file.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


def test_a_folder_that_cannot_be_made_is_refused(golden, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path / "file" / "saved", tmp_path / "lost"):
        with pytest.raises(
            CheckpointError, match=f"^{taken} cannot be written, and nothing was left there: "
        ):
            moss_jax.save(taken, golden.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lost"]


@pytest.mark.parametrize("name", ["new", "empty"])
def test_a_full_disk_leaves_nothing_behind(golden, tmp_path, name):
    (tmp_path / "empty").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot be written, and nothing was left there: .*File too large"
        ):
            moss_jax.save(tmp_path / name, golden.model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    moss_jax.save(tmp_path / name, golden.model)


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError, CheckpointError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_failed_save_leaves_nothing_behind(golden, tmp_path, monkeypatch, error, seen):
    calls = []

    def fails_midway(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error("no space left")
        save_file(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", fails_midway)
    with pytest.raises(seen):
        moss_jax.save(tmp_path / "saved", golden.model, shard_bytes=200_000)
    assert len(calls) == 3
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------- subprocesses


def run_python(code, *arguments, **environment):
    """Runs a program on the CPU in a subprocess; returns the JSON on its last line of output."""
    root = os.path.dirname(os.path.dirname(moss_jax.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ON_A_MESH = """
import json, sys
import jax, numpy as np
from flax import nnx
import moss_jax
from moss_jax.sharding import make_mesh, named_sharding

mesh = make_mesh(data=2, fsdp=2, tensor=2)
model = moss_jax.load(sys.argv[1], mesh=mesh)
vectors = np.load(sys.argv[1] + "/vectors.npz")
graph, params = nnx.split(model)
for path, variable in nnx.to_flat_state(params):
    expected = named_sharding(variable.get_metadata()["axes"], variable.shape, mesh)
    assert variable[...].sharding == expected, (path, variable[...].sharding)

pixels = vectors["pixel_values"][:, :, 0].transpose(0, 1, 3, 4, 2)
batch = [vectors["input_ids"].astype("int32"), pixels, vectors["frame_positions"].astype("int32")]
axes = [("batch",) + (None,) * (x.ndim - 1) for x in batch]
batch = [jax.device_put(x, named_sharding(a, x.shape, mesh)) for x, a in zip(batch, axes)]
logits = jax.jit(lambda params, *batch: nnx.merge(graph, params)(*batch))(params, *batch)
kernel = model.decoder.layers[0].attention.qkv.kernel[...]
print(json.dumps({
    "devices": len(jax.devices()),
    "error": float(np.abs(logits - vectors["logits_causal"]).max()),
    "kernel": [kernel.shape, kernel.addressable_shards[0].data.shape],
}))
"""


def test_loads_onto_a_mesh(golden):
    found = run_python(ON_A_MESH, golden.folder, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert found["devices"] == 8
    assert found["kernel"] == [[64, 2, 4, 16], [32, 1, 4, 16]]
    assert found["error"] <= 1e-4


PEAK_OF_LOADING = r"""
import json, re, sys
import jax, numpy as np
import moss_jax

def memory(field):  # the peak of getrusage would be that of the process that started this one
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\s*(\d+) kB", file.read())[1]) * 1024

jax.device_put(np.zeros(3)).block_until_ready()
before = memory("VmRSS")
model = moss_jax.load(sys.argv[1], dtype="bfloat16")
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_one_parameter_at_a_time(small_config, tmp_path):
    config = small_config()
    wide = dataclasses.replace(
        config.decoder, vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_layers=6
    )
    config = dataclasses.replace(config, decoder=wide)
    raw, _ = configs.to_hugging_face(config)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tensors, largest = {}, 0
    for entry in names.entries(config):
        parts = [np.zeros(shape, ml_dtypes.bfloat16) for shape in entry.shapes]
        tensors |= zip(entry.names, parts, strict=True)
        largest = max(largest, sum(part.nbytes for part in parts))
    size = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / SINGLE)
    # With this threshold, glibc returns memory to the system as soon as it is freed.
    peak = run_python(PEAK_OF_LOADING, tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    (tmp_path / SINGLE).unlink()
    # The parameters, the mapped file (whose pages count as resident), and copies of one parameter.
    assert peak > size
    assert peak < 2 * size + 3 * largest + 0.1 * size
