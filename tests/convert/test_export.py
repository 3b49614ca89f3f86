"""Export of a training run to Hugging Face layout: the exported model is the trained one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moss_jax
from moss_jax.config import OptimizerConfig, TrainConfig
from moss_jax.convert import CheckpointError, __main__, run_checkpoint
from moss_jax.nn import MossVideo
from moss_jax.sharding import make_mesh
from moss_jax.text import Tokenizer
from moss_jax.train.checkpoints import Checkpoints
from moss_jax.train.step import Trainer


@pytest.fixture(scope="module")
def trainer(model) -> Trainer:
    """Trains the projector only, so that there are trained and frozen parameters."""
    config = TrainConfig(trainable=("projector",))
    mesh = make_mesh(devices=jax.devices()[:1])
    return Trainer(model.config, config, OptimizerConfig(), mesh, silence_id=0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, trainer, model, tokenizer):
    """Checkpoints of two steps; in the second one all trained parameters are doubled."""
    workdir = tmp_path_factory.mktemp("run")
    tokenizer.save(workdir)
    state = trainer.adopt(model)
    config = {"gin": "", "model": run_checkpoint.model_to_json(model.config)}
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(1, state, position={"batch": 1}, config=config)
        checkpoints.save(2, double(state), position={"batch": 2}, config=config)
    return workdir


def double(state):
    return state.__class__(
        state.step, jax.tree.map(lambda x: 2 * x, state.trained), state.frozen, state.optimizer
    )


def logits(compiled, model: MossVideo) -> np.ndarray:
    size = model.config.vision.image_size
    rng = np.random.default_rng(0)
    image = model.config.decoder.image_token_id
    pixels = jnp.asarray(rng.standard_normal((1, 2, size, size, 3)), jnp.float32)
    return np.asarray(compiled(model)(jnp.asarray([[1, image, 2, image, 3]]), pixels, jnp.asarray([[1, 3]])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_the_one_that_was_trained(tmp_path, workdir, trainer, model, dtype):
    assert run_checkpoint.export(workdir, tmp_path / "out", dtype=dtype) == 2
    exported = moss_jax.load(tmp_path / "out", dtype=dtype)
    trained = trainer.model(double(trainer.adopt(model)), dtype)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(exported), nnx.state(trained))
    assert exported.dtype == dtype
    assert Tokenizer.load(tmp_path / "out").content == Tokenizer.load(workdir).content
    assert exported.config == model.config


def test_a_relative_workdir(tmp_path, workdir, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    assert [folder.name for folder in run_checkpoint.list_checkpoints(workdir.name)[0]] == ["1", "2"]
    assert run_checkpoint.export(workdir.name, tmp_path / "out") == 2
    # A run that is resumed finds them complete, too, and sets none aside.
    with Checkpoints(workdir.name, keep=2):
        assert [folder.name for folder in run_checkpoint.list_checkpoints(workdir)[0]] == ["1", "2"]


def test_its_logits_are_the_same(tmp_path, workdir, trainer, model, compiled):
    run_checkpoint.export(workdir, tmp_path / "out", dtype="float32")
    exported = moss_jax.load(tmp_path / "out")
    trained = trainer.model(double(trainer.adopt(model)), "float32")
    np.testing.assert_array_equal(logits(compiled, exported), logits(compiled, trained))
    assert np.abs(logits(compiled, exported) - logits(compiled, model)).max() > 1e-3


def test_an_earlier_step(tmp_path, workdir, model):
    assert run_checkpoint.export(workdir, tmp_path / "out", step=1, dtype="float32") == 1
    exported = moss_jax.load(tmp_path / "out")
    kernel = nnx.state(exported)["projector"]["kernel"][...]
    np.testing.assert_array_equal(kernel, model.projector.kernel[...])


def test_what_cannot_be_exported(tmp_path, workdir):
    with pytest.raises(CheckpointError, match=r"step 7 in .* does not exist; there are those of 1, 2"):
        run_checkpoint.export(workdir, tmp_path / "out", step=7)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint of a training run"):
        run_checkpoint.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run_checkpoint.export(workdir, tmp_path / "out")


def test_a_damaged_checkpoint_is_refused(tmp_path, workdir):
    damaged = shutil.copytree(workdir, tmp_path / "damaged")
    params = damaged / run_checkpoint.CHECKPOINTS / "2" / "params"
    (params / "_METADATA").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=f"{params} is damaged"):
        run_checkpoint.export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_not_finite_are_refused(tmp_path, trainer, model, tokenizer):
    """NaN in float32 weights, and a value that only float32 can hold."""
    tokenizer.save(tmp_path / "run")
    config = {"gin": "", "model": run_checkpoint.model_to_json(model.config)}
    state, name = trainer.adopt(model), "projector/bias"
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        for step, value in ((1, 3.4e38), (2, jnp.nan)):
            state.trained[name] = state.trained[name].at[0].set(value)
            checkpoints.save(step, state, position={"batch": step}, config=config)
    out = tmp_path / "out"
    for step, dtype in ((2, "float32"), (2, "bfloat16"), (1, "bfloat16")):
        with pytest.raises(CheckpointError) as error:
            run_checkpoint.export(tmp_path / "run", out, step=step, dtype=dtype)
        says = (
            f"checkpoints/{step}: 1 of its tensors, the first of them {name}, have NaN or infinite values in "
        )
        assert says + dtype in str(error.value)
        assert not out.exists()
    run_checkpoint.export(tmp_path / "run", out, step=1, dtype="float32")
    assert moss_jax.load(out).projector.bias[0] == np.float32(3.4e38)


@pytest.mark.parametrize("out", ["run", "run/checkpoints", "run/checkpoints/3", "run/checkpoints/2/params/x"])
def test_a_run_is_not_exported_into_itself(tmp_path, workdir, out):
    shutil.copytree(workdir, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"exists and is not empty|which holds the run's own checkpoints"
    ):
        run_checkpoint.export(tmp_path / "run", tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_that_cannot_be_read_is_refused(tmp_path, workdir):
    damaged = shutil.copytree(workdir, tmp_path / "damaged")
    config = damaged / run_checkpoint.CHECKPOINTS / "2" / "config" / "metadata"
    value = json.loads(config.read_text())
    value["model"]["config"]["model_type"] = "llama"
    for text in (json.dumps(value), '{"gin": ""}', '{"model": 3}'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"its config cannot be read|lacks the key 'model'"):
            run_checkpoint.export(damaged, tmp_path / "out")


def test_the_command(tmp_path, workdir, monkeypatch, capsys):
    command = ["convert", "export", "--workdir", str(workdir), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    assert __main__.main() == 0
    assert "after 2 steps, in bfloat16" in capsys.readouterr().out
    assert moss_jax.load(tmp_path / "out", dtype="bfloat16").dtype == jnp.bfloat16
    assert __main__.main() == 2
    assert "exists and is not empty" in capsys.readouterr().err
    run = shutil.copytree(workdir, tmp_path / "run")
    (run / "tokenizer.json").write_text("{")
    monkeypatch.setattr(
        "sys.argv", ["convert", "export", "--workdir", str(run), "--out", str(tmp_path / "new")]
    )
    assert __main__.main() == 2
    assert "cannot be read as a tokenizer.json" in capsys.readouterr().err
