"""Fixtures that all tests share: platforms, reference vectors, real data, small models, compiled verbs."""

import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
import shapes  # noqa: F401  Before moss_jax, whose import it hooks into.
from engines import frames, make_engine, model, one_pass, scripted, tokenizer
from flax import nnx

import moss_jax
from moss_jax.config import CompressorConfig, DecoderConfig, ModelConfig, VisionConfig
from moss_jax.nn import MossVideo

__all__ = ["frames", "make_engine", "model", "one_pass", "scripted", "tokenizer"]

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny_average"
REAL_DATA = ROOT.parent / "shared" / "data"

# The interpreter of GPU kernels runs every warpgroup as a program of its own, and they wait for one another:
# each needs a thread.
os.environ.setdefault("NPROC", str(max(4, os.cpu_count() or 1)))

# float32 matmuls on a GPU are TF32 by default, which no tolerance here allows for.
jax.config.update("jax_default_matmul_precision", "highest")

# Memory mappings of a process from which on compiled programs are dropped; Linux allows 65,530, and a program
# takes several. At the limit XLA aborts.
MANY_MAPPINGS = 30_000

hypothesis.settings.register_profile(
    "moss_jax", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("moss_jax")


def pytest_configure(config):
    """Tests compile much and compute little: fast rather than well, and once for all processes of a run."""
    on_gpu = config.option.markexpr == "gpu"
    if on_gpu:
        # Processes of one run share the card.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flag = "--xla_gpu_autotune_level=0" if on_gpu else "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    # In the environment for other processes, in JAX's own settings for this one, which has read it.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="moss_jax-compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("gpu") for item in items) and jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def platform(request) -> str:
    """Runs a test on the CPU, and among the GPU tests on the GPU."""
    if request.param != jax.default_backend():
        pytest.skip(f"runs on {request.param}")
    return request.param


@dataclasses.dataclass(frozen=True)
class Golden:
    """A random tiny model and what the original PyTorch code makes of it."""

    folder: Path
    model: MossVideo
    vectors: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]

    @property
    def tokens(self) -> np.ndarray:
        return self.vectors["input_ids"].astype(np.int32)

    @property
    def frame_positions(self) -> np.ndarray:
        return self.vectors["frame_positions"].astype(np.int32)

    @property
    def pixels(self) -> np.ndarray:
        """[B, F, H, W, 3], from [B, F, 1 tile, 3, H, W]."""
        return self.vectors["pixel_values"][:, :, 0].transpose(0, 1, 3, 4, 2)


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(
        GOLDEN,
        moss_jax.load(GOLDEN),
        dict(np.load(GOLDEN / "vectors.npz")),
        dict(np.load(GOLDEN / "gradients.npz")),
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"{REAL_DATA} is not here")
    return REAL_DATA


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder whose files' permissions count, also where root runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(verb, graph, params, *args, **kwargs):
    return getattr(nnx.merge(graph, params), verb)(*args, **kwargs)


class Compiled:
    """A model whose verbs run compiled; models of one config share the programs."""

    def __init__(self, model: MossVideo):
        self.config = model.config
        self.init_state = model.init_state
        self._graph, self._params = nnx.split(model)

    def __call__(self, *args, **kwargs):
        return _call("__call__", self._graph, self._params, *args, **kwargs)

    def encode(self, *args, **kwargs):
        return _call("encode", self._graph, self._params, *args, **kwargs)

    def remember(self, *args, **kwargs):
        return _call("remember", self._graph, self._params, *args, **kwargs)

    def decode(self, *args, **kwargs):
        return _call("decode", self._graph, self._params, *args, **kwargs)


@pytest.fixture(scope="session")
def compiled():
    """`compiled(model)` has the model's verbs, compiled."""
    return Compiled


@pytest.fixture(scope="session")
def small_config():
    """`small_config(mode)` is the smallest config with every part of the model in it."""

    def make(mode: str = "average", **changes) -> ModelConfig:
        config = ModelConfig(
            vision=VisionConfig(
                image_size=28,
                patch_size=14,
                hidden_size=16,
                intermediate_size=32,
                num_layers=2,
                num_global_layers=1,
                num_heads=2,
                intermediate_layers=(1,),
            ),
            compressor=CompressorConfig(mode=mode, stride=2),
            decoder=DecoderConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=48,
                num_layers=3,
                num_heads=4,
                num_kv_heads=2,
                cross_attention_layers=(0, 2),
                max_positions=256,
            ),
        )
        return dataclasses.replace(config, **changes)

    return make


@pytest.fixture(scope="session")
def tiny_config(small_config):
    """`tiny_config(mode)` is the small config with one layer of each kind, which compiles faster."""

    def make(mode: str = "average", **changes) -> ModelConfig:
        config = small_config(mode, **changes)
        return dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, num_layers=1, intermediate_layers=(0,)),
            decoder=dataclasses.replace(config.decoder, num_layers=2, cross_attention_layers=(1,)),
        )

    return make


@pytest.fixture(scope="session")
def random_model():
    """`random_model(config)` has parameters large enough that every one of them tells in the logits."""

    def make(
        config: ModelConfig, *, dtype="float32", seed: int = 0, of: type[nnx.Module] = MossVideo
    ) -> nnx.Module:
        rng = np.random.default_rng(seed)
        graph, params = nnx.split(nnx.eval_shape(lambda: of(config, rngs=nnx.Rngs(0), dtype=dtype)))

        drawn = []
        for path, variable in nnx.to_flat_state(params):
            centre, spread = (1, 0.1) if path[-1] == "weight" else (0, 0.2)
            value = centre + spread * rng.standard_normal(variable.shape)
            drawn.append((path, variable.replace(jax.numpy.asarray(value, variable.dtype))))
        return nnx.merge(graph, nnx.from_flat_state(drawn))

    return make


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Drops all compiled programs between two files of tests, if there are very many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPPINGS:
        jax.clear_caches()
