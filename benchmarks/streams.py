r"""Measures many live streams on one device: a `Scheduler` over an engine of N slots, for several N.

    python benchmarks/streams.py --weights int8 --encoder-weights fp8 --bank-dtype int8 \
        --out benchmarks/results/streams_11b_h200.json
    python benchmarks/streams.py --preset moss_tiny --streams 1,4 --seconds 5
    python benchmarks/streams.py --checkpoint moss-tiny --streams 4 --seconds 600

Each stream gets `--fps` frames a second, and every 5 seconds a prompt of 32 tokens, both at its own phase.
Feeder threads push them, and one more thread reads the events of all streams; an event's time is the wall
clock when that thread receives it. The first `--warm-seconds` are not counted. There is a new scheduler for
each load:

all        every stream talks endlessly; a prompt cuts the answer, and the next begins
quarter    a stream talks for a quarter of the time after each prompt, so that a quarter of them talk at any
           time; frames that arrive otherwise are answered by silence

With a preset, weights are random and frames noise. Streams begin at different ages, so that their compactions
are spread over time: with noise in the bank, from `--fill` frames in the first stream up to its capacity in
the last, and in the text cache, from half of it to all. A mask of the tokens that may be sampled in each slot
leaves only silence, or only tokens that are whole characters, so that each is an event. All of this is data:
programs and scheduler are those of any streams. With a checkpoint, streams begin empty, each gets the frames
and prompts of a stream of the tabletop world, and the model itself decides when to talk.

tok_s              tokens a second of a stream within its answers, mean and 5th percentile over the streams
ttft_ms            `push_prompt` to the first token after it
frame_to_token_ms  `push_frame` to the sample of the step that appended the frame
gap_ms             inter-token latency within answers, over all streams
share              floor over time: the least seconds that the traffic could take, over those that it took.
                   The floor of a step is the larger of two: its bytes at the rate of a large copy, which are
                   the decoder's parameters without the embedding, and the keys and values in range of each
                   active slot; and its GEMMs' FLOPs, without padding, at the rate of a large bfloat16 GEMM. A
                   frame adds the FLOPs of the encoder and of its keys and values at that rate, even if they
                   are multiplied in 8 bits. On another device, frames take no time from the steps, so the
                   floor is the larger of the two sums. Transfers and compactions are excluded. When no stream
                   talks, as happens with few streams, the device idles and the share is low
frames_waiting     frames that had been pushed when the traffic ended, but not seen by the model; and
                   prompts_waiting, those without a token after them
compiled           programs that XLA compiled or read from its cache on disk during the traffic, which spoil a
                   row
peak_gb            peak memory of the process so far, so only that of the most streams is meaningful; slot_mb
                   is the state of a slot

`--micro` times steps and batches of frames instead. A figure of a step is the median of 5 blocks of 10 steps,
which are dispatched without waiting and awaited once: the time of the device in a pipeline, as long as the
host dispatches faster. All blocks begin with the same caches, filled as above, except that the fullest leave
room for the tokens and frames of a block, since nothing is compacted.

step_ms            a decode step of all slots; changing_ms, of all but one, each time another, so that the
                   arguments on the device change
with_frame_ms      the same step with an encoded frame in one of the slots
with_prompt_ms     the same step with a prompt in one of the slots; prompt_adds_ms is the difference
blocking_ms        a decode step that is awaited before the next, so with its dispatch by the host
host_ms            time of the processor that dispatches a step of each kind
encode_ms          for the first N, encoding a batch of frames in the host's memory, by size, in blocking
                   calls; and encode_sent_ms, in the device's

Set JAX_COMPILATION_CACHE_DIR, since each N has its own programs.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inputs import padded_tokenizer, random_frames
from report import add_out, device, first_line, known, make_parser, publish, say, write
from streaming import GB, FilledEngine, prompt_text, tree_bytes
from timing import measure_ceilings
from traffic import SHARES, Feeders, Listener, Traffic, figures_of, random_traffic, tabletop_traffic

from moss_jax.command import at_least, freeze_heap
from moss_jax.config import (
    PRESETS,
    ConfigError,
    DecoderWeights,
    EncoderWeights,
    EngineConfig,
    KVDtype,
    MemoryConfig,
    SchedulerConfig,
    SessionConfig,
)
from moss_jax.convert import open_model
from moss_jax.memory import policies
from moss_jax.memory.eviction import Kind
from moss_jax.nn import MossVideo, for_decoding, quantize
from moss_jax.sharding import parse_mesh
from moss_jax.stream import PENDING, Row
from moss_jax.stream.capacity import capacity, memory_bytes, slot_bytes, workspace_bytes
from moss_jax.stream.engine import gather
from moss_jax.stream.rows import Shape, first_step, shapes, step_arguments
from moss_jax.stream.scheduler import Scheduler
from moss_jax.stream.stream import Clock, Stream
from moss_jax.text import Tokenizer, chat
from moss_jax.train.flops import forward_work

MB = 1e6
LEAST_SECONDS = 1.0  # Minimum traffic for a row.
# With --micro: blocks of each kind and steps of each, and batches of frames of each size.
BLOCKS, STEPS, CALLS = 5, 10, 20
# Kinds of steps. "changing": another slot pauses each time. "with_frame", "with_prompt": one of the slots
# has an encoded frame or a prompt. "blocking": decode steps that are each awaited.
MICRO = ("decode", "changing", "with_frame", "with_prompt", "blocking")
# An answer continues until it is cut, by a prompt or by the mask.
WITHOUT_END = 1 << 30
COMPILED = "/jax/core/compile/backend_compile_duration"


class StreamsEngine(FilledEngine):
    """An engine that controls which slots may talk, and records its calls.

    Attributes:
      calls: for each step or batch of frames, when the host dispatched it, and the rows by slot or the
        number of frames.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[float, Sequence[Row | None] | int]] = []
        self._lock = threading.Lock()
        self._talking = np.ones(self.config.slots, bool)

    def fill(self, frames: int) -> None:
        """Makes streams begin at different ages, from `frames` in the bank and half a text cache upwards."""
        config, age = self.config, np.arange(self.config.slots) / self.config.slots
        half = config.text_capacity // 2
        self.held = (frames + age * (config.bank_capacity - frames)).astype(int)
        self.said = (half + age * half).astype(int) - self.held

    def talk(self, talking: Sequence[bool]) -> None:
        """Sets which slots sample only text; the others sample only silence."""
        with self._lock:
            self._talking[:] = talking
            self.allowed = _choose(self.masks["text"], self.masks["silence"], self._talking.copy())

    def talk_in(self, slot: int, talks: bool) -> None:
        """Sets whether one slot samples text or silence."""
        with self._lock:
            self._talking[slot] = talks
            self.allowed = _choose(self.masks["text"], self.masks["silence"], self._talking.copy())

    def step(self, state, rows, features=None):
        self.calls.append((time.monotonic(), rows))
        return super().step(state, rows, features)

    def encode(self, frames):
        self.calls.append((time.monotonic(), len(frames)))
        return super().encode(frames)

    def send(self, frames):
        self.calls.append((time.monotonic(), len(frames)))
        return super().send(frames)

    def num_programs(self) -> int:
        return super().num_programs() + gather._cache_size()


@jax.jit
def _choose(text: jax.Array, silence: jax.Array, talking: jax.Array) -> jax.Array:
    return jnp.where(talking[:, None], text, silence)


class Floors:
    """Lower bounds of an engine's calls, in seconds on its devices."""

    def __init__(self, engine: StreamsEngine, ceilings: Mapping[str, float]):
        config, decoder = engine.model_config, engine.model_config.decoder
        self._is_apart = engine.perception_device is not None
        # Of a mesh, the devices work side by side.
        devices = len(engine.placement.device_set)
        self._copy, self._matmul = (
            1e12 * devices * ceilings[name] for name in ("copy_tb_s", "matmul_tflop_s")
        )
        embedding = decoder.vocab_size + decoder.extra_embeddings
        self._weights = tree_bytes(engine.parameters)
        self._weights -= embedding * decoder.hidden_size * engine.dtype.itemsize
        state = jax.eval_shape(engine.start).stream
        vector, self._token = (
            tree_bytes((part.keys, part.values)) / (engine.config.slots * part.keys[0].shape[2])
            for part in (state.bank, state.text)
        )
        self._frame = vector * config.vectors_per_frame
        self._flops_token = sum(work.matmul for work in forward_work(config, tokens=1, frames=0))
        work = forward_work(config, tokens=0, frames=1)
        self.encode = sum(w.matmul + w.attention for w in work) / self._matmul
        slots = np.zeros(engine.config.slots, int)
        self._begin = (slots + engine.held).tolist(), (slots + engine.held + engine.said).tolist()

    def step(self, tokens: int, frames_held: int, tokens_held: int) -> float:
        """Lower bound of one step.

        Args:
          tokens: number of tokens appended, over all slots.
          frames_held, tokens_held: in range of the active slots.
        """
        read = self._weights + frames_held * self._frame + tokens_held * self._token
        return max(read / self._copy, tokens * self._flops_token / self._matmul)

    def of(self, calls: Sequence[tuple[float, Any]], begin: float, end: float) -> float:
        """Lower bound of the calls in a range of time; `calls` are all since the state was created."""
        frames, tokens = (list(held) for held in self._begin)
        steps = encoding = 0.0
        for at, call in calls:
            counts = begin <= at < end
            if isinstance(call, int):
                encoding += counts * call * self.encode
                continue
            rows = {slot: row for slot, row in enumerate(call) if row}
            for slot, row in rows.items():
                if row.compact:
                    frames[slot] = row.compact.memory.low_mark(row.compact.frames)
                if row.kept is not None:
                    tokens[slot] = len(row.kept)
                frames[slot] += sum(frame is not None for frame in row.frames)
                tokens[slot] += len(row.tokens)
            if counts:
                held = (sum(counts[slot] for slot in rows) for counts in (frames, tokens))
                steps += self.step(sum(len(row.tokens) for row in rows.values()), *held)
        # Two devices work side by side.
        return max(steps, encoding) if self._is_apart else steps + encoding


def live(
    engine: StreamsEngine,
    floors: Floors,
    traffic: Traffic,
    warm: float,
    seconds: float,
    compiled: list,
    config: SchedulerConfig,
) -> dict[str, Any]:
    """Runs the streams for some seconds after a warm-up; returns the figures of a row.

    Args:
      compiled: list that grows with each compilation.
    """
    slots = engine.config.slots
    if traffic.talking:
        engine.talk(traffic.talking)
    engine.calls.clear()
    clock = Clock(is_realtime=True)
    listener = Listener(clock, slots)
    scheduler = Scheduler(engine, config)
    settings = SessionConfig(max_tokens_per_turn=WITHOUT_END) if traffic.talking else SessionConfig()
    streams = [
        scheduler.open(settings, system=traffic.system, prompt=traffic.prompt, clock=clock)
        for _ in range(slots)
    ]
    for stream in streams:
        stream.inbox = listener.inbox
        tell(stream, engine)
    feeders = Feeders(engine.talk_in, streams, listener, clock)
    with futures.ThreadPoolExecutor(1) as threads:
        heard = threads.submit(listener.listen)
        clock.start()
        zero, before = time.monotonic(), (engine.num_programs(), len(compiled))
        with scheduler:
            feeders.feed(traffic.pushes, warm + seconds)
            in_use = (jax.devices()[0].memory_stats() or {}).get("bytes_in_use")
        after = engine.num_programs(), len(compiled)
        listener.inbox.put(None)
    heard.result()
    calls = [(at - zero, call) for at, call in engine.calls]
    engine.calls.clear()
    ends = [voice.end.counters for voice in listener.voices if voice.end]
    seen, dropped = sum(c.frames for c in ends), sum(c.frames_dropped for c in ends)
    return {
        "admitted": len(streams),
        **figures_of(listener, warm, warm + seconds),
        "frames_pushed": feeders.frames,
        "frames_seen": seen,
        "frames_dropped": dropped,
        "frames_waiting": feeders.frames - seen - dropped,
        "prompts_waiting": listener.prompts_waiting,
        "share": floors.of(calls, warm, warm + seconds) / seconds,
        "steps": sum(warm <= at < warm + seconds and not isinstance(call, int) for at, call in calls),
        "feeders_late_ms": 1e3 * feeders.late,
        "compiled": max(now - then for now, then in zip(after, before, strict=True)),
        **({"in_use_gb": in_use / GB} if in_use else {}),
        **({"failures": sorted(set(listener.failures))} if listener.failures else {}),
    }


def tell(stream: Stream, engine: StreamsEngine) -> None:
    """Registers a slot's initial contents with the host, so that it is compacted in time."""
    held, said = (
        int(np.broadcast_to(x, engine.config.slots)[stream.slot]) for x in (engine.held, engine.said)
    )
    stream.conversation._contents.append([Kind.FRAME] * held + [Kind.ASSISTANT] * said, frames=held)


def micro(engine: StreamsEngine, prompt: str, picture: np.ndarray, *, encodes: bool) -> dict[str, Any]:
    """Times steps and, perhaps, batches of frames; returns medians in milliseconds.

    Args:
      encodes: whether to time the encoding of frames, too.

    Raises:
      ConfigError: the text caches have no room for a block of steps.
    """
    slots, tokens = engine.config.slots, chat.interjection(engine.tokenizer, prompt)
    most = -(-STEPS // slots)  # Prompts or frames in a slot.
    room = STEPS + most * len(tokens)
    engine.held = np.minimum(engine.held, engine.config.bank_capacity - most)
    engine.said = np.minimum(engine.said, engine.config.text_capacity - room - engine.held)
    if np.any(engine.said < 0):
        raise ConfigError(f"--micro appends up to {room} tokens to a slot, which --text-capacity must hold")
    engine.talk([True] * slots)
    times = collections.defaultdict(list)
    engine.compile_steps({shape_of(engine, micro_rows(engine, kind, tokens, 0)) for kind in MICRO})
    # The first block of a kind may still compile how it samples.
    for _ in range(BLOCKS + 1):
        for kind in MICRO:
            times[kind].append([1e3 * seconds / STEPS for seconds in block_seconds(engine, kind, tokens)])
    medians = {kind: np.median(some[1:], axis=0).tolist() for kind, some in times.items()}
    step = {
        "step_ms": medians["decode"][0],
        "changing_ms": medians["changing"][0],
        "with_frame_ms": medians["with_frame"][0],
        "with_prompt_ms": medians["with_prompt"][0],
        "prompt_adds_ms": medians["with_prompt"][0] - medians["decode"][0],
        "blocking_ms": medians["blocking"][0],
        "host_ms": {kind: host for kind, (_, host) in medians.items()},
        "prompt_tokens": len(tokens),
    }
    return step | (encoding(engine, picture) if encodes else {})


def block_seconds(engine: StreamsEngine, kind: str, tokens: Sequence[int]) -> tuple[float, float]:
    """Times a block of steps of all slots from new caches, so that blocks of all kinds find the same.

    Args:
      kind: of `MICRO`.
      tokens: of the prompt.

    Returns:
      Seconds of the block, and of the processor that dispatched it.
    """
    sampled, config = None, engine.model_config
    shape = engine.frame_encoder.padded_length(1), config.vectors_per_frame, config.decoder.hidden_size
    frame = jax.device_put(np.zeros(shape, engine.dtype), engine.placement)
    state = jax.block_until_ready(engine.start())
    started, busy = time.perf_counter(), time.thread_time()
    for number in range(STEPS):
        rows = micro_rows(engine, kind, tokens, number)
        # The state is donated, so each step on the device waits for the one before, but the host does not.
        state, sampled = engine.step(state, rows, frame if kind == "with_frame" else None)
        if kind == "blocking":
            jax.block_until_ready(sampled.tokens)
    busy = time.thread_time() - busy
    assert sampled is not None, "at least one step"
    jax.block_until_ready(sampled.tokens)
    seconds = time.perf_counter() - started
    engine.calls.clear()
    return seconds, busy


def micro_rows(engine: StreamsEngine, kind: str, tokens: Sequence[int], number: int) -> list[Row[int] | None]:
    """The rows of one step of a block."""
    slots = engine.config.slots
    rows: list[Row[int] | None] = [Row([PENDING])] * slots
    # Spread over the slots, which are of different ages.
    slot = number * slots // STEPS
    if kind == "with_prompt":
        rows[slot] = Row([PENDING, *tokens], new_turn=True)
    elif kind == "with_frame":
        rows[slot] = Row([PENDING, engine.tokenizer.special.image], [0])
    elif kind == "changing" and slots > 1:
        rows[slot] = None
    return rows


def shape_of(engine: StreamsEngine, rows: Sequence[Row[int] | None]) -> Shape:
    """The shape of the step that appends these rows."""
    slots, image = engine.config.slots, engine.tokenizer.special.image
    now, _ = first_step({slot: row for slot, row in enumerate(rows) if row}, slots, image)
    return step_arguments(now, slots, image).shape


def encoding(engine: StreamsEngine, picture: np.ndarray) -> dict[str, dict[str, float]]:
    """Times blocking calls that encode batches of frames; returns medians in milliseconds, by size."""
    found = {"encode_ms": {}, "encode_sent_ms": {}}
    for size in engine.frame_encoder.buckets:
        times = {name: [] for name in found}
        for _ in range(CALLS + 2):
            started = time.perf_counter()
            jax.block_until_ready(engine.encode([picture] * size))
            times["encode_ms"].append(1e3 * (time.perf_counter() - started))
            sent = jax.block_until_ready(engine.send([picture] * size))
            started = time.perf_counter()
            jax.block_until_ready(engine.encode_sent(sent))
            times["encode_sent_ms"].append(1e3 * (time.perf_counter() - started))
        for name, some in times.items():
            found[name][str(size)] = statistics.median(some[2:])
    engine.calls.clear()
    return found


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured, with its frames and its prompt."""

    model: MossVideo
    tokenizer: Tokenizer
    pictures: list[np.ndarray]
    prompt: str
    is_random: bool

    def traffic(self, streams: int, talking: str, seconds: float, fps: float) -> Traffic:
        """Builds the input of the streams."""
        if self.is_random:
            return random_traffic(streams, SHARES[talking], seconds, fps, self.pictures, self.prompt)
        return tabletop_traffic(streams, seconds, self.model.config.vision.image_size)


def make_subject(args: argparse.Namespace) -> Subject:
    """Loads the checkpoint, or creates a random model of the preset."""
    mesh = parse_mesh(args.mesh) if args.mesh else None
    if args.checkpoint:
        named = None if args.checkpoint == "moss-tiny" else args.checkpoint
        opened = open_model(named, weights=args.weights, encoder_weights=args.encoder_weights, mesh=mesh)
        model, tokenizer = opened.model, opened.tokenizer
        shape = (model.config.vision.image_size,) * 2
    else:
        config = PRESETS[args.preset]()
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            model = MossVideo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
            model = quantize(model, decoder=args.weights, encoder=args.encoder_weights)
        tokenizer, shape = padded_tokenizer(config.decoder.vocab_size), frame_size(args.frame_size)
    # Here, so that the engines share the parameters in their new layout.
    model.decoder = for_decoding(model.decoder)
    jax.block_until_ready(nnx.state(model))
    return Subject(
        model, tokenizer, random_frames(8, (*shape, 3)), prompt_text(tokenizer), not args.checkpoint
    )


def note_compilations() -> list[str]:
    """Returns a list that grows with each compilation from now on."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event == COMPILED else None
    )
    return compiled


def rows_of(args: argparse.Namespace, ceilings: Mapping[str, float], deadline: float) -> Iterator[dict]:
    """Yields a row for each number of streams and load, few streams first."""
    compiled, subject = note_compilations(), make_subject(args)
    for streams in args.streams:
        if time.monotonic() > deadline:
            say("out of time: more streams were left out")
            return
        try:
            for row in measure(subject, streams, args, ceilings, deadline, compiled):
                yield {"streams": streams} | row
        except Exception as error:
            yield {"streams": streams, "failed": first_line(error)}
        # The next engine needs the memory of this one.
        gc.unfreeze()
        gc.collect()


def make_engine(subject: Subject, streams: int, args: argparse.Namespace) -> StreamsEngine:
    """Builds the engine of the streams; with random weights, all talk.

    Raises:
      ConfigError: it does not fit in the device's memory.
    """
    memory = MemoryConfig(args.memory, bank_dtype=args.bank_dtype, text_dtype=args.text_dtype)
    config = EngineConfig(streams, args.text_capacity, args.bank_capacity, memory)
    check_room(tree_bytes(nnx.state(subject.model)), subject.model, config)
    apart = None if args.perception_device is None else jax.devices()[args.perception_device]
    engine = StreamsEngine(subject.model, subject.tokenizer, config, perception_device=apart)
    if subject.is_random:
        engine.fill(args.fill)
        engine.talk([True] * streams)
    return engine


def measure(
    subject: Subject,
    streams: int,
    args: argparse.Namespace,
    ceilings: Mapping[str, float],
    deadline: float,
    compiled: list[str],
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one number of streams."""
    engine = make_engine(subject, streams, args)
    if args.micro:
        # These compile only what they call.
        encodes = streams == args.streams[0]
        yield {"measure": "micro"} | micro(engine, subject.prompt, subject.pictures[0], encodes=encodes)
        return
    started, before = time.monotonic(), len(compiled)
    engine.warm_up(subject.pictures[0].shape)
    freeze_heap()
    yield {
        "measure": "warm_up",
        "seconds": time.monotonic() - started,
        "programs": len(compiled) - before,
        "slot_mb": slot_bytes(engine.model_config, engine.config, engine.dtype) / MB,
    }
    floors = Floors(engine, ceilings)
    loads = args.talking if subject.is_random else ("as trained",)
    for stall, talking in itertools.product(args.max_stall_ms, loads):
        seconds = min(args.seconds, deadline - time.monotonic() - args.warm_seconds)
        if seconds < LEAST_SECONDS:
            say("out of time: the remaining traffic was left out")
            return
        traffic = subject.traffic(streams, talking, args.warm_seconds + seconds, args.fps)
        scheduling = SchedulerConfig(max_stall_ms=stall)
        figures = live(engine, floors, traffic, args.warm_seconds, seconds, compiled, scheduling)
        stats = jax.devices()[0].memory_stats()
        peak = {"peak_gb": stats["peak_bytes_in_use"] / GB} if stats else {}
        load = {"talking": talking, "max_stall_ms": stall, "seconds": seconds}
        yield {"measure": "live"} | load | figures | peak


def check_room(parameters: int, model: MossVideo, config: EngineConfig) -> None:
    """Rejects an engine that does not fit in the device's memory.

    Raises:
      ConfigError: it does not fit; the message says how many slots would.
    """
    devices = len(jax.tree.leaves(nnx.state(model))[0].sharding.device_set)
    tokens = max(shape.decode + shape.chunks * shape.width for shape in shapes(config.slots))
    reserve = workspace_bytes(model.config, config, model.dtype, tokens=tokens, waiting=config.slots)
    fits = capacity(
        parameters,
        model.config,
        config,
        model.dtype,
        device_bytes=devices * memory_bytes(jax.devices()[0]),
        reserve=reserve,
    )
    if config.slots > fits:
        raise ConfigError(f"slots can be at most {fits} in the memory of this device, not {config.slots}")


def line(row: dict[str, Any]) -> str:
    """Formats a row as text."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{name} {shown(part)}" for name, part in value.items() if name != "samples")
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    text = f"{row['streams']:>4} streams  {row.get('measure', ''):<10}"
    others = {name: value for name, value in row.items() if name not in ("streams", "measure")}
    return text + "  ".join(f"{name} {shown(value)}" for name, value in others.items())


def frame_size(text: str) -> tuple[int, int]:
    """Parses "640x360" to height and width."""
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise SystemExit(f"--frame-size is width x height, such as 640x360, not {text!r}") from None
    return height, width


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the model, the engine and the traffic."""
    parser.add_argument("--preset", default="moss_video_11b", choices=PRESETS, help="random weights of it")
    parser.add_argument("--warm-seconds", type=float, default=3.0, help="of traffic before those that count")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second of each stream")
    parser.add_argument("--frame-size", default="640x360", help="width and height of the frames of a preset")
    parser.add_argument("--fill", type=at_least(1), default=64, help="fewest frames in a bank at first")
    parser.add_argument("--bank-capacity", type=at_least(1), default=72, help="whole frames in each bank")
    parser.add_argument("--text-capacity", type=at_least(1), default=1024, help="tokens in each text cache")
    parser.add_argument(
        "--memory",
        choices=policies.POLICIES,
        default=MemoryConfig.policy,
        help="policy of the bank",
    )
    parser.add_argument("--bank-dtype", choices=get_args(KVDtype), help="8-bit format of the bank")
    parser.add_argument("--text-dtype", choices=get_args(KVDtype), help="8-bit format of the text caches")
    parser.add_argument(
        "--weights", choices=get_args(DecoderWeights), help="8-bit format of the decoder's weights"
    )
    parser.add_argument(
        "--encoder-weights", choices=get_args(EncoderWeights), help="8-bit format of the vision encoder"
    )
    parser.add_argument("--mesh", help="splits the model over devices, as tensor=2")
    parser.add_argument("--perception-device", type=int, help="index of the device that encodes frames")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which nothing new starts"
    )
    add_out(parser)


def check_fill(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Rejects more frames at first than the capacities hold."""
    if args.fill > args.bank_capacity or 2 * args.fill > args.text_capacity:
        parser.error(
            f"--fill {args.fill} must be at most --bank-capacity {args.bank_capacity} and half of "
            f"--text-capacity {args.text_capacity}"
        )


def main() -> None:
    parser = make_parser(__doc__)
    add_flags(parser)
    parser.add_argument("--checkpoint", help="moss-tiny, a folder or a Hugging Face repo, not random weights")
    parser.add_argument("--streams", default="1,4,16,32,64,128", help="comma-separated numbers of streams")
    parser.add_argument("--talking", default="quarter,all", help=f"comma-separated, of {', '.join(SHARES)}")
    parser.add_argument(
        "--max-stall-ms",
        default=f"{SchedulerConfig.max_stall_ms:g}",
        help="comma-separated, the longest that a batch of frames may stall the text",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of traffic that counts, for a row")
    parser.add_argument("--micro", action="store_true", help="time steps and batches, without traffic")
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit
    if args.checkpoint:
        args.preset = None
    asked = args.talking.split(","), args.streams.split(",")
    # The report shows the flags as given; the benchmark uses the parsed ones.
    used = argparse.Namespace(**vars(args))
    for name in asked[0]:
        known(parser, SHARES, name)
    used.talking, used.streams = asked[0], sorted(map(at_least(1), asked[1]))
    try:
        used.max_stall_ms = [float(value) for value in args.max_stall_ms.split(",")]
    except ValueError:
        parser.error(f"--max-stall-ms is comma-separated milliseconds, not {args.max_stall_ms!r}")
    check_fill(parser, args)
    if args.micro and args.checkpoint:
        parser.error("--micro takes a --preset")

    ceilings = measure_ceilings(jax.default_backend() == "cpu")
    copy, matmul = ceilings.values()
    say(f"copy {copy:.3g} TB/s, bf16 matmul {matmul:.3g} TFLOP/s; {device()}")
    rows: list[dict[str, Any]] = []
    result = {"ceilings": ceilings, "rows": rows}
    for found in rows_of(used, ceilings, deadline):
        rows.append(found)
        say(line(found))
        # Written after each row, in case the run is interrupted.
        write("streams.py", args, result)
    publish("streams.py", args, result)


if __name__ == "__main__":
    main()
