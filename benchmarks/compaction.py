"""Times the compactions of a memory bank, by policy and by storage, and of the text cache, by implementation.

    python benchmarks/compaction.py --out benchmarks/results/compaction_h200.json

A bank of the 11B is filled by appends and compactions until its policy is in a steady state and the bank is
full. Then one whole compaction is timed, a bank in, a bank out. The floor is the time to copy the vectors
that stay, read and written, at the rate of a large copy timed first.

From a full text cache, of one of two slots, the oldest quarter behind a short opening is evicted, several
times per program, which donates the cache. The floor is the time to copy the rows that move.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from report import add_out, device, first_line, make_parser, publish, say
from timing import measure_ceilings, timed

from moss_jax.config import PRESETS, MemoryConfig, ModelConfig
from moss_jax.memory import MemoryBank, init_state, remember_frames
from moss_jax.memory.policies import POLICIES, make_policy
from moss_jax.ops.dispatch import Unsupported
from moss_jax.ops.keep_rows import KEEP_ROWS, keep_rows
from moss_jax.ops.qarray import DTYPES

STORED = {"bf16": None, "int8": "int8", "fp8": "fp8"}
EVICTIONS = 8  # Per program, so that a call's launch, with all arrays of a cache, is negligible.


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="moss_video_11b", help="model")
    parser.add_argument("--frames", type=int, default=256, help="whole frames that the bank has room for")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated")
    parser.add_argument("--stored", default=",".join(STORED), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=24, help="compactions before the one that is timed")
    parser.add_argument("--text-capacity", type=int, default=1024, help="tokens in the text cache")
    parser.add_argument("--only", choices=("bank", "text"), help="times only these compactions")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each time")
    add_out(parser)
    args = parser.parse_args()
    model = PRESETS[args.preset]()
    copy = measure_ceilings(args.preset == "moss_tiny")["copy_tb_s"]
    say(f"copy {copy:.3g} TB/s; {device()}")
    rows, text = [], []
    if args.only != "text":
        for stored in args.stored.split(","):
            for policy in args.policies.split(","):
                row = measure(model, MemoryConfig(policy, bank_dtype=STORED[stored]), copy, args)
                rows.append({"policy": policy, "stored": stored} | row)
                say(str(rows[-1]))
    if args.only != "bank":
        for name in KEEP_ROWS.implementations:
            text.append({"implementation": name} | measure_text(model, name, copy, args))
            say(str(text[-1]))
    publish("compaction.py", args, {"copy_tb_s": copy, "rows": rows, "text": text})


def measure(model: ModelConfig, memory: MemoryConfig, copy: float, args: argparse.Namespace) -> dict:
    """Times the compaction of one policy."""
    compact = jax.jit(made(memory, model, args.frames))
    bank = steady(model, memory, compact, args)
    length = int(bank.length[0])
    after = compact(bank)
    left = int(after.length[0])
    held = sum(x.nbytes for x in jax.tree.leaves((bank.keys, bank.values)))
    floor = 2 * held * left / bank.capacity / copy / 1e6
    times = timed(compact, (bank,), 1, args.repeats)
    frames = len(np.unique(np.asarray(after.positions[0, :left])))
    return times | {"vectors": [length, left], "frames": frames, "bank_mb": held / 1e6, "floor_us": floor}


def measure_text(model: ModelConfig, implementation: str, copy: float, args: argparse.Namespace) -> dict:
    """Times an eviction from the text cache of one slot."""
    capacity = args.text_capacity
    text = init_state(model, 2, text_capacity=capacity, bank_capacity=1, dtype=jnp.bfloat16).text
    opening, end = capacity // 16, capacity // 16 + capacity // 4
    stay = np.r_[:opening, end:capacity].astype(np.int32)
    kept = np.pad(stay, (0, capacity - len(stay)))[None]
    length, slots = np.int32([len(stay)]), np.int32([1])

    @functools.partial(jax.jit, donate_argnums=0)
    def evict(buffers, kept, length, slots):
        for _ in range(EVICTIONS):
            buffers = keep_rows(buffers, kept, length, slots=slots, implementation=implementation)
        return buffers

    buffers = (*text.keys, *text.values)
    row_bytes = sum(x[0, :, 0].nbytes for x in buffers)
    floor = 2 * row_bytes * (len(stay) - opening) / copy / 1e6

    def call():
        nonlocal buffers
        buffers = evict(buffers, kept, length, slots)
        return buffers

    try:
        times = timed(call, (), EVICTIONS, args.repeats)
    except Unsupported as error:
        return {"failed": first_line(error)}
    return times | {"tokens": [capacity, len(stay)], "floor_us": floor}


def made(memory: MemoryConfig, model: ModelConfig, frames: int):
    """Creates the policy of a bank of this size."""
    policy = make_policy(memory, model, frames)
    assert policy is not None
    return policy


def steady(model: ModelConfig, memory: MemoryConfig, compact, args: argparse.Namespace) -> MemoryBank:
    """Returns a full bank after many compactions."""
    vectors = model.vectors_per_frame
    stored = None if memory.bank_dtype is None else DTYPES[memory.bank_dtype]
    bank = init_state(
        model,
        1,
        text_capacity=1,
        bank_capacity=args.frames,
        dtype=jnp.bfloat16,
        bank_dtype=stored,
        merges=memory.merges,
    ).bank
    most = max(1, args.frames // 8)
    layers, heads = len(bank.keys), bank.keys[0].shape[1]
    shape = (1, heads, most * vectors, model.decoder.head_dim)

    @functools.partial(jax.jit, donate_argnums=0)
    def append(bank, seed, first, count):
        noise = jax.random.normal(jax.random.key(seed), (2, *shape), jnp.bfloat16)
        positions = first + jnp.arange(most, dtype=jnp.int32)[None]
        return remember_frames(bank, (noise[0],) * layers, (noise[1],) * layers, positions, count)

    frame = 0
    for seed in range(10_000):
        room = (bank.capacity - int(bank.length[0])) // vectors
        if room == 0:
            if seed >= args.rounds:
                return bank
            bank = compact(bank)
            continue
        count = min(room, most)
        bank = append(bank, seed, frame, jnp.array([count]))
        frame += count
    raise AssertionError("the bank never fills")


if __name__ == "__main__":
    main()
