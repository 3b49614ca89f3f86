"""Streams frames through a model with random weights in a live session, and says what each part takes.

    python benchmarks/live.py --out benchmarks/results/live_11b.json

Measures, in the code path of a live session: allocation; encoding a 1920x1080 frame from host memory; a
lockstep session of 32 frames with a prompt in mid-stream; the time of a token as the host receives it and
when steps are dispatched ahead. Reads the compiled program of a token: one program, no loop over layers,
every state buffer donated.
"""

import argparse
import dataclasses
import re
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inputs import padded_tokenizer, random_frames
from report import add_out, make_parser, publish

from moss_jax.config import PRESETS, EngineConfig, SessionConfig
from moss_jax.nn import MossVideo
from moss_jax.stream import PENDING, Engine, Row, Session


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="moss_video_11b", choices=PRESETS)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--bank", type=int, default=256, help="frames that the bank has room for")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are timed")
    add_out(parser)
    args = parser.parse_args()

    publish("live.py", args, run(args))


def run(args: argparse.Namespace) -> dict:
    result: dict = {"preset": args.preset, "bank_frames": args.bank}
    config = PRESETS[args.preset]()
    started = time.monotonic()
    model = MossVideo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    jax.block_until_ready(nnx.state(model))
    params = jax.tree.leaves(nnx.state(model))
    result["parameters"] = sum(p.size for p in params)
    result["parameter_gb"] = sum(p.nbytes for p in params) / 1e9
    result["allocate_s"] = time.monotonic() - started

    tokenizer = padded_tokenizer(config.decoder.vocab_size)
    engine = Engine(model, tokenizer, EngineConfig(text_capacity=4096, bank_capacity=args.bank))
    frames = random_frames(8)

    compile_s, encode_s = timed(lambda: engine.encode(frames[:1]))
    result["encode_compile_s"], result["encode_ms"] = compile_s, 1e3 * encode_s
    compile_s, encode_s = timed(lambda: engine.encode(frames))
    result["encode_8_compile_s"], result["encode_8_ms_per_frame"] = compile_s, 1e3 * encode_s / 8

    result |= decode(engine, engine.encode(frames), args)
    result["session"] = live_session(engine, frames, args.frames)
    if stats := jax.devices()[0].memory_stats():
        result["peak_memory_gb"] = stats["peak_bytes_in_use"] / 1e9
    return result


def live_session(engine: Engine, frames: list[np.ndarray], count: int) -> dict:
    """A lockstep session run twice: once to compile, once for the figures."""
    runs = []
    for _ in range(2):
        session = Session(
            engine, SessionConfig(clock="lockstep", tokens_per_second=8), prompt="What happens?"
        )
        for i in range(count):
            session.push_frame(frames[i % len(frames)], float(i))
            if i == count // 2:
                session.push_prompt("And what has changed since then?", float(i))
        session.finish()
        started = time.monotonic()
        *_, end = session
        runs.append((time.monotonic() - started, end.counters))
    (first_s, _), (second_s, counters) = runs
    return {
        "frames": count,
        "first_run_s": first_s,
        "second_run_s": second_s,
        "counters": dataclasses.asdict(counters),
        "step_programs": engine._step._cache_size(),
        "encode_programs": engine._encode._cache_size(),
    }


def decode(engine: Engine, pool: jax.Array, args: argparse.Namespace) -> dict:
    """Tokens, with the bank filled to the last frame."""
    image = engine.tokenizer.special.image
    state = engine.start()
    for _ in range(args.bank // 8):
        state, _ = engine.step(state, [Row([image] * 8, frames=range(8))], pool)
    row = [Row([PENDING])]
    started = time.monotonic()
    state, drawn = engine.step(state, row)
    jax.block_until_ready(drawn)
    compile_s = time.monotonic() - started

    dispatch, visible, ahead = [], [], []
    for _ in range(args.tokens):
        started = time.monotonic()
        state, drawn = engine.step(state, row)
        dispatch.append(time.monotonic() - started)
        int(jax.device_get(drawn.tokens)[0])
        visible.append(time.monotonic() - started)
    for _ in range(3):
        started = time.monotonic()
        for _ in range(args.tokens):
            state, drawn = engine.step(state, row)
        jax.block_until_ready(drawn)
        ahead.append((time.monotonic() - started) / args.tokens)
    return {
        "token_compile_s": compile_s,
        "token_ms_dispatch": 1e3 * statistics.median(dispatch),
        "token_ms_host_visible": 1e3 * statistics.median(visible),
        "token_ms_host_visible_p95": 1e3 * statistics.quantiles(visible, n=20)[-1],
        "token_ms_dispatched_ahead": 1e3 * statistics.median(ahead),
        "token_program": token_program(engine),
    }


def token_program(engine: Engine) -> dict:
    """What the compiled program of one token holds.

    `copies_over_1mb` counts copy instructions only: a fusion that rewrites a whole array, as the select does
    that hides unused values from the attention's matmul, shows in `temporary_gb`.
    """
    state = engine.start()
    slots = engine.config.slots
    arguments = (np.full((slots, 1), PENDING, np.int32), np.ones(slots, np.int32), np.zeros(slots, bool))
    compiled = engine._step.lower(engine._decoder, engine._rules, state, *arguments, None).compile()
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    buffers = [x.nbytes for x in jax.tree.leaves(state)]
    return {
        "while_loops": len(re.findall(r" while\(", text)),
        "copies_over_1mb": sum(size > 1e6 for size in copied_bytes(text)),
        "donated_gb": memory.alias_size_in_bytes / 1e9,
        "state_gb": sum(buffers) / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
    }


def copied_bytes(hlo: str) -> list[int]:
    """Sizes of the arrays that a program copies."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u8": 1, "pred": 1}
    found = re.findall(r"= (\w+)\[([\d,]*)\][^ ]* copy(?:-start)?\(", hlo)
    return [
        sizes.get(kind, 4) * int(np.prod([int(n) for n in shape.split(",") if n])) for kind, shape in found
    ]


def timed(call: Callable[[], object], repeats: int = 10) -> tuple[float, float]:
    """Seconds of the first call, which compiles, and the median of the next ones."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.monotonic()
        jax.block_until_ready(call())
        seconds.append(time.monotonic() - started)
    return seconds[0], statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
