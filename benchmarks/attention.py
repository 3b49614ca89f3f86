"""Times implementations of the attention op, and of peers, on decode and prefill shapes.

    python benchmarks/attention.py --cases decode --out benchmarks/results/attention_decode_h200.json
    python benchmarks/attention.py --tune --budget 300

Decode calls take microseconds, so a program has several, each with its own K and V, together larger than any
cache, and with the output of the previous call as queries. Other cases run one call per program, enqueued
back to back. Rates are shares of a large copy and a large GEMM that are timed first; bytes are the minimum
that a call must read, FLOPs those of the visible (query, key) pairs. Peers get K and V in the layout that
they expect. A peer marked "bound" ignores the key ranges, so it computes something else.

`--tune` times configurations of our kernels instead, and records the fastest in
moss_jax/ops/attention/tuning.json.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import logging
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
from attention_cases import CASES, Bank, Case, Checker, Rest, arguments, make_inputs
from report import add_out, device, first_line, known, make_parser, publish, say
from timing import SHARED_BYTES, line, measure_ceilings, named, timed

from moss_jax.ops.attention import ATTENTION, tuning
from moss_jax.ops.attention.mosaic_gpu import DecodeConfig, StaircaseConfig

MAX_SCORE_BYTES = 4e9
MAX_ERROR = 0.03  # Relative; a configuration beyond it counts as wrong.

# Relative spread of the times of one program.
NOISE = 0.02
DECODE_GRID = {"block_kv": (64, 128), "stages": (1, 2, 3), "blocks": (256, 264, 528)}
STAIRCASE_GRID = {"block_q": (64, 128), "block_kv": (64, 128), "stages": (2, 3)}
BACKWARD_FIELDS = ("block_q_dq", "block_kv_dq", "stages_dq", "block_q_dkv", "block_kv_dkv", "stages_dkv")
BACKWARD = [
    dict(zip(BACKWARD_FIELDS, sizes, strict=True))
    for sizes in (
        (64, 64, 2, 64, 64, 2),
        (64, 64, 3, 64, 64, 3),
        (64, 128, 2, 64, 64, 2),
        (128, 64, 2, 64, 64, 2),
        (64, 64, 2, 64, 128, 2),
        (64, 64, 2, 128, 64, 2),
    )
]


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation to be timed.

    Attributes:
      ours: whether K and V come as [B, K, S, D]; [B, S, K, D] for the others.
      bound: whether it attends to all keys instead.
    """

    name: str
    attend: Callable[[Case, jax.Array, Bank, Rest], jax.Array]
    refuses: Callable[[Case], bool]
    ours: bool = False
    bound: bool = False


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--cases", default="all", help="all, decode, staircase, or case names, comma-separated"
    )
    parser.add_argument("--implementations", help="comma-separated names; all by default")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each time")
    parser.add_argument("--tune", action="store_true", help="time configurations of our kernels instead")
    parser.add_argument("--budget", type=float, help="seconds after which --tune starts nothing new")
    parser.add_argument("--tiny", action="store_true", help="small cases, to test this script on a CPU")
    add_out(parser)
    args = parser.parse_args()
    # tokamax warns about each shape that is missing in its own table.
    logging.getLogger("absl").setLevel(logging.ERROR)

    chosen = contenders()
    if args.implementations:
        chosen = [known(parser, {c.name: c for c in chosen}, n) for n in args.implementations.split(",")]
    groups = {
        kind: [case for case in CASES.values() if case.kind == kind] for kind in ("decode", "staircase")
    }
    groups |= {"all": list(CASES.values())} | {name: [case] for name, case in CASES.items()}
    cases = [case for name in args.cases.split(",") for case in known(parser, groups, name)]
    if args.tiny:
        cases = [case.tiny() for case in cases]

    result = {"ceilings": measure_ceilings(args.tiny)}
    copy, matmul = result["ceilings"].values()
    say(f"copy {copy:.3g} TB/s, bf16 matmul {matmul:.3g} TFLOP/s; {device()}")
    rows = tune(cases, args) if args.tune else compare(cases, chosen, args.repeats, result["ceilings"])
    if "tokamax" in sys.modules:
        result["tokamax"] = importlib.metadata.version("tokamax")
    publish("attention.py", args, result | {"rows": rows})
    for row in rows:
        if not args.tune or "best" in row:
            say(line(row))


def compare(cases: list[Case], chosen: list[Contender], repeats: int, ceilings: dict) -> list[dict]:
    """Measures each contender on each case; returns a row for each."""
    rows = []
    for case in cases:
        q, banks, rest = make_inputs(case)
        check = Checker(case, q, banks[0], rest)
        for ours in (True, False):
            able = [c for c in chosen if c.ours == ours and not c.refuses(case)]
            if able and not ours:
                banks = [bank._replace(k=bank.k.swapaxes(1, 2), v=bank.v.swapaxes(1, 2)) for bank in banks]
            for contender in able:
                row = {"case": case.name, "implementation": contender.name + " (bound)" * contender.bound}
                try:
                    row |= measure(case, contender, (q, banks, rest), check, repeats, ceilings)
                except Exception as error:
                    row["failed"] = first_line(error)
                rows.append(row)
                say(line(row))
    return rows


def measure(case: Case, contender: Contender, inputs, check: Checker, repeats: int, ceilings: dict) -> dict:
    """Measures error, extra memory, time and rate of a contender."""
    q, banks, rest = inputs
    program = build(case, contender.attend)
    single = program.lower(q, banks[:1], rest).compile()
    first, *others = single(q, banks[:1], rest)[1]
    if not contender.ours:
        others = [x.swapaxes(1, 2) for x in others]
    row = {"extra_mb": single.memory_analysis().temp_size_in_bytes / 1e6}
    if not contender.bound:
        row["error"] = check((first, *others))
    many = single if len(banks) == 1 else program.lower(q, banks, rest).compile()
    row |= timed(many, inputs, len(banks), repeats)
    if case.kind == "decode":
        row["tb_s"] = case.bytes_read / row["us"] / 1e6
        row["share"] = row["tb_s"] / ceilings["copy_tb_s"]
    else:
        row["tflop_s"] = case.flops / row["us"] / 1e6
        row["share"] = row["tflop_s"] / ceilings["matmul_tflop_s"]
    return row


def build(case: Case, attend: Callable):
    """Compiles a chain of one call for each bank; returns the last output and what `Checker` compares."""
    step = jax.jit(functools.partial(attend, case))  # Lowered once for all banks.

    def chain(q, banks, rest):
        outputs = []
        for bank in banks:
            # One call's output is the next one's queries, so XLA can neither drop nor reorder calls.
            outputs.append(step(outputs[-1] if outputs else q, bank, rest))
        return outputs[-1], outputs[:1]

    def gradients(q, banks, rest):
        (bank,) = banks
        out, backward = jax.vjp(lambda q, k, v: step(q, bank._replace(k=k, v=v), rest), q, bank.k, bank.v)
        return out, backward(rest.d_out)

    return jax.jit(gradients if case.gradients else chain)


def contenders() -> list[Contender]:
    """Returns our implementations and the peers installed on this machine."""
    platform = jax.default_backend()
    on_gpu = platform == "gpu"

    def ours_refuses(case: Case, *, name: str) -> bool:
        q, banks, rest = jax.eval_shape(lambda: make_inputs(case))
        unsupported = ATTENTION.implementations[name].unsupported
        reason = unsupported(arguments(case, q, banks[0], rest), platform)
        return reason is not None or (name == "reference" and too_many_scores(case))

    def ours(case: Case, *inputs, name: str):
        return ATTENTION(arguments(case, *inputs), implementation=name)

    def peer(name, takes, *, bound=False, **options):
        attend = functools.partial(jax_nn, **options)
        return Contender(name, attend, lambda case: case.quantized or not takes(case), bound=bound)

    return [
        *(
            Contender(
                name, functools.partial(ours, name=name), functools.partial(ours_refuses, name=name), True
            )
            for name in ATTENTION.implementations
        ),
        peer("jax_cudnn", lambda case: on_gpu, implementation="cudnn", see="mask"),
        peer(
            "jax_cudnn_lengths",
            lambda case: on_gpu and case.kind == "decode",
            implementation="cudnn",
            see="lengths",
        ),
        peer(
            "jax_cudnn_all_keys",
            lambda case: on_gpu and not case.causal,
            bound=True,
            implementation="cudnn",
            see="all",
        ),
        peer("jax_xla", lambda case: not too_many_scores(case), implementation="xla", see="mask"),
        *(tokamax_or_none() if on_gpu and importlib.util.find_spec("tokamax") else []),
    ]


def too_many_scores(case: Case) -> bool:
    return case.score_bytes > MAX_SCORE_BYTES


def jax_nn(case: Case, q, bank: Bank, rest: Rest, *, implementation: str, see: str):
    """`jax.nn.dot_product_attention` with the ranges as a mask or lengths, or without them."""
    mask = (jnp.arange(case.keys) < rest.end[..., None])[:, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q,
        bank.k,
        bank.v,
        bias=None if rest.bias is None else rest.bias[:, None, None].astype(q.dtype),
        mask=mask if see == "mask" and not case.causal else None,
        key_value_seq_lengths=rest.end[:, -1] if see == "lengths" else None,
        is_causal=case.causal,
        scale=case.scale,
        implementation=implementation,
    )


def tokamax_or_none() -> list[Contender]:
    try:
        return tokamax_contenders()
    except Exception as error:
        say(f"tokamax is left out: {first_line(error)}")
        return []


def tokamax_contenders() -> list[Contender]:
    """tokamax's Mosaic GPU kernel, by its own heuristics and in its two variants for decoding.

    Its public function takes one length a row; per-query ranges need the op below it.
    """
    if importlib.util.find_spec("xprof") is None:
        # A large package that only tokamax's own benchmarks use.
        sys.modules["xprof.cli.tools"] = mock.MagicMock()
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS as THEIRS
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import ConfigSM90

    def call(case, q, bank, rest, *, folded=False, split=False):
        op = THEIRS["mosaic_gpu"]
        if folded:
            # Split-K takes no mask, and masks the last tile if the tiles of all splits don't fill S.
            parts = next(n for n in (16, 8, 4, 2, 1) if case.keys % (64 * n) == 0 or n == 1)
            config = ConfigSM90(
                block_kv=64, num_stages=3, fold_q_sequence_heads=True, split_k=parts if split else 1
            )
            op = op.replace(config=config)
        mask = None if split else Mask(is_causal=True) if case.causal else Mask(k_end=rest.end[:, None])
        bias = None if rest.bias is None else rest.bias[:, None, None]
        return op(q, bank.k, bank.v, bias=bias, mask=mask, logits_scale=case.scale)

    def not_decode(case):
        return case.quantized or case.kind != "decode"

    folded, split = (functools.partial(call, folded=True, split=split) for split in (False, True))
    return [
        Contender("tokamax", call, lambda case: case.quantized),
        Contender("tokamax_folded", folded, not_decode),
        Contender("tokamax_split_k", split, not_decode, bound=True),
    ]


def tune(cases: list[Case], args: argparse.Namespace) -> list[dict]:
    """Records the fastest configuration of our kernel for each shape; returns a row for each one tried."""
    deadline = time.monotonic() + (args.budget or float("inf"))
    rows, shapes = [], {}
    for case in cases:
        if not case.causal and not case.bias:
            shapes.setdefault((case.kind, case.rows, case.queries, case.keys, case.stored), []).append(case)
    for alike in shapes.values():
        best, microseconds = {}, {}
        # The backward pass is tuned with the best configuration of the forward pass.
        name = alike[0].name.removesuffix("_gradients")
        forward = dataclasses.replace(alike[0], name=name, gradients=False)
        for case in [forward, *[case for case in alike if case.gradients][:1]]:
            if time.monotonic() > deadline:
                say(f"out of time: {case.name} and the cases after it keep their entries")
                return rows
            q, banks, rest = make_inputs(case)
            tried = try_configs(case, best, (q, banks, rest), args.repeats, deadline)
            rows += tried
            if time.monotonic() > deadline:
                say(f"out of time: {case.name} was not tried to the end and keeps its entry")
                return rows
            working = [row for row in tried if "us" in row]
            if not working:
                break
            least = min(row["us"] for row in working)
            # Among configurations that are equally fast within the noise, the one with the fewest splits:
            # with few keys in range, splits and their reduction dominate.
            alike = [row for row in working if row["us"] <= (1 + NOISE) * least]
            fastest = min(alike, key=lambda row: (row["config"].get("blocks", 0), row["us"]))
            best, fastest["best"] = fastest["config"], True
            microseconds["gradients" if case.gradients else "forward"] = round(fastest["us"], 2)
            shape = tuning.shape_of(arguments(case, q, banks[0], rest))
            device_kind, kernel = jax.devices()[0].device_kind, f"mosaic_gpu.{case.kind}"
            tuning.record(tuning.Entry(device_kind, kernel, shape, best, microseconds))
            say(f"{kernel} {shape}: {best}")
    return rows


def try_configs(case: Case, best: dict, inputs, repeats: int, deadline: float) -> list[dict]:
    """Times configurations until the deadline; returns a row for each."""
    config_class = {"decode": DecodeConfig, "staircase": StaircaseConfig}[case.kind]
    check = Checker(case, inputs[0], inputs[1][0], inputs[2])
    rows = []
    for sizes in candidates(case, best):
        if time.monotonic() > deadline:
            break
        usual = best or BACKWARD[0]
        changes = {name: size for name, size in sizes.items() if size != usual.get(name)}
        row = {"case": case.name, "implementation": named(changes) or "as before", "config": sizes}
        try:
            config = config_class(**sizes)

            def attend(case, *inputs, config=config):
                return ATTENTION(arguments(case, *inputs), implementation="mosaic_gpu", config=config)

            program = build(case, attend)
            row["error"] = check(program(*inputs)[1])
            if not max(row["error"]) < MAX_ERROR:  # NaN too.
                raise ValueError(f"relative errors {row['error']} exceed {MAX_ERROR}")
            row |= timed(program, inputs, len(inputs[1]), repeats)
        except Exception as error:
            row["failed"] = first_line(error)
        rows.append(row)
        say(line(row))
    return rows


def candidates(case: Case, best: dict) -> list[dict]:
    """Returns the grid of configurations of a case that fit in shared memory."""
    if case.gradients:
        return [best | sizes for sizes in BACKWARD]
    grid = DECODE_GRID if case.kind == "decode" else STAIRCASE_GRID
    found = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if case.kind != "decode":
        return [BACKWARD[0] | sizes for sizes in found]
    key = 2 * case.head_dim * jnp.dtype(case.stored).itemsize
    return [x for x in found if x["block_kv"] * x["stages"] * key + 16 * 1024 <= SHARED_BYTES]


if __name__ == "__main__":
    main()
