"""A training run: build, restore, iterate, log, save."""

import contextlib
import dataclasses
import difflib
import fcntl
import itertools
import logging
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent import futures
from pathlib import Path

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moss_jax import convert
from moss_jax.config import (
    PRESETS,
    CompressorConfig,
    ConfigError,
    ConversationConfig,
    DataConfig,
    FrameSampling,
    InitialModelConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SegmentsConfig,
    TabletopConfig,
    TrainConfig,
)
from moss_jax.convert import hub, run_checkpoint
from moss_jax.data.batch import Batch
from moss_jax.data.conversations import ConversationBatches
from moss_jax.data.pipeline import BatchSource, LoadedBatch, iterate
from moss_jax.data.segments import TabletopSegments
from moss_jax.data.worlds import TabletopBatches
from moss_jax.nn.compressor import Compressor
from moss_jax.sharding import MESH_AXES, make_mesh, row_share
from moss_jax.text import Tokenizer
from moss_jax.train.checkpoints import Checkpoints, RunError
from moss_jax.train.flops import peak_flops, train_flops
from moss_jax.train.log import Log, draw_curve
from moss_jax.train.step import Trainer, TrainState

# The metrics of a step are read this many steps later, so that the device never waits for the host.
STEPS_IN_FLIGHT = 2
# File in the folder of a run that is locked while it runs.
LOCK = ".lock"
# Rows that must have been loaded before the share of dropped ones can abort a run.
MIN_ROWS = 20
# Reasons for dropped rows that are counted separately.
MAX_REASONS = 50

_logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be trained on; the message says how much of it is unusable and why."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
      train: steps, batch size, trained parts.
      optimizer: learning rate and AdamW.
      mesh: devices along each axis.
      model: the model that training starts from.
      data: the kind of data, and its workers.
      source: settings of that kind of data.
      sampling: frame sampling of conversations; None for the tabletop world, which has its own.
      segments: settings for segments of long streams; None to train on whole sequences.
      text: the operative gin config, saved with every checkpoint.
    """

    train: TrainConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    model: InitialModelConfig
    data: DataConfig
    source: TabletopConfig | ConversationConfig
    sampling: FrameSampling | None
    segments: SegmentsConfig | None
    text: str


def run(config: RunConfig, workdir: Path, *, resume: bool = False) -> None:
    """Trains until the last step, or until SIGTERM or Ctrl-C; saves a checkpoint in both cases.

    Args:
      config: all settings.
      workdir: for checkpoints, tokenizer.json, config.gin, metrics.jsonl, TensorBoard files and the curve.
      resume: resume from the latest checkpoint in `workdir`, if there is one.

    Raises:
      ConfigError: the settings are invalid, or `workdir` cannot be written or is another run's.
      CheckpointError: a checkpoint cannot be used.
      TokenizerError: the tokenizer cannot be used.
      DataError: too many rows are unusable.
      BatchError: a batch could not be built.
      RunError: the metrics of a step are not finite, or a checkpoint could not be written.
    """
    with _locked(workdir) if jax.process_index() == 0 else contextlib.nullcontext():
        _run(config, workdir, resume=resume)


def _run(config: RunConfig, workdir: Path, *, resume: bool) -> None:
    train = config.train
    whole, broken = run_checkpoint.list_checkpoints(workdir)
    if (whole or broken) and not resume:
        raise ConfigError(
            f"{workdir} has checkpoints of an earlier run; resume it with --resume, or choose another folder"
        )
    if resume and not whole:
        _logger.warning("%s has no checkpoint to resume from: the run starts at step 1", workdir)

    # Build. Data comes first: errors in it show within seconds, and a large model takes minutes.
    tokenizer, model_config = _load_model_config(config.model, workdir, whole[-1] if whole else None)
    mesh = _make_mesh(config.mesh)
    source = _open_source(config, tokenizer, model_config, mesh)
    rows = _rows_of(source)
    if tokenizer.vocab_size != model_config.decoder.vocab_size:
        raise ConfigError(
            f"the model predicts {model_config.decoder.vocab_size} tokens, but its tokenizer has "
            f"{tokenizer.vocab_size}; set model.checkpoint to a folder with a model and its tokenizer.json"
        )
    trainer = Trainer(
        model_config,
        train,
        config.optimizer,
        mesh,
        silence_id=tokenizer.special.silence,
        segments=config.segments,
    )

    with contextlib.ExitStack() as stack:
        # Restore.
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=train.keep_checkpoints))
        restored = checkpoints.restore(trainer.abstract()) if resume else None
        if restored:
            state, start = restored.state, int(restored.state.step)
            drops = DropCounts(**restored.position["drops"])
            _warn_of_changes(restored.config["gin"], config.text)
            _warn_of_other_rows(restored.config.get("rows"), rows)
            _logger.info("resuming after step %d of %d", start, train.steps)
        else:
            state, start, drops = _initial_state(trainer, config, model_config), 0, DropCounts()
        checkpoint_config = {
            "gin": config.text,
            "model": run_checkpoint.model_to_json(model_config),
            "rows": rows,
        }
        log = None
        if jax.process_index() == 0:
            (workdir / "config.gin").write_text(config.text, encoding="utf-8")
            tokenizer.save(workdir)
            log = stack.enter_context(_open_log(config, workdir, start))

        # Iterate. `in_flight` has the steps whose metrics are not read yet.
        in_flight: deque[DispatchedStep] = deque()
        timer = stack.enter_context(futures.ThreadPoolExecutor(1))
        shapes = set()

        def read_metrics(*, all_but: int) -> None:
            while len(in_flight) > all_but:
                step = in_flight.popleft()
                metrics = jax.device_get(step.metrics)
                drops.count(step.rows, step.dropped)
                if step.number % train.log_every == 0:
                    drops.check(config.data.max_dropped_share)
                if log:
                    log.record(
                        step.number,
                        metrics,
                        finished=step.finished.result(),
                        compiled=step.compiled,
                        flops=step.flops,
                        dropped=drops.dropped,
                    )
                # Checked before a checkpoint of this step or a later one is saved.
                last = (step.number - 1) // train.checkpoint_every * train.checkpoint_every
                _check_finite(step.number, metrics, max(start, last))

        stopping = stack.enter_context(_stop_signals())
        workers = config.data.workers
        batches = iterate(source, start=start, workers=workers, read_ahead=config.data.read_ahead)
        stack.callback(batches.close)
        due = itertools.islice(batches, max(0, train.steps - start))
        placed = stack.enter_context(contextlib.closing(_placed(due, trainer)))
        for step in range(start + 1, train.steps + 1):
            loaded, batch = next(placed)
            called = time.perf_counter()
            state, metrics = trainer.step(state, batch)
            if compiled := (shape := batch.frames.shape[:2] + batch.tokens.shape[1:]) not in shapes:
                shapes.add(shape)
                seconds = time.perf_counter() - called
                _logger.info("step %d compiled: %d rows, %d frames, %d tokens, %.1f s", step, *shape, seconds)
            in_flight.append(
                DispatchedStep(
                    step,
                    metrics,
                    timer.submit(_await, metrics),
                    compiled,
                    flops=_step_flops(model_config, train, batch),
                    rows=len(loaded.batch.tokens),
                    dropped=loaded.dropped,
                )
            )
            read_metrics(all_but=STEPS_IN_FLIGHT)

            # Save.
            stop = _must_stop(stopping, step)
            if stop or step % train.checkpoint_every == 0 or step == train.steps:
                read_metrics(all_but=0)
                position = {"batch": step, "drops": dataclasses.asdict(drops)}
                checkpoints.save(step, state, position=position, config=checkpoint_config)
            if stop:
                _logger.warning("stopped by a signal: saved after step %d of %d", step, train.steps)
                break
    _logger.info("%s", drops)
    if log:
        draw_curve(workdir)


def _placed(batches: Iterator[LoadedBatch], trainer: Trainer) -> Generator[tuple[LoadedBatch, Batch]]:
    """Yields batches with their copies on the devices, which a thread makes during the previous step."""

    def place() -> tuple[LoadedBatch, Batch] | None:
        loaded = next(batches, None)
        return loaded and (loaded, trainer.put(loaded.batch))

    with futures.ThreadPoolExecutor(1) as thread:
        pending = thread.submit(place)
        while placed := pending.result():
            pending = thread.submit(place)
            yield placed


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step that was dispatched to the device.

    Attributes:
      number: counted from 1.
      metrics: on the device.
      finished: time at which the device finishes it, by `time.perf_counter`.
      compiled: whether its program was compiled for it, as for the first batch of each shape.
      flops: model FLOPs of the step.
      rows: number of rows that this process loaded.
      dropped: for each of these rows that could not be loaded, the reason.
    """

    number: int
    metrics: dict[str, jax.Array]
    finished: futures.Future[float]
    compiled: bool
    flops: float
    rows: int
    dropped: tuple[str, ...]


@dataclasses.dataclass
class DropCounts:
    """Counts the rows that this process has loaded or failed to load.

    Attributes:
      rows: number of all rows.
      dropped: number of rows that could not be loaded.
      reasons: number of dropped rows by reason, for the first MAX_REASONS reasons.
    """

    rows: int = 0
    dropped: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    def count(self, rows: int, dropped: tuple[str, ...]) -> None:
        """Adds the rows of a batch, and the reasons for those that were dropped."""
        self.rows += rows
        self.dropped += len(dropped)
        for reason in dropped:
            if reason in self.reasons or len(self.reasons) < MAX_REASONS:
                self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def check(self, max_share: float) -> None:
        """Checks the share of dropped rows, once there are MIN_ROWS.

        Raises:
          DataError: it exceeds `max_share`.
        """
        if self.rows >= MIN_ROWS and self.dropped > max_share * self.rows:
            raise DataError(f"{self}\n{_too_many(max_share)}")

    def __str__(self) -> str:
        if not self.dropped:
            return f"all {self.rows} rows were loaded"
        lines = [f"{self.dropped} of {self.rows} rows could not be loaded:"]
        lines += [f"  {count} x {reason}" for reason, count in self.reasons.items()]
        if rest := self.dropped - sum(self.reasons.values()):
            lines.append(f"  and {rest} more")
        return "\n".join(lines)


def _too_many(max_share: float) -> str:
    return f"More than {max_share:.0%} of the rows are unusable: fix the data or raise data.max_dropped_share"


def _load_model_config(
    initial: InitialModelConfig, workdir: Path, latest: Path | None
) -> tuple[Tokenizer, ModelConfig]:
    """Loads the tokenizer and the config of the model, but no parameters.

    Args:
      initial: the model that training starts from.
      workdir: the run's folder.
      latest: the checkpoint that the run resumes from, whose model takes precedence; None for a new run.
    """
    if latest:
        config = run_checkpoint.model_from_json(run_checkpoint.read_json(latest, "config")["model"])
        tokenizer = Tokenizer.load(workdir)
    elif initial.checkpoint:
        folder = hub.resolve(initial.checkpoint)
        config, tokenizer = convert.load_config(folder), Tokenizer.load(folder)
    else:
        assert initial.preset is not None  # InitialModelConfig requires one of the two
        config, tokenizer = PRESETS[initial.preset](), Tokenizer.moss_tiny()
    compressor = CompressorConfig(
        mode=initial.pool or config.compressor.mode,
        stride=config.compressor.stride if initial.stride is None else initial.stride,
    )
    if compressor != config.compressor and (origin := latest or initial.checkpoint):
        _logger.warning(
            "model.pool and model.stride override the frame compressor of %s: %s with stride %d, not %s with "
            "stride %d",
            origin,
            *dataclasses.astuple(compressor),
            *dataclasses.astuple(config.compressor),
        )
    return tokenizer, dataclasses.replace(
        config,
        compressor=compressor,
        attention=initial.attention,
        remat=initial.remat,
        vision_remat=initial.vision_remat,
    )


def _open_source(config: RunConfig, tokenizer: Tokenizer, model: ModelConfig, mesh: Mesh) -> BatchSource:
    """Opens the source of batches.

    Raises:
      ConfigError: the settings do not fit the model.
      DataError: too many rows are unusable.
    """
    index, count = row_share(mesh)
    share = {"process_index": index, "process_count": count}
    size = model.vision.image_size
    batch_size, seed = config.train.batch_size, config.train.seed
    if isinstance(config.source, TabletopConfig):
        if config.source.image_size != size:
            raise ConfigError(
                f"tabletop.image_size {config.source.image_size} must be the model's image_size {size}"
            )
        if config.segments:
            return TabletopSegments(
                config.source, config.segments, tokenizer, batch_size=batch_size, seed=seed, **share
            )
        return TabletopBatches(config.source, tokenizer, batch_size=batch_size, seed=seed, **share)
    assert config.sampling is not None
    source = ConversationBatches(
        config.source, config.sampling, tokenizer, image_size=size, batch_size=batch_size, seed=seed, **share
    )
    report, limit = source.report, config.data.max_dropped_share
    if report.dropped_share > limit:
        raise DataError(f"{report}\n{_too_many(limit)}")
    if not report.kept:
        raise DataError(f"{report}: there is no data to train on")
    _logger.info("%s", report)
    return source


def _make_mesh(config: MeshConfig) -> Mesh:
    """Creates the mesh; an axis of size 0 takes the devices that the other axes leave.

    Raises:
      ConfigError: the number of devices does not fit the axes.
    """
    fixed = {axis: size for axis, size in dataclasses.asdict(config).items() if size}
    rest, left = divmod(jax.device_count(), math.prod(fixed.values()))
    if len(fixed) < len(MESH_AXES) and left:
        names = ", ".join(f"mesh.{axis} = {size}" for axis, size in fixed.items() if size > 1)
        raise ConfigError(
            f"{names} needs a multiple of {math.prod(fixed.values())} devices, but there "
            f"{'is 1' if jax.device_count() == 1 else f'are {jax.device_count()}'}"
        )
    try:
        return make_mesh(config.data or rest, config.fsdp or rest, config.tensor or rest)
    except ValueError as error:
        raise ConfigError(
            f"{error}; the product of mesh.data, mesh.fsdp and mesh.tensor must be the number of devices"
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


def _step_flops(model: ModelConfig, train: TrainConfig, batch: Batch) -> float:
    """Returns the model FLOPs of a step with this batch."""
    rows, tokens = batch.tokens.shape
    frames = batch.frame_positions.shape[1]
    return train_flops(model, batch=rows, tokens=tokens, frames=frames, trained=train.trainable)


def _initial_state(trainer: Trainer, config: RunConfig, model_config: ModelConfig) -> TrainState:
    """Returns the state before the first step."""
    if not config.model.checkpoint:
        return trainer.init(config.train.seed)
    model = convert.load(config.model.checkpoint, mesh=trainer.mesh)
    if model_config.compressor != model.config.compressor:
        # Most modes have no parameters; those of channelFusion are random if the checkpoint has none.
        rngs = nnx.Rngs(config.train.seed)
        model.compressor = Compressor(
            model_config.compressor, model_config.vision, rngs=rngs, dtype=model.dtype
        )
    return trainer.adopt(model)


def _warn_of_changes(before: str, after: str) -> None:
    """Warns of settings that differ from those of the checkpoint."""
    changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    lines = [line for line in changes if line[0] in "+-" and line[:3] not in ("+++", "---")]
    if lines:
        _logger.warning("the settings differ from those of the checkpoint:\n  %s", "\n  ".join(lines))


def _rows_of(source: BatchSource) -> dict[str, int | str] | None:
    """Returns count and fingerprint of rows from files, by which a resumed run detects changed data."""
    if isinstance(source, ConversationBatches):
        return {"count": source.report.kept, "fingerprint": source.fingerprint}
    return None


def _warn_of_other_rows(
    before: Mapping[str, int | str] | None, after: Mapping[str, int | str] | None
) -> None:
    """Warns of rows that differ from those of the checkpoint."""
    if before and after and before != after:
        _logger.warning(
            "the rows are not those of the checkpoint (%s then, %s now): from here on, batches differ from "
            "those of an uninterrupted run, and rows may come twice or not at all in this epoch",
            before["count"],
            after["count"],
        )


def _check_finite(step: int, metrics: Mapping[str, float], last: int) -> None:
    """Checks the metrics of a step, among them the norms of its gradient and of its new parameters.

    Args:
      step: counted from 1.
      metrics: as returned by `Trainer.step`.
      last: step of the last checkpoint; 0 if there is none.

    Raises:
      RunError: one of them is not finite.
    """
    bad = {name: float(value) for name, value in metrics.items() if not math.isfinite(value)}
    if not bad:
        return
    found = [f"the loss is {bad['loss']}"] if "loss" in bad else []
    for norm, of in (("grad_norm", "gradient"), ("param_norm", "parameters")):
        if parts := [name.partition("/")[2] for name in bad if name.startswith(f"{norm}/")]:
            found.append(f"the norm of the {of} of {', '.join(parts)} is {bad[f'{norm}/{parts[0]}']}")
    resume = "there is no checkpoint before it"
    if last:
        resume = f"--resume continues from the checkpoint of step {last}"
    raise RunError(
        f"training diverged at step {step}: {'; '.join(found or bad)}. Nothing of this step was saved; "
        f"{resume}. A lower optimizer.learning_rate may help, or a look at the data of this step"
    )


def _await(metrics: dict[str, jax.Array]) -> float:
    """Waits for the metrics of a step and returns the time."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Creates the folder of a run and locks it until the context is left or the process ends.

    Raises:
      ConfigError: the folder cannot be written, or another run has locked it.
    """
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("ab")
    except OSError as error:
        raise ConfigError(f"nothing can be written to {workdir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is training in {workdir}; choose another folder") from None
        except OSError as error:
            _logger.warning("%s cannot be locked (%s): start no other run there", workdir, error.strerror)
        try:
            yield
        finally:
            # A run that failed before it wrote anything leaves nothing behind.
            if missing and [path.name for path in workdir.iterdir()] == [LOCK]:
                (workdir / LOCK).unlink()
                with contextlib.suppress(OSError):
                    for folder in missing:
                        folder.rmdir()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Sets the event on SIGTERM or Ctrl-C, so that a step can finish; a second Ctrl-C interrupts."""
    event = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        # JAX handles SIGTERM itself, since all processes must stop after the same step. Only the main thread
        # can handle signals, and Ray calls a training function in another thread.
        yield event
        return

    def request_stop(number, _):
        event.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield event
    finally:
        for number in signals:
            signal.signal(number, before[number])


def _must_stop(event: threading.Event, step: int) -> bool:
    """Returns whether to stop after this step, the same in all processes."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return event.is_set()
