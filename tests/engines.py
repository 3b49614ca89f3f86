"""Engines for the tests of streams: one over a small model, and a scripted stand-in without a model."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moss_jax.config import EngineConfig, MemoryConfig, TokenSampling
from moss_jax.nn import MossVideo
from moss_jax.stream import PENDING, Engine, Row, Sampled
from moss_jax.text import Tokenizer
from moss_jax.video import preprocess

FORGETS_NOTHING = MemoryConfig(policy="full", text="full")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.moss_tiny()


@pytest.fixture(scope="session")
def model(small_config, random_model, tokenizer) -> MossVideo:
    """Random weights, large enough that frames and tokens change the output."""
    config = small_config()
    decoder = dataclasses.replace(config.decoder, vocab_size=tokenizer.vocab_size, max_positions=4096)
    return random_model(dataclasses.replace(config, decoder=decoder))


@pytest.fixture(scope="session")
def make_engine(model, tokenizer) -> Callable[..., Engine]:
    """Engines over the one small model, cached by their settings, so that programs compile once."""
    made: dict = {}

    def make(
        *,
        slots=1,
        text_capacity=512,
        bank_capacity=32,
        memory=FORGETS_NOTHING,
        policies=(),
        perception_device=None,
        **sampling,
    ) -> Engine:
        config = EngineConfig(slots, text_capacity, bank_capacity, memory, policies)
        key = (config, TokenSampling(**sampling), perception_device)
        if key not in made:
            made[key] = Engine(model, tokenizer, *key[:2], perception_device=perception_device)
        return made[key]

    return make


@pytest.fixture(scope="session")
def one_pass(model):
    """Logits of a whole sequence, one frame for each `<|image|>`; padded, so that it compiles once."""
    graph, params = nnx.split(model)
    vision = model.config.vision
    size, most = 512, 16

    @jax.jit
    def run(params, tokens, frames, positions):
        normalisation = {"image_size": vision.image_size, "mean": vision.image_mean, "std": vision.image_std}
        return nnx.merge(graph, params)(tokens, preprocess(frames, **normalisation)[None], positions)[0]

    def one_pass(tokens: list[int], frames: list[np.ndarray]) -> np.ndarray:
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        positions = np.full((1, most), size)
        positions[0, : len(frames)] = [
            i for i, token in enumerate(tokens) if token == model.config.decoder.image_token_id
        ]
        stack = np.zeros((most, *frames[0].shape), np.uint8)
        stack[: len(frames)] = frames
        return np.asarray(run(params, padded, stack, positions))[: len(tokens)]

    return one_pass


@pytest.fixture
def frames() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(16)]


# What a `ScriptedEngine` knows frames by: their first pixels, of one batch or of several.
type Pixels = np.ndarray | list[np.ndarray] | None


def shown_in(row: Row, features: Pixels) -> list[int]:
    """The frames of a row."""
    pool = np.concatenate(features) if isinstance(features, list) else features
    return [int(pool[i]) for i in row.frames if i is not None]


@dataclasses.dataclass
class ScriptedState:
    """The context of each slot, and its pending token."""

    context: list[list[int]]
    pending: list[int]


class ScriptedEngine:
    """An `EngineLike` that samples from a script, for tests of the dialogue.

    Args:
      script: the tokens that slot 0 samples, one after the other, or those of each slot; then it is silent.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Sequence[int] | Mapping[int, Sequence[int]],
        config: EngineConfig,
    ):
        self.tokenizer, self.config = tokenizer, config
        self.perception_device = None
        script = script if isinstance(script, Mapping) else {0: script}
        self.script = {slot: collections.deque(tokens) for slot, tokens in script.items()}
        self.seen: list[int] = []
        self.compactions = 0
        self.state = ScriptedState([], [])
        self.before_step: Callable[[], None] = lambda: None

    def start(self) -> ScriptedState:
        slots = self.config.slots
        self.state = ScriptedState([[] for _ in range(slots)], [PENDING] * slots)
        return self.state

    def encode(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([frame[0, 0, 0] for frame in frames], int)

    def distance(self, before: np.ndarray, i: int, after: np.ndarray, j: int) -> float:
        return abs(after[j] - before[i]) / 255

    def step(
        self, state: ScriptedState, rows: Sequence[Row | None], features: Pixels = None
    ) -> tuple[ScriptedState, Sampled]:
        self.before_step()
        special = self.tokenizer.special
        sampled = np.zeros(len(rows), np.int32)
        for slot, row in enumerate(rows):
            if row is None:
                continue
            if row.kept is not None:
                state.context[slot] = [state.context[slot][i] for i in row.kept]
            self.compactions += row.compact is not None
            tokens = [state.pending[slot] if t == PENDING else t for t in row.tokens]
            assert sum(t == special.image for t in tokens) == len(row.frames)
            self.seen += shown_in(row, features)
            state.context[slot] += tokens
            script = self.script.get(slot)
            # The sample after a speculative silence is dropped, so it does not come from the script.
            after_silence = row.tokens == [PENDING] and tokens == [special.silence]
            token = script.popleft() if script and not after_silence else special.silence
            state.pending[slot] = sampled[slot] = special.silence if token == special.eot else token
        return state, Sampled(jnp.asarray(sampled), jnp.zeros((len(rows), 1)))


@pytest.fixture
def scripted(tokenizer) -> Callable[..., ScriptedEngine]:
    def make(
        script=(), *, slots=1, text_capacity=4096, bank_capacity=256, memory=FORGETS_NOTHING
    ) -> ScriptedEngine:
        return ScriptedEngine(tokenizer, script, EngineConfig(slots, text_capacity, bank_capacity, memory))

    return make
