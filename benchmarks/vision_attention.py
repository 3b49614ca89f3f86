"""Times the vision encoder's attention: our kernel on the fused projection, and cuDNN on its slices.

    python benchmarks/vision_attention.py --out benchmarks/results/vision_attention_h200.json

Every configuration is timed with one number of frames, the fastest also with the others; and so is the
default with q and k in float8, whose errors are relative to the rounded operands. A program has several
calls, each on its own projections, so that the launch is negligible. TFLOP/s count 1608 positions and 80
columns, without the padding that a kernel computes. Each line starts with its configuration, so that one that
hangs can be identified.
"""

import functools

import jax
import jax.numpy as jnp
from report import add_out, device, first_line, make_parser, publish, say
from timing import timed

from moss_jax.ops.attention import QuantizedProjection, attention, self_attention
from moss_jax.ops.attention.base import slices
from moss_jax.ops.attention.mosaic_gpu import DenseConfig
from moss_jax.ops.qarray import QArray

POSITIONS, HEADS, HEAD_DIM = 1608, 16, 80
FRAMES_A_PROGRAM = 32
TRIED_WITH, OTHERS = 8, (1, 32)
FASTEST = 3
QUANTIZED = "queries and keys in 8 bits"

CONFIGS = [
    {},
    {"stages": 2},
    {"wide_values": False},
    {"blocks": 2**20},
    {"warpgroups": 3, "block_kv": 64, "stages": 4},
    {"warpgroups": 3, "block_kv": 96, "wide_values": False},
]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="samples of each time")
    add_out(parser)
    args = parser.parse_args()

    say(device())
    ours = {str(x): functools.partial(self_attention, config=DenseConfig(**x)) for x in CONFIGS}
    others = {"cudnn": cudnn, QUANTIZED: functools.partial(self_attention, implementation="mosaic_gpu")}
    rows = compare(TRIED_WITH, others | ours, args.repeats)
    working = sorted((row for row in rows if "us" in row), key=lambda row: row["us"])
    best = [row["implementation"] for row in working if row["implementation"] in ours][:FASTEST]
    for frames in OTHERS:
        rows += compare(frames, others | {name: ours[name] for name in best}, args.repeats)
    publish("vision_attention.py", args, {"rows": rows})


def quantized(qkv):
    """Quantizes queries and keys to 8 bits."""
    qk = QArray(qkv[:, :, :2].astype(jnp.float8_e4m3fn), jnp.ones(()))
    return QuantizedProjection(qk, qkv[:, :, 2])


def cudnn(qkv):
    q, k, v = slices(qkv)
    return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), implementation="cudnn")


def compare(frames: int, attends: dict, repeats: int) -> list[dict]:
    """Measures each implementation; returns a row for each."""
    calls = max(FRAMES_A_PROGRAM // frames, 1)
    shape = (frames, POSITIONS, 3, HEADS, HEAD_DIM)
    drawn = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(calls)]
    rows = []
    for name, attend in attends.items():
        print(f"{frames:>2} frames  {name:<70}", end=" ", flush=True)
        row = {"frames": frames, "implementation": name}
        qkvs = list(map(quantized, drawn)) if name == QUANTIZED else drawn
        expected = exact(*(x[-1] for x in slices(qkvs[0])))
        try:
            program = jax.jit(lambda qkvs, attend=attend: [attend(qkv) for qkv in qkvs])
            off = program(qkvs)[0][-1].astype(jnp.float32) - expected
            row["error"] = float(jnp.linalg.norm(off) / jnp.linalg.norm(expected))
            row |= timed(program, (qkvs,), calls, repeats)
            row["tflop_s"] = 4 * frames * HEADS * POSITIONS**2 * HEAD_DIM / row["us"] / 1e6
            text = f"{row['us']:>7.1f} us ({row['us_min']:.1f} to {row['us_max']:.1f})"
            say(f"{text}  {row['tflop_s']:>4.0f} TFLOP/s  error {row['error']:.1e}")
        except Exception as error:
            row["failed"] = first_line(error)
            say(f"failed: {row['failed']}")
        rows.append(row)
    return rows


@jax.jit
def exact(*qkv):
    """Exact attention of one frame, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in qkv)
    with jax.default_matmul_precision("highest"):
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5)
        return jnp.einsum("hqk,khd->qhd", weights, v)


if __name__ == "__main__":
    main()
