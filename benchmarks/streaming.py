"""Measures the latencies and rates of a live session by the number of frames in its memory bank.

    python benchmarks/streaming.py --out benchmarks/results/streaming_11b_h200.json
    python benchmarks/streaming.py --preset moss_tiny --quick

Random bfloat16 weights, one stream, in the code path of a live session: a realtime `Session` over an
`Engine`, 1920x1080 frames and prompts pushed from a separate thread, events timed as they are emitted. All
programs are compiled beforehand; a row says if one was not.

start      cold start: weights on the device to first token, with compilation. It reports how many programs
           were in JAX's cache on disk: set JAX_COMPILATION_CACHE_DIR and run twice for a warm start
ttft       a prompt of 32 tokens while the model talks and sees a frame a second: `push_prompt` to first text
extend     a frame while nothing is said: `push_frame` to the sample of the step that appended it
decode     tokens a second, without frames or prompts
arrivals   tokens a second while 1, 4 and 10 frames a second arrive; and the stall, from the first of these:
           the largest gap among the 20 tokens around a frame, minus their median gap
sustained  frames a second with nothing said; the inbox is kept full, so they are encoded in batches
offline    a clip of 256 frames in host memory: `answer_offline` to first text; at one size of bank

The engine is modified in two ways. Its streams begin with the bank filled with noise (`FilledEngine.start`);
and the mask of tokens that may be sampled, `Engine.allowed`, leaves only silence, or only tokens that are
whole characters, so that each is an event. Both are data: the programs are those of any session.

Each figure has a floor. A step reads the decoder's parameters and the keys and values in range, at the rate
of a large copy; a frame takes the encoder's FLOPs, at the rate of a large GEMM. Transfers from the host are
excluded. The share is floor / figure, inverted for rates. The memory is the peak of the process; its floor is
the parameters and one state.
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inputs import FRAME, padded_tokenizer, random_frames
from report import add_out, device, first_line, known, make_parser, publish, say
from timing import measure_ceilings

from moss_jax.command import freeze_heap
from moss_jax.config import (
    PRESETS,
    DecoderWeights,
    EncoderWeights,
    EngineConfig,
    MemoryConfig,
    SessionConfig,
)
from moss_jax.memory import StreamState, policies
from moss_jax.nn import MossVideo, quantize
from moss_jax.ops.qarray import QArray
from moss_jax.sharding import parse_mesh
from moss_jax.stream import (
    Engine,
    EngineState,
    Event,
    FrameSeen,
    Session,
    Silence,
    Text,
    Turn,
    answer_offline,
)
from moss_jax.stream.placement import state_sharding
from moss_jax.stream.rows import FRAME_BUCKETS
from moss_jax.text import Tokenizer
from moss_jax.train.flops import forward_work
from moss_jax.video import Frame

GB = 1e9
LIVE = SessionConfig(clock="realtime", max_tokens_per_turn=1 << 30)
PROMPT_TOKENS = 32
# Capacity beyond the initial frames: more than any measure needs.
FRAMES_ROOM, TEXT_ROOM = 192, 6144
# Rough size of the programs' temporaries.
SCRATCH_BYTES = 4 * GB
WARM_TOKENS, WARM_FRAMES = 16, 16
AROUND = 10
# Standard deviation of 8-bit noise.
SPREAD = 40

# Samples of each kind; `arrivals` maps frames a second to seconds.
Sizes = collections.namedtuple("Sizes", "prompts extends tokens arrivals sustained clip clips")
FULL = Sizes(40, 40, 192, {1: 20, 4: 4, 10: 4}, sustained=128, clip=256, clips=3)
QUICK = Sizes(5, 5, 32, {1: 2, 4: 1, 10: 1}, sustained=16, clip=16, clips=1)


class FilledEngine(Engine):
    """An engine whose streams begin with `held` frames in the bank and `said` further tokens in the text.

    Each is one number for all slots, or one per slot.
    """

    held: int | np.ndarray = 0
    said: int | np.ndarray = 0

    @functools.cached_property
    def masks(self) -> dict[str, jax.Array]:
        """Tokens that may be sampled: silence, or those that are whole characters by themselves."""
        texts = [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]
        is_text = jnp.array([bool(text) and "\ufffd" not in text for text in texts])
        return {"text": is_text, "silence": jnp.arange(len(texts)) == self.tokenizer.special.silence}

    def begin_with(self, frames: int, allowed: str) -> None:
        self.held, self.allowed = frames, self.masks[allowed]

    def start(self) -> EngineState:
        """A state that holds frames with their `<|image|>` tokens, and text.

        Keys and values are noise, since no time depends on their values. Zeros would not do: a device that
        multiplies them draws less power and may clock higher.
        """
        state = super().start()
        held, said = (np.broadcast_to(x, self.config.slots).astype(np.int32) for x in (self.held, self.said))

        def fill(part, rows, **others):
            keys, values = (tuple(map(noisy, x)) for x in (part.keys, part.values))
            return dataclasses.replace(part, keys=keys, values=values, length=part.length + rows, **others)

        text, bank = state.stream.text, state.stream.bank
        if held.any():
            vectors = self.model_config.vectors_per_frame
            frame, place = jnp.divmod(jnp.arange(bank.capacity)[None], vectors)
            is_held = frame < held[:, None]
            positions = jnp.where(is_held, frame, bank.positions)
            counts = None if bank.counts is None else jnp.where(is_held, 1.0, bank.counts)
            places = jnp.broadcast_to(place, positions.shape)
            bank = fill(bank, held * vectors, positions=positions, places=places, counts=counts)
            tokens = held + said
            text = fill(text, tokens, position=text.position + tokens)
        state = dataclasses.replace(state, stream=StreamState(text, bank))
        return jax.tree.map(lambda x: jax.device_put(x, state_sharding(x, self.placement)), state)

    def num_programs(self) -> int:
        return sum(program._cache_size() for program in self.programs.values())


def noisy(x: jax.Array | QArray) -> jax.Array | QArray:
    """Overwrites keys or values, donated, with normal noise, the same in each slot."""
    if isinstance(x, QArray):
        return QArray(_noise(x.values), jax.jit(jnp.ones_like, donate_argnums=0)(x.scale) / SPREAD)
    return _noise(x)


@functools.partial(jax.jit, donate_argnums=0)
def _noise(x: jax.Array) -> jax.Array:
    noise = jax.random.normal(jax.random.key(0), (1, *x.shape[1:]))
    if x.dtype.itemsize == 1:
        noise = jnp.clip(SPREAD * noise, -127, 127)
    return x.at[:].set(noise.astype(x.dtype))


class Floors:
    """Lower bounds of steps and encoding on this device, in seconds."""

    def __init__(self, model: MossVideo, ceilings: dict[str, float]):
        config, decoder = model.config, model.config.decoder
        copy, matmul = 1e12 * ceilings["copy_tb_s"], 1e12 * ceilings["matmul_tflop_s"]
        # A step reads one row of the embedding.
        embedding = (
            (decoder.vocab_size + decoder.extra_embeddings) * decoder.hidden_size * model.dtype.itemsize
        )
        vector = 2 * decoder.num_kv_heads * decoder.head_dim * model.dtype.itemsize / copy
        self._weights = (tree_bytes(nnx.state(model.decoder)) - embedding) / copy
        self._frame = vector * config.vectors_per_frame * len(decoder.cross_attention_layers)
        self._token = vector * decoder.num_self_attention_layers
        work = [w for w in forward_work(config, tokens=1, frames=1) if w.part != "decoder"]
        self.encode = sum(w.matmul + w.attention for w in work) / matmul

    def step(self, frames: float, tokens: float) -> float:
        """Lower bound of a step that attends to this many frames and tokens."""
        return self._weights + frames * self._frame + tokens * self._token


@dataclasses.dataclass(frozen=True)
class Bench:
    """State shared by the measures; `frames` is the initial number of frames in the bank."""

    engine: FilledEngine
    frames: int
    pictures: list[np.ndarray]
    prompt: str
    floors: Floors
    sizes: Sizes


class Stream:
    """A realtime session, run in the calling thread while `feed` feeds it from another.

    Attributes:
      times: arrival of each event on the host, by its type.
      pushed, answered: times at which frames and prompts were pushed, and of the samples that followed.
      begin: start of the schedule.
      compiled: programs compiled during the session, which spoil a figure.
    """

    def __init__(self, bench: Bench, allowed: str, feed: "Callable[[Stream], Any]"):
        self.times = collections.defaultdict(list)
        self.pushed, self.answered = {FrameSeen: [], Turn: []}, {FrameSeen: [], Turn: []}
        self.begin = 0.0
        self._bench, engine = bench, bench.engine
        engine.begin_with(bench.frames, allowed)
        self.session = Session(engine, LIVE, system=None, prompt=bench.prompt)
        self.prompt_length = len(self.session.check_prompt(bench.prompt))
        self._over, programs = False, engine.num_programs()
        with futures.ThreadPoolExecutor(1) as threads:
            fed = threads.submit(self._feed, feed)
            try:
                for event in self.session:
                    self._hear(event, time.monotonic())
            finally:
                self._over = True
        fed.result()
        c, self.compiled = event.counters, engine.num_programs() - programs
        added = c.frames + c.tokens + c.silences + self.prompt_length * (c.prompts - 1)
        # The session doesn't know the initial contents, so it cannot check this.
        if added + self.session.opening_length > TEXT_ROOM or c.frames > FRAMES_ROOM:
            raise RuntimeError(f"{c.frames} frames and {added} tokens are more than there is room for")
        self.dropped = c.frames_dropped
        # The floor of a step half way through the session.
        tokens = bench.frames + self.session.opening_length + added / 2
        self.step_floor = bench.floors.step(bench.frames + c.frames / 2, tokens)

    def _hear(self, event: Event, at: float) -> None:
        self.times[type(event)].append(at)
        if isinstance(event, Text | Silence):
            for kind, answered in self.answered.items():
                answered += [at] * (len(self.times[kind]) - len(answered))

    def _feed(self, feed) -> None:
        try:
            feed(self)
        finally:
            self.session.stop()

    def push(self, kind: type[Event]) -> None:
        pictures = self._bench.pictures
        self.pushed[kind].append(time.monotonic())
        if kind is FrameSeen:
            # Without a copy, as `serve.py` does with the frames of a camera.
            self.session.push_frame(pictures[len(self.pushed[FrameSeen]) % len(pictures)], copy=False)
        else:
            self.session.push_prompt(self._bench.prompt)

    def until(self, condition: Callable[[], bool]) -> None:
        """Polls a condition, seldom enough not to disturb the thread that runs the session."""
        while not condition():
            if self._over:
                raise RuntimeError("the session has ended")
            time.sleep(0.002)

    def schedule(self, plan: list[tuple[float, type[Event]]], seconds: float) -> None:
        """Pushes the items of `plan` at their times, in seconds after the model has begun to talk."""
        self.until(lambda: len(self.times[Text]) >= WARM_TOKENS)
        self.begin = time.monotonic()
        for at, kind in sorted(plan, key=lambda entry: entry[0]):
            time.sleep(max(0.0, self.begin + at - time.monotonic()))
            self.push(kind)
        time.sleep(max(0.0, self.begin + seconds - time.monotonic()))
        # The opening is also a turn, so there is one more than was pushed.
        self.until(lambda: len(self.answered[Turn]) > len(self.pushed[Turn]))

    def in_turn(self, frames: int, ready: Callable[[int], bool]) -> None:
        """Pushes each frame i as soon as `ready(i)`."""
        self.until(lambda: bool(self.answered[Turn]))
        for i in range(frames):
            self.until(lambda i=i: ready(i))
            self.push(FrameSeen)
        self.until(lambda: len(self.answered[FrameSeen]) == frames)

    def waits(self, kind: type[Event]) -> list[float]:
        """Milliseconds from each push to the sample of the step that appended it."""
        answered = self.answered[kind][-len(self.pushed[kind]) :]
        return [1e3 * (at - push) for at, push in zip(answered, self.pushed[kind], strict=True)]


def ttft(bench: Bench) -> Iterator[dict]:
    # At random phases of a step, as real prompts arrive.
    rng = random.Random(0)
    prompts = list(itertools.accumulate(rng.uniform(0.1, 0.3) for _ in range(bench.sizes.prompts)))
    plan = [(at, Turn) for at in prompts] + [(0.5 + i, FrameSeen) for i in range(int(prompts[-1]) + 1)]
    stream = Stream(bench, "text", lambda s: s.schedule(plan, prompts[-1] + 0.5))
    figures = spread(stream.waits(Turn)) | {"row_tokens": stream.prompt_length}
    yield row("ttft", "ms", figures, 1e3 * stream.step_floor, stream)


def extend(bench: Bench) -> Iterator[dict]:
    count = bench.sizes.extends + 2
    stream = Stream(bench, "silence", lambda s: s.in_turn(count, lambda i: len(s.answered[FrameSeen]) == i))
    floor = bench.floors.encode + stream.step_floor
    yield row("extend", "ms", spread(stream.waits(FrameSeen)[2:]), 1e3 * floor, stream)


def decode(bench: Bench) -> Iterator[dict]:
    last = WARM_TOKENS + bench.sizes.tokens
    stream = Stream(bench, "text", lambda s: s.until(lambda: len(s.times[Text]) > last))
    times = stream.times[Text][WARM_TOKENS : last + 1]
    gaps = spread(1e3 * np.diff(times))
    figures = {"rate": rate_of(times), "gap_p50_ms": gaps["p50"], "gap_p95_ms": gaps["p95"]}
    yield row("decode", "tok/s", figures, 1 / stream.step_floor, stream)


def arrivals(bench: Bench) -> Iterator[dict]:
    encode = bench.floors.encode
    for rate, seconds in bench.sizes.arrivals.items():
        plan = [((i + 0.5) / rate, FrameSeen) for i in range(round(rate * seconds))]
        stream = Stream(bench, "text", functools.partial(Stream.schedule, plan=plan, seconds=seconds))
        times = [at for at in stream.times[Text] if 0 <= at - stream.begin <= seconds]
        figures = {"rate": rate_of(times), "seen": len(stream.times[FrameSeen]), "dropped": stream.dropped}
        # The step that appends a frame samples a token like any other, so a frame adds only its encoding.
        floor = max(0, 1 - rate * encode) / stream.step_floor
        yield row(f"decode at {rate}/s", "tok/s", figures, floor, stream)
        if rate == min(bench.sizes.arrivals):
            # With perception on another device, a frame costs the text only the append.
            apart = bench.engine.perception_device is not None
            yield row("stall", "ms", spread(stalls(stream)), None if apart else 1e3 * encode, stream)


def stalls(stream: Stream) -> list[float]:
    """Stall of the token stream by each frame, in milliseconds."""
    times, found = stream.times[Text], []
    for at in stream.times[FrameSeen]:
        i = bisect.bisect(times, at)
        gaps = 1e3 * np.diff(times[max(0, i - AROUND) : i + AROUND])
        found.append(float(gaps.max() - np.median(gaps)))
    return found


def sustained(bench: Bench) -> Iterator[dict]:
    # No more are pushed than fit in the inbox, so none is dropped.
    count, most = WARM_FRAMES + bench.sizes.sustained, LIVE.inbox_frames
    stream = Stream(
        bench, "silence", lambda s: s.in_turn(count, lambda i: i - len(s.times[FrameSeen]) < most)
    )
    times = [at for at in stream.answered[FrameSeen] if at >= stream.answered[FrameSeen][WARM_FRAMES - 1]]
    frames, batches = sum(at > times[0] for at in times), len(set(times)) - 1
    figures = {"rate": frames / (times[-1] - times[0]), "frames_a_batch": frames / batches}
    floor = frames / (frames * bench.floors.encode + batches * stream.step_floor)
    yield row("sustained", "frames/s", figures, floor, stream)


def offline(bench: Bench) -> Iterator[dict]:
    clip = [Frame(bench.pictures[i % len(bench.pictures)], float(i)) for i in range(bench.sizes.clip)]
    bench.engine.begin_with(0, "text")
    milliseconds = []
    # The first compiles; the second still allocates pinned memory for the frames, which is then reused.
    for _ in range(2 + bench.sizes.clips):
        started = time.monotonic()
        next(e for e in answer_offline(bench.engine, clip, bench.prompt, max_tokens=1) if isinstance(e, Text))
        milliseconds.append(1e3 * (time.monotonic() - started))
    steps = math.ceil(len(clip) / FRAME_BUCKETS[-1])
    floor = len(clip) * bench.floors.encode + steps * bench.floors.step(len(clip) / 2, len(clip) / 2)
    yield row("offline", "ms", spread(milliseconds[2:]) | {"clip": len(clip)}, 1e3 * floor)


MEASURES = {f.__name__: f for f in (ttft, extend, decode, arrivals, sustained, offline)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="moss_video_11b", choices=PRESETS, help="model")
    parser.add_argument(
        "--frames",
        default="16,64,256,1024,4096",
        help="comma-separated numbers of frames in the bank; its capacity follows the largest",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few samples, at the smallest number of frames only"
    )
    parser.add_argument("--only", help=f"comma-separated measures, of start, {', '.join(MEASURES)}")
    parser.add_argument(
        "--weights", choices=get_args(DecoderWeights), help="8-bit format of the decoder's weights"
    )
    parser.add_argument(
        "--encoder-weights", choices=get_args(EncoderWeights), help="8-bit format of the vision encoder"
    )
    parser.add_argument(
        "--memory",
        choices=(policies.FULL, *policies.POLICIES),
        default=MemoryConfig.policy,
        help="policy of the bank; none of the measures reaches a compaction",
    )
    parser.add_argument("--mesh", help="splits the model over devices, as tensor=2")
    parser.add_argument("--perception-device", type=int, help="index of the device that encodes frames")
    parser.add_argument("--budget", type=float, help="seconds after which nothing new starts")
    add_out(parser)
    args = parser.parse_args()
    every = {name: name for name in ("start", *MEASURES)}
    names = [known(parser, every, name) for name in (args.only.split(",") if args.only else every)]
    counts = sorted({int(n) for n in args.frames.split(",")})
    counts, sizes = (counts[:1], QUICK) if args.quick else (counts, FULL)
    deadline = time.monotonic() + (args.budget or math.inf)

    ceilings = measure_ceilings(jax.default_backend() == "cpu")
    copy, matmul = ceilings.values()
    say(f"copy {copy:.3g} TB/s, bf16 matmul {matmul:.3g} TFLOP/s; {device()}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("moss_jax").setLevel(logging.INFO)  # Which attention kernels are chosen.
    rows = []
    for found in run(args, counts, names, sizes, ceilings, deadline):
        rows.append(found)
        say(line(found))
    publish("streaming.py", args, {"ceilings": ceilings, "rows": rows})


def run(args, counts, names, sizes, ceilings, deadline) -> Iterator[dict]:
    """Yields a row for each figure, from few frames to many."""
    cache = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: cache.update([event.rpartition("/")[-1]]))
    config = PRESETS[args.preset]()
    mesh = parse_mesh(args.mesh) if args.mesh else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        model = MossVideo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        model = quantize(model, decoder=args.weights, encoder=args.encoder_weights)
    jax.block_until_ready(nnx.state(model))
    # Of a mesh, the devices work side by side.
    devices = mesh.size if mesh else 1
    ceilings = {name: devices * ceiling for name, ceiling in ceilings.items()}
    tokenizer, pictures = padded_tokenizer(config.decoder.vocab_size), random_frames(8)
    prompt, floors, parameters = prompt_text(tokenizer), Floors(model, ceilings), tree_bytes(nnx.state(model))
    started = time.monotonic()
    apart = args.perception_device
    # One capacity for all, since capacities are static; larger than any measure needs.
    most = counts[-1]
    capacity = EngineConfig(1, most + TEXT_ROOM, most + FRAMES_ROOM, MemoryConfig(args.memory))
    perception = None if apart is None else jax.devices()[apart]
    engine = FilledEngine(model, tokenizer, capacity, perception_device=perception)
    del model
    engine_s = time.monotonic() - started
    engine.begin_with(0, "text")
    state = tree_bytes(jax.eval_shape(engine.start))
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    # A stream's state may be allocated before the previous one is freed.
    if (needed := (parameters + 2 * state) / devices + SCRATCH_BYTES) > limit:
        raise SystemExit(
            f"{most} frames need about {needed / GB:.1f} GB of the device, which has {limit / GB:.1f} GB"
        )
    # "start" runs a session as serve.py creates it, with its system prompt.
    usual = Session(engine, LIVE, prompt=prompt)
    cache.clear()
    started = time.monotonic()
    engine.warm_up(FRAME)
    freeze_heap()
    seconds = time.monotonic() - started
    cached = {"from_disk": cache["cache_hits"], "to_disk": cache["cache_misses"]}
    yield {"frames": most} | row(
        "compile", "s", {"seconds": seconds, "programs": engine.num_programs()} | cached
    )
    if "start" in names:
        started = time.monotonic()
        next(event for event in usual if isinstance(event, Text))
        first_s = time.monotonic() - started
        figures = {"seconds": engine_s + seconds + first_s, "first_token_s": first_s} | cached
        yield {"frames": most} | row("start", "s", figures)
    del usual

    sizes = sizes._replace(clip=min(sizes.clip, most))
    clip_at = next(n for n in counts if n >= sizes.clip)
    for count in counts:
        bench = Bench(engine, count, pictures, prompt, floors, sizes)
        for name in MEASURES:
            if name not in names or (name == "offline" and count != clip_at) or time.monotonic() > deadline:
                continue
            try:
                for found in MEASURES[name](bench):
                    yield {"frames": count} | found
            except Exception as error:
                yield {"frames": count, "measure": name, "failed": first_line(error)}
    if stats := jax.devices()[0].memory_stats():
        figures = {"peak": stats["peak_bytes_in_use"] / GB, "state": state / GB}
        yield {"frames": most} | row("memory", "GB", figures, (parameters + state) / GB)
    if time.monotonic() > deadline:
        say("out of time: the remaining measures were left out")


def prompt_text(tokenizer: Tokenizer) -> str:
    """A prompt text of `PROMPT_TOKENS` tokens."""
    text, letters = "", itertools.cycle("what has changed since I asked last? ")
    while len(tokenizer.encode(text.strip())) < PROMPT_TOKENS:
        text += next(letters)
    return text


def row(measure: str, unit: str, figures: dict, floor: float | None = None, stream: Stream | None = None):
    """Builds the row of a measure, whose first figure is compared with the floor."""
    found = {"measure": measure, "unit": unit} | figures
    if floor is not None:
        figure = next(iter(figures.values()))
        found |= {"floor": floor, "share": figure / floor if "/s" in unit else floor / figure}
    return found | ({"compiled_meanwhile": stream.compiled} if stream and stream.compiled else {})


def line(found: dict) -> str:
    """Formats a row as text."""
    text = f"{found['frames']:>5} frames  {found['measure']:<15}"
    if "failed" in found:
        return f"{text} failed: {found['failed']}"
    apart = ("frames", "measure", "unit", "floor", "share")
    shown = {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in found.items() if k not in apart}
    text += f"{shown.pop(next(iter(shown))):>9} {found['unit']:<9}"
    if "floor" in found:
        text += f"floor {found['floor']:>8.4g} {found['share']:>4.0%}  "
    return text + "  ".join(f"{name} {value}" for name, value in shown.items())


def spread(values) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p95": float(p95), "samples": len(values)}


def rate_of(times: list[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def tree_bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
