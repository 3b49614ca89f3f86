"""Compares moss, its decoder-only twin, Qwen2.5-VL and Llama 3.2 Vision by TTFT, tokens per second and stall.

    python benchmarks/peers.py --out benchmarks/results/peers.json --figure benchmarks/results/peers.png

Peers, all with random weights, bfloat16 unless stated otherwise, one stream, greedy:
  moss    the 11B through `Engine`: 101 vectors a frame, seen by 8 cross-attention layers
  moss8   the same in 8 bits: int8 decoder (W8A16), fp8 vision encoder (W8A8)
  twin    benchmarks/twin.py through the same engine: the 101 vectors inside the sequence, 32 layers
  qwen    Qwen2.5-VL-7B in transformers: 96 tokens a frame, which is one temporal patch of 224x336
  mllama  Llama-3.2-11B-Vision in transformers, one tile a frame, its 1601 vectors pooled to 101

For each number of frames F, medians, on the host's clock:
  ttft_s           prefill of a clip of F decoded frames in host memory and a prompt of 32 tokens: first token
  tokens_per_s     decoding with the F frames in context; ours dispatches a step before it reads the previous
                   token, as a session does; in transformers that token is the next input
  prompt_ttft_ms   prefill of a prompt of 32 tokens with the frames in the cache: first token
  frame_stall_ms   how much later the next token comes if one more frame is encoded and appended before it,
                   the host reading each token before the next step (token_ms)
  peak_gb          device memory; our cache is allocated for the largest number of frames from the start
  generate_*       qwen: the same two figures with `generate`, which also computes positions; the plot shows
                   the better of the two

The transformers peers run with sdpa and the dynamic cache that `generate` creates by default, called
directly. Their preprocessing is not timed: they get normalised pixels in pinned memory, while ours gets
1920x1080 frames as a video decoder outputs them. Each peer runs in its own process, one after the other, so
none occupies memory that another needs; rows are printed as they are measured.
"""

import argparse
import gc
import importlib.metadata
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from inputs import FRAME, padded_tokenizer, random_frames
from matplotlib.figure import Figure
from report import add_out, make_parser, publish
from twin import TILE, Twin, room, twin_of

from moss_jax.config import PRESETS, EngineConfig, MemoryConfig
from moss_jax.nn import MossVideo, quantize
from moss_jax.stream import PENDING, Engine, Row
from moss_jax.stream.rows import FRAME_BUCKETS

PROMPT, PROMPTS, STALLS = 32, 5, 8
TEXT = 1024  # Text tokens of a run, at most.
PEERS = {
    "moss": "moss_jax 11B: cross-attention",
    "moss8": "the same in 8 bits",
    "twin": "moss_jax twin: decoder-only",
    "qwen": "Qwen2.5-VL-7B, transformers",
    "mllama": "Llama 3.2 11B Vision, transformers",
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--frames",
        default="",
        help="comma-separated numbers of frames; 16,64,256,1024 by default (tiny: 8,32)",
    )
    parser.add_argument("--peers", default=",".join(PEERS), help=f"comma-separated, of {','.join(PEERS)}")
    parser.add_argument("--tiny", action="store_true", help="small models, to test this script")
    parser.add_argument("--tokens", type=int, default=64, help="number of timed tokens")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed clips")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for all peers together")
    parser.add_argument("--figure", type=Path, help="PNG file of the plot")
    parser.add_argument(
        "--add", type=Path, help="an earlier result of the same machine, whose rows are included"
    )
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    add_out(parser)
    args = parser.parse_args()
    if unknown := set(args.peers.split(",")) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}")
    args.frames = args.frames or ("8,32" if args.tiny else "16,64,256,1024")
    if args.peer:
        return run_peer(args.peer, args)

    end = time.monotonic() + args.limit
    result = json.loads(args.add.read_text(encoding="utf-8")) if args.add else {}
    result = {"peers": result.get("peers", {}), "rows": result.get("rows", [])}
    with tempfile.TemporaryDirectory() as programs:
        # Shared by the peers, since ours have one vision encoder.
        environment = {"JAX_COMPILATION_CACHE_DIR": programs} | os.environ
        for peer in args.peers.split(","):
            for line in lines_of(peer, end - time.monotonic(), environment):
                if "frames" in line:
                    result["rows"].append(line)
                else:
                    result["peers"][line.pop("peer")] = line
    if args.figure:
        figure(result["rows"], args.figure)
    publish("peers.py", args, result)


def lines_of(peer: str, limit: float, environment: dict[str, str]) -> Iterator[dict]:
    """Yields the rows that a peer's process prints, and a last one if it failed."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peer", peer]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    clock = threading.Timer(limit, process.kill)
    clock.start()
    for text in process.stdout:
        print(text, end="", file=sys.stderr, flush=True)
        # Libraries print too.
        if text.startswith('{"peer"'):
            yield json.loads(text)
    if status := process.wait():
        reason = "out of time" if not clock.is_alive() else f"its process exited with status {status}"
        yield {"peer": peer, "frames": None, "failed": reason}
    clock.cancel()


def run_peer(name: str, args: argparse.Namespace) -> None:
    """Measures one peer in this process; a failure becomes a row, and the other sizes are still measured."""

    def say(**line):
        print(json.dumps({"peer": name} | line), flush=True)

    try:
        kinds = {"moss": Ours, "moss8": OursIn8Bits, "twin": OurTwin, "qwen": Qwen, "mllama": Mllama}
        peer = kinds[name](args.tiny)
    except Exception as error:
        traceback.print_exc()
        return say(frames=None, failed=first_line(error))
    say(**peer.about())
    counts = sorted(map(int, args.frames.split(",")))
    peer.make_room(counts[-1])
    for frames in counts:
        try:
            say(frames=frames, **measure(peer, frames, args.tokens, args.repeats))
        except Exception as error:
            traceback.print_exc()
            say(frames=frames, failed=first_line(error))


def measure(peer: "Peer", frames: int, tokens: int, repeats: int) -> dict:
    """Measures a peer at one number of frames."""
    prompt = np.random.default_rng(0).integers(10, 250, PROMPT).tolist()

    def live() -> dict:
        """Measures everything after the first token."""
        peer.next()
        rate = tokens / seconds(lambda: peer.talk(tokens))
        token_s = statistics.median([seconds(peer.next) for _ in range(tokens)])
        prompts = [seconds(lambda: peer.ask(prompt)) for _ in range(PROMPTS)]
        gaps = [seconds(call) for _ in range(STALLS) for call in (peer.next, peer.see)][1::2]
        return {
            "token_ms": 1e3 * token_s,
            "tokens_per_s": rate,
            "prompt_ttft_ms": 1e3 * statistics.median(prompts),
            "frame_stall_ms": 1e3 * (statistics.median(gaps) - token_s),
        }

    # A first pass compiles programs, and cuDNN plans its attention for each cache length.
    answers = []
    for _ in range(1 + repeats):
        peer.reset()
        answers.append(seconds(lambda: peer.answer(frames, prompt)))
        if len(answers) == 1:
            live()
    figures = {"ttft_s": statistics.median(answers[1:])} | live() | {"peak_gb": peer.peak_gb()}
    return figures | peer.others(frames, prompt, tokens)


def seconds(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


class Peer:
    """A model with one stream. Each call returns when the host has the next token."""

    last: int  # First token of the next call.
    opening = 1  # Stands for `<|begin_of_text|>`.

    def make_room(self, frames: int) -> None: ...

    def others(self, frames: int, prompt: list[int], tokens: int) -> dict:
        return {}

    def answer(self, frames: int, prompt: list[int]) -> None:
        self.extend([self.opening], frames, prompt)

    def ask(self, prompt: list[int]) -> None:
        self.extend([self.last, *prompt])

    def next(self) -> None:
        self.extend([self.last])

    def talk(self, tokens: int) -> None:
        for _ in range(tokens):
            self.next()

    def see(self) -> None:
        self.extend([self.last], 1)


class Ours(Peer):
    """moss, through the engine as a session calls it."""

    last = PENDING
    chunk = FRAME_BUCKETS[-1]  # Frames appended by one step.

    def __init__(self, tiny: bool):
        self.model = self.make(
            PRESETS["moss_tiny" if tiny else "moss_video_11b"](), jnp.float32 if tiny else jnp.bfloat16
        )
        self.tokenizer = padded_tokenizer(self.model.config.decoder.vocab_size)
        self.pixels = random_frames(16, (120, 160, 3) if tiny else FRAME)

    def make(self, config, dtype):
        return MossVideo(config, rngs=nnx.Rngs(0), dtype=dtype)

    def room(self, tokens: int, frames: int) -> EngineConfig:
        tokens, frames = (-(-n // TILE) * TILE for n in (tokens, frames))
        return EngineConfig(1, tokens, frames, MemoryConfig("full"))

    def about(self) -> dict:
        return {"parameters": sum(p.size for p in jax.tree.leaves(nnx.state(self.model)))}

    def make_room(self, frames: int) -> None:
        frames += STALLS
        self.engine = Engine(self.model, self.tokenizer, self.room(TEXT + frames, frames))

    def reset(self) -> None:
        self.state = None
        self.state = jax.block_until_ready(self.engine.start())

    def extend(self, before: list[int], frames: int = 0, after: Sequence[int] = ()) -> None:
        pool = None
        if frames:
            pool = self.engine.encode([self.pixels[i % len(self.pixels)] for i in range(frames)])
        for first in range(0, max(frames, 1), self.chunk):
            end = min(first + self.chunk, frames)
            row = [*before, *[self.tokenizer.special.image] * (end - first)]
            before = []
            if end == frames:
                row += after
            self.state, drawn = self.engine.step(self.state, [Row(row, range(first, end))], pool)
        jax.device_get(drawn.tokens)

    def talk(self, tokens: int) -> None:
        row, drawn = Row([PENDING]), None
        for _ in range(tokens):
            before = drawn
            self.state, drawn = self.engine.step(self.state, [row])
            drawn.tokens.copy_to_host_async()
            if before:
                jax.device_get(before.tokens)
        jax.device_get(drawn.tokens)

    def peak_gb(self) -> float | None:
        stats = jax.devices()[0].memory_stats()
        return stats and stats["peak_bytes_in_use"] / 1e9


class OursIn8Bits(Ours):
    """moss with an int8 decoder and an fp8 vision encoder."""

    def make(self, config, dtype):
        return quantize(super().make(config, dtype), decoder="int8", encoder="fp8")


class OurTwin(Ours):
    """The decoder-only twin, through the same engine."""

    chunk = FRAME_BUCKETS[-2]  # Each frame is `vectors_per_frame` rows of a step.

    def make(self, config, dtype):
        return Twin(twin_of(config), rngs=nnx.Rngs(0), dtype=dtype)

    def room(self, tokens: int, frames: int) -> EngineConfig:
        return room(self.model.config, tokens=tokens, frames=frames)


class Transformers(Peer):
    """A model of the transformers library."""

    def __init__(self, tiny: bool):
        import torch
        import transformers

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.StoppingCriteria = transformers.StoppingCriteria
        torch.set_grad_enabled(False)
        with torch.device(self.device):
            self.model = transformers.AutoModelForImageTextToText.from_config(
                self.config(transformers, tiny), dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()

    def about(self) -> dict:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "versions": versions}

    def make_room(self, frames: int) -> None:
        # All frames have the same pixels: no time depends on their values.
        one = self.torch.randn(1, *self.frame_shape, dtype=self.torch.bfloat16)
        self.pixels = one.repeat(frames, *[1] * len(self.frame_shape))
        if self.device == "cuda":
            self.pixels = self.pixels.pin_memory()

    def reset(self) -> None:
        self.cache = None
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        return self.torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else None

    def tokens(self, ids: list[int]):
        return self.torch.tensor([ids], device=self.device)

    def forward(self, **inputs) -> None:
        out = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.last = int(out.logits[0, -1].argmax())


class Qwen(Transformers):
    """Qwen2.5-VL-7B. Frames are one video, each a temporal patch of 16x24 patches of pixels: 96 tokens."""

    frame_shape = (16 * 24, 3 * 2 * 14 * 14)

    def config(self, transformers, tiny: bool):
        layers = 2 if tiny else 28
        text = {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944}
        text |= {"num_hidden_layers": layers, "max_window_layers": layers}
        text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
        text |= {"max_position_embeddings": 128_000}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
        vision |= {"depth": 2 if tiny else 32, "fullatt_block_indexes": [1] if tiny else [7, 15, 23, 31]}
        vision["tokens_per_second"] = 2
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)

    def reset(self) -> None:
        super().reset()
        self.position = 0

    def patches(self, frames: int):
        return self.pixels[:frames].flatten(0, 1).to(self.device, non_blocking=True)

    def grid(self, frames: int):
        return self.torch.tensor([[frames, 16, 24]], device=self.device)

    def extend(self, before: list[int], frames: int = 0, after: Sequence[int] = ()) -> None:
        torch, parts = self.torch, []

        def add(vectors, positions):
            parts.append((vectors, positions + self.position))
            self.position += int(positions.max()) + 1

        def add_text(ids):
            if ids:
                vectors = self.model.get_input_embeddings()(self.tokens(ids))[0]
                add(vectors, torch.arange(len(ids)).expand(3, -1))

        add_text(before)
        if frames:
            features = self.model.model.visual(self.patches(frames), grid_thw=self.grid(frames))
            # Two positions a second in time; rows and columns of tokens.
            axes = (2 * torch.arange(frames), torch.arange(8), torch.arange(12))
            positions = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
            add(getattr(features, "pooler_output", features), positions)
        add_text(after)
        vectors, positions = zip(*parts, strict=True)
        positions = torch.cat(positions, dim=1)[:, None].to(self.device)
        self.forward(inputs_embeds=torch.cat(vectors)[None], position_ids=positions)

    def others(self, frames: int, prompt: list[int], tokens: int) -> dict:
        config, torch = self.model.config, self.torch
        ids = [self.opening, config.vision_start_token_id, *[config.video_token_id] * (96 * frames)]
        ids = self.tokens([*ids, config.vision_end_token_id, *prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
        inputs |= {"video_grid_thw": self.grid(frames), "second_per_grid_ts": torch.tensor([1.0])}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = 2 * (ids == config.video_token_id).int()

        class Clock(self.StoppingCriteria):
            """Records the time of each token; never stops."""

            def __call__(self, input_ids, scores, **kwargs):
                times.append(time.monotonic())
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        def generate(count):
            pixels = {"pixel_values_videos": self.patches(frames)}
            lengths = {"min_new_tokens": count, "max_new_tokens": count}
            self.model.generate(**inputs, **pixels, **lengths, stopping_criteria=[Clock()]).tolist()

        try:
            for _ in range(2):  # cuDNN plans for all lengths in the first.
                self.reset()
                times = []
                generate(1 + tokens)
            first = seconds(lambda: generate(1))
        except Exception as error:
            traceback.print_exc()
            return {"generate_failed": first_line(error)}
        return {"generate_ttft_s": first, "generate_tokens_per_s": tokens / (times[tokens] - times[0])}


class Mllama(Transformers):
    """Llama 3.2 11B Vision. Between vision encoder and projector, a frame is pooled as moss pools it."""

    frame_shape = (1, 3, 560, 560)
    frames_per_call = 32  # The vision encoder keeps the hidden states of all its layers.

    def config(self, transformers, tiny: bool):
        rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        # The defaults of transformers are the config of the 11B.
        text, vision = {"rope_parameters": rope}, {"image_size": 560}
        # The 11B's encoder computes four tiles even where three are empty.
        vision |= {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
        if tiny:
            text |= {"num_hidden_layers": 5, "cross_attention_layers": [3]}
            vision |= {"num_hidden_layers": 5, "num_global_layers": 1}
            vision["intermediate_layers_indices"] = [0, 1, 2, 3, 4]
        return transformers.MllamaConfig(text_config=text, vision_config=vision)

    def __init__(self, tiny: bool):
        super().__init__(tiny)
        for layer in self.model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                # Every token of these runs sees all frames, and without a mask sdpa may take the fast path;
                # it must not take it to be causal.
                layer.cross_attn.is_causal = False

    def encode(self, frames: int):
        torch, model, features = self.torch, self.model.model, []
        for part in self.pixels[:frames].split(self.frames_per_call):
            ones = torch.ones(1, len(part), dtype=torch.long, device=self.device)
            states = model.vision_model(
                pixel_values=part[None].to(self.device, non_blocking=True),
                aspect_ratio_ids=ones,
                aspect_ratio_mask=ones[..., None],
            ).last_hidden_state.flatten(0, 2)  # [F, 1601, 7680]
            patches = states[:, 1:].unflatten(1, (40, 40)).movedim(-1, 1)
            pooled = torch.nn.functional.avg_pool2d(patches, 4).flatten(2).mT
            features.append(model.multi_modal_projector(torch.cat([states[:, :1], pooled], dim=1)))
        return torch.cat(features).flatten(0, 1)[None]

    def extend(self, before: list[int], frames: int = 0, after: Sequence[int] = ()) -> None:
        image = self.model.config.text_config.vocab_size
        inputs = {"cross_attention_states": self.encode(frames)} if frames else {}
        self.forward(input_ids=self.tokens([*before, *[image] * frames, *after]), **inputs)


def figure(rows: list[dict], path: Path) -> None:
    """Plots three panels over the number of frames, one line a peer."""
    panels = {
        "ttft_s": "time to first token, clip and prompt (s)",
        "tokens_per_s": "tokens per second",
        "frame_stall_ms": "stall per arriving frame (ms)",
    }
    drawing = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (key, title) in zip(drawing.subplots(1, len(panels)), panels.items(), strict=True):
        for peer, label in PEERS.items():
            mine = [row for row in rows if row["peer"] == peer and key in row]
            # The faster of a direct call and `generate`.
            best = max if key == "tokens_per_s" else min
            points = sorted(
                (row["frames"], best(row[key], row.get(f"generate_{key}", row[key]))) for row in mine
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        axes.set(xscale="log", yscale="linear" if key == "tokens_per_s" else "log", xlabel="frames")
        if key == "tokens_per_s":
            axes.set_ylim(0)
        axes.set_title(title, fontsize=10)
        counts = sorted({row["frames"] for row in rows if key in row})
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    drawing.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


if __name__ == "__main__":
    main()
