"""A training run: build, restore, iterate, log, save."""

import contextlib
import dataclasses
import difflib
import logging
import math
import signal
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_jax import convert
from moss_jax.config import (
    PRESETS,
    ConfigError,
    ConversationConfig,
    DataConfig,
    FrameSampling,
    InitialModelConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TabletopConfig,
    TrainConfig,
)
from moss_jax.convert import hub, run_checkpoint
from moss_jax.data.batch import Batch
from moss_jax.data.conversations import ConversationBatches
from moss_jax.data.pipeline import BatchSource, iterate
from moss_jax.data.worlds import TabletopBatches
from moss_jax.nn.compressor import Compressor
from moss_jax.sharding import make_mesh
from moss_jax.text import Tokenizer
from moss_jax.train.checkpoints import Checkpoints
from moss_jax.train.flops import peak_flops, train_flops
from moss_jax.train.log import Log, draw_curve
from moss_jax.train.step import Trainer, TrainState

# Steps that the device may be ahead of the host. Metrics are read so many steps late, when they are there
# already, so that the device never waits for the host.
AHEAD = 2
# Rows that are seen before the share of broken ones among them says something.
ENOUGH_ROWS = 20
# Reasons that are counted one by one.
MAX_REASONS = 50

_logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be trained on; the message says what is wrong with how much of it."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
      source: of the kind of data that `data` names.
      sampling: of the frames of conversations; the tabletop has its own.
      text: the same in words, to be kept beside every checkpoint.
    """

    train: TrainConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    model: InitialModelConfig
    data: DataConfig
    source: TabletopConfig | ConversationConfig
    sampling: FrameSampling | None
    text: str


def run(config: RunConfig, workdir: Path, *, resume: bool = False) -> None:
    """Trains until the last step, or until SIGTERM or Ctrl-C; either way a checkpoint holds what was done.

    Args:
      workdir: for checkpoints, tokenizer.json, config.gin, metrics.jsonl, TensorBoard files and the curve.
      resume: go on from the newest checkpoint there, if there is one.

    Raises:
      ConfigError, CheckpointError, TokenizerError: the settings cannot work.
      DataError: too many rows cannot be used.
      BatchError: a batch cannot be made.
    """
    train = config.train
    whole, broken = run_checkpoint.list_checkpoints(workdir)
    if (whole or broken) and not resume:
        raise ConfigError(
            f"{workdir} holds checkpoints of an earlier run; go on with it by --resume, or choose another "
            "folder"
        )

    # Build. Data comes first: what is wrong with it shows in seconds, and a large model takes minutes.
    tokenizer, model_config = _choose_model(config.model)
    source = _open_source(config, tokenizer, model_config)
    if tokenizer.vocab_size != model_config.decoder.vocab_size:
        raise ConfigError(
            f"the model predicts {model_config.decoder.vocab_size} tokens, but its tokenizer has "
            f"{tokenizer.vocab_size}; set model.checkpoint to a folder with a model and its tokenizer.json"
        )
    mesh = _mesh(config.mesh)
    trainer = Trainer(model_config, train, config.optimizer, mesh, silence_id=tokenizer.special.silence)

    with contextlib.ExitStack() as stack:
        # Restore.
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=train.keep_checkpoints))
        restored = checkpoints.restore(trainer.abstract()) if resume else None
        if restored:
            state, start = restored.state, int(restored.state.step)
            drops = Drops(**restored.position["drops"])
            _tell_changes(restored.config["gin"], config.text)
            _logger.info("goes on after step %d of %d", start, train.steps)
        else:
            state, start, drops = _begin(trainer, config, model_config), 0, Drops()
        checkpoint_config = {"gin": config.text, "model": run_checkpoint.model_to_json(model_config)}
        log = None
        if jax.process_index() == 0:
            (workdir / "config.gin").write_text(config.text)
            tokenizer.save(workdir)
            log = stack.enter_context(_open_log(config, workdir, start))

        # Iterate. `running` holds the steps that the device may not have done yet.
        running: deque[Dispatched] = deque()

        def finish(*, all_but: int) -> None:
            while len(running) > all_but:
                step = running.popleft()
                metrics = jax.device_get(step.metrics)
                drops.count(step.rows, step.dropped)
                if step.number % train.log_every == 0:
                    drops.check(config.data.max_dropped_share)
                if log:
                    log.record(step.number, metrics, flops=step.flops, dropped=drops.dropped)

        stopping = stack.enter_context(_stop_signals())
        workers = config.data.workers
        batches = iterate(source, start=start, workers=workers, read_ahead=config.data.read_ahead)
        stack.callback(batches.close)
        for step in range(start + 1, train.steps + 1):
            loaded = next(batches)
            batch = trainer.put(loaded.batch)
            state, metrics = trainer.step(state, batch)
            rows = len(loaded.batch.tokens)
            running.append(
                Dispatched(step, metrics, _flops(model_config, train, batch), rows, loaded.dropped)
            )
            finish(all_but=AHEAD)

            # Save.
            stop = _stops(stopping, step)
            if stop or step % train.checkpoint_every == 0 or step == train.steps:
                finish(all_but=0)
                position = {"batch": step, "drops": dataclasses.asdict(drops)}
                checkpoints.save(step, state, position=position, config=checkpoint_config)
            if stop:
                _logger.warning("told to stop: saved after step %d of %d", step, train.steps)
                break
    _logger.info("%s", drops)
    if log:
        draw_curve(workdir)


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that the device has been given.

    Attributes:
      flops: operations that it calls for.
      rows, dropped: rows of its batch that this process loaded, and those of them that broke.
    """

    number: int
    metrics: dict[str, jax.Array]
    flops: float
    rows: int
    dropped: tuple[str, ...]


@dataclasses.dataclass
class Drops:
    """Rows that this process has loaded, and those of them that broke.

    Attributes:
      reasons: how many broke for each of the first reasons that there were.
    """

    rows: int = 0
    dropped: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, rows: int, dropped: tuple[str, ...]) -> None:
        self.rows += rows
        self.dropped += len(dropped)
        for reason in dropped:
            if reason in self.reasons or len(self.reasons) < MAX_REASONS:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def check(self, max_share: float) -> None:
        """Raises DataError if too many of enough rows broke."""
        if self.rows >= ENOUGH_ROWS and self.dropped > max_share * self.rows:
            raise DataError(f"{self}\n{_too_many(max_share)}")

    def __str__(self) -> str:
        if not self.dropped:
            return f"all {self.rows} rows could be loaded"
        lines = [f"{self.dropped} of {self.rows} rows broke while they were loaded:"]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if rest := self.dropped - sum(self.reasons.values()):
            lines.append(f"  and {rest} more")
        return "\n".join(lines)


def _too_many(max_share: float) -> str:
    return (
        f"More than {max_share:.0%} of the rows cannot be used: mend the data or raise data.max_dropped_share"
    )


def _choose_model(choice: InitialModelConfig) -> tuple[Tokenizer, ModelConfig]:
    """The tokenizer and the shape of the model, before anything of it is loaded."""
    if choice.checkpoint:
        folder = hub.resolve(choice.checkpoint)
        config, tokenizer = convert.load_config(folder), Tokenizer.load(folder)
    else:
        config, tokenizer = PRESETS[choice.preset](), Tokenizer.moss_tiny()
    changes = {"mode": choice.pool, "stride": choice.stride}
    compressor = dataclasses.replace(config.compressor, **{k: v for k, v in changes.items() if v is not None})
    return tokenizer, dataclasses.replace(
        config, compressor=compressor, attention=choice.attention, remat=choice.remat
    )


def _open_source(config: RunConfig, tokenizer: Tokenizer, model: ModelConfig) -> BatchSource:
    """The batches of the run."""
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size = model.vision.image_size
    batch_size, seed = config.train.batch_size, config.train.seed
    if isinstance(config.source, TabletopConfig):
        if config.source.image_size != size:
            raise ConfigError(
                f"the model sees frames of {size} pixels: set tabletop.image_size to that, "
                f"not {config.source.image_size}"
            )
        return TabletopBatches(config.source, tokenizer, batch_size=batch_size, seed=seed, **share)
    source = ConversationBatches(
        config.source, config.sampling, tokenizer, image_size=size, batch_size=batch_size, seed=seed, **share
    )
    report, limit = source.report, config.data.max_dropped_share
    if report.dropped_share > limit:
        raise DataError(f"{report}\n{_too_many(limit)}")
    if not report.kept:
        raise DataError(f"{report}: there is nothing to train on")
    _logger.info("%s", report)
    return source


def _mesh(config: MeshConfig) -> Mesh:
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.device_count()
    if 0 in sizes:
        sizes[sizes.index(0)] = devices // math.prod(size for size in sizes if size)
    try:
        return make_mesh(*sizes)
    except ValueError as error:
        raise ConfigError(
            f"{error}; set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to that"
        ) from error


def _open_log(config: RunConfig, workdir: Path, start: int) -> Log:
    peak = peak_flops(jax.devices()[0].device_kind)
    return Log(
        workdir,
        config=config.text,
        start=start,
        steps=config.train.steps,
        every=config.train.log_every,
        peak_flops=peak and peak * jax.device_count(),
    )


def _flops(model: ModelConfig, train: TrainConfig, batch: Batch) -> float:
    """Operations that a step over this batch calls for."""
    rows, tokens = batch.tokens.shape
    frames = batch.frame_positions.shape[1]
    return train_flops(model, batch=rows, tokens=tokens, frames=frames, trained=train.trainable)


def _begin(trainer: Trainer, config: RunConfig, model_config: ModelConfig) -> TrainState:
    """The state before the first step."""
    if not config.model.checkpoint:
        return trainer.init(config.train.seed)
    model = convert.load(config.model.checkpoint, mesh=trainer.mesh)
    if model_config.compressor != model.config.compressor:
        # Pooling has no parameters to load; channelFusion's begin at random where the checkpoint has none.
        rngs = nnx.Rngs(config.train.seed)
        model.compressor = Compressor(
            model_config.compressor, model_config.vision, rngs=rngs, dtype=model.dtype
        )
    return trainer.adopt(model)


def _tell_changes(before: str, after: str) -> None:
    """Warns of settings that are not those of the checkpoint."""
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    lines = [line for line in changes if line[0] in "+-" and line[:3] not in ("+++", "---")]
    if lines:
        _logger.warning(
            "goes on with other settings than the checkpoint was made with:\n  %s", "\n  ".join(lines)
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Sets the event at SIGTERM or Ctrl-C, so that a step is finished; a second Ctrl-C interrupts."""
    event = threading.Event()
    if jax.process_count() > 1:
        # JAX watches for SIGTERM itself then, since all processes must stop after the same step.
        yield event
        return

    def ask(number, _):
        event.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield event
    finally:
        for number in signals:
            signal.signal(number, before[number])


def _stops(event: threading.Event, step: int) -> bool:
    """Whether to stop after this step; all processes agree."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return event.is_set()
