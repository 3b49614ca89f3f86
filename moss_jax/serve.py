"""Command-line video streaming: `python -m moss_jax.serve --video clip.mp4 --prompt "What is happening?"`.

Without `--video` it runs the live server, and clients or the web page provide the video.
"""

import argparse
import collections
import dataclasses
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import jax

from moss_jax import command, gin_bindings
from moss_jax.api import frames_that_fit
from moss_jax.config import (
    ChatConfig,
    Clock,
    ConfigError,
    DecoderWeights,
    EncoderWeights,
    EngineConfig,
    FrameSampling,
    MemoryConfig,
    SchedulerConfig,
    SecurityConfig,
    SelectionConfig,
    ServerConfig,
    SessionConfig,
    TokenSampling,
)
from moss_jax.convert import CheckpointError, open_model
from moss_jax.memory.policies import FULL, POLICIES
from moss_jax.sharding import parse_mesh
from moss_jax.shipped import shipped
from moss_jax.stream import (
    End,
    Engine,
    Event,
    SavedStreamError,
    Scheduler,
    Session,
    SessionError,
    answer_offline,
)
from moss_jax.stream.events import EndReason
from moss_jax.terminal.feed import adapt_rate, open_session, report_skipped, run_session
from moss_jax.terminal.transcript import clock, print_json, print_transcript
from moss_jax.text import TokenizerError, chat
from moss_jax.video import (
    VideoError,
    VideoInfo,
    clip_times,
    fit_frames,
    is_live,
    probe,
    read_live,
    sample_at,
    sample_file,
    without_credentials,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from moss_jax.terminal.timeline import Timeline

BAD_INPUT = (CheckpointError, ConfigError, SavedStreamError, SessionError, TokenizerError, VideoError)


def main() -> int:
    """Runs the command; returns the exit code of `command.run`.

    Ctrl-C and SIGTERM end the stream; requested output files are still written. The exit code is then 143 for
    SIGTERM, 130 for Ctrl-C offline, where it cuts an answer short, and 0 for Ctrl-C live.
    """
    return command.run(Path(sys.argv[0]).name, run, BAD_INPUT)


def run() -> int:
    """Opens video and model, runs the stream and prints its events; returns the exit code."""
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("moss_jax").setLevel(logging.INFO if args.verbose else logging.WARNING)
    command.cache_compilations(args.compilation_cache)
    if args.connect is not None:
        return run_client(args)
    if args.video is None:
        return run_server(args)
    with command.on_stop_signal(command.leave):
        stream = open_stream(args)

    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        stream.stop()

    reasons: list[EndReason] = []
    events = tap(
        stream.events, lambda event: reasons.append(event.reason) if isinstance(event, End) else None
    )
    with command.on_stop_signal(stop):
        try:
            show(dataclasses.replace(stream, events=events), args)
        finally:
            # Saved even if printing or reading the rest of the video failed.
            if args.save and stream.session and stream.session.can_save and "not_finite" not in reasons:
                save(stream.session, args.save)
    if "not_finite" in reasons:
        return 1
    # Ctrl-C is the normal way to end a live stream, but interrupts an offline answer.
    cut = signals and (args.offline or signals[0] != signal.SIGINT)
    return command.SIGNALLED + signals[0] if cut else 0


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream ready to run.

    Attributes:
      heading: description of clip and model.
      events: iterator that runs the stream.
      stop: ends the events soon; thread-safe.
      picture: timeline that collects frames and events, if requested.
      session: session of a live stream.
    """

    heading: str
    events: Iterator[Event]
    stop: Callable[[], object]
    picture: "Timeline | None"
    session: Session | None


def open_stream(args: argparse.Namespace) -> Stream:
    """Opens video and model, and compiles ahead for a realtime stream, which cannot wait."""
    if args.mesh or args.token_file or args.allow_origin:
        raise ConfigError(
            "--mesh, --token-file and --allow-origin are for the live server; leave out --video"
        )
    gin_bindings.parse([str(shipped("configs/serve.gin")), *args.gin_file], args.gin_param)
    sampling = override(gin_bindings.settings(FrameSampling), fps=args.fps)
    selection = override(gin_bindings.settings(SelectionConfig), enabled=args.select or None)
    session_config = override(gin_bindings.settings(SessionConfig), clock=args.clock, selection=selection)
    if args.offline and args.select:
        raise ConfigError("--select is for live streams; --offline shows the model every sampled frame")
    if not args.offline:
        check_selection(selection)
    rate = f"{sampling.fps:g}"
    if not args.offline:
        session_config, sampling = adapt_rate(session_config, sampling)
        rate += f" to {sampling.fps:g}" * (f"{sampling.fps:g}" != rate)
    memory = override(gin_bindings.settings(MemoryConfig), policy=args.memory)
    engine_config = dataclasses.replace(gin_bindings.settings(EngineConfig), slots=1, memory=memory)
    token_sampling = override(gin_bindings.settings(TokenSampling), seed=args.seed)

    prompts = sorted(args.prompt, key=lambda p: p.at)
    source = None
    if is_live(args.video):
        if args.offline or session_config.clock == "lockstep":
            if args.offline or args.clock == "lockstep":
                raise ConfigError(
                    "a camera or an address is live: it takes neither --offline nor --clock lockstep"
                )
            session_config = dataclasses.replace(session_config, clock="realtime")
        source = read_live(args.video, sampling)
        info = None
    else:
        info = probe(args.video)
        check_times(prompts, info)
    if args.offline and len(prompts) != 1:
        raise ConfigError(f"--offline answers one --prompt about the whole clip, not {len(prompts)}")
    if args.offline and prompts[0].at:
        raise ConfigError("--offline reads the whole clip before it answers, so --prompt-at has no meaning")
    if args.offline and (args.save or args.resume):
        raise ConfigError(
            "--offline begins and ends with one answer; --save and --continue are for live streams"
        )
    if args.resume and not args.resume.is_file():
        raise ConfigError(f"--continue takes a file that --save has written; there is no {args.resume}")
    if args.resume and args.system is not None:
        raise ConfigError("--continue keeps the system prompt of the stream; leave out --system")

    perception = perception_device(args.perception_device)

    picture = None
    if args.timeline:
        # Imported lazily, since matplotlib is slow to import.
        from moss_jax.terminal.timeline import Timeline, check_path

        check_path(args.timeline)
        picture = Timeline()

    opened = open_model(args.checkpoint, weights=args.weights, encoder_weights=args.encoder_weights)
    engine = Engine(
        opened.model, opened.tokenizer, engine_config, token_sampling, perception_device=perception
    )
    length = f" · {info.duration:.1f} s" if info and info.duration else ""
    size = f"{info.width}×{info.height}" if info else "live"
    mode = "offline" if args.offline else session_config.clock
    name = Path(without_credentials(args.video)).name
    heading = f"{name} · {size}{length} · {rate} fps · {mode}\n{opened.name}\n"
    # Times of frames that failed to decode.
    skipped: list[float] = []
    session = None
    if args.offline:
        assert info is not None
        times = clip_times(args.video, frames_that_fit(sampling, engine_config))
        frames = sample_at(args.video, times, skipped.append)
        if picture:
            frames = tap(frames, lambda frame: picture.add_frame(frame.rgb, frame.time))
        # Scaled while reading: a chunk of full-size 4K frames may exceed the memory.
        clip = fit_frames(frames, engine.model_config.vision.image_size)
        if not (args.json and sys.stdout.isatty()):  # The progress bar would overwrite the events.
            clip = command.counted("frames", clip, len(times))
        stopped = threading.Event()
        clip = itertools.takewhile(lambda _: not stopped.is_set(), clip)
        events = answer_offline(engine, clip, prompts[0].text, num_frames=len(times), system=args.system)
        events, stop = itertools.takewhile(lambda _: not stopped.is_set(), events), stopped.set
    else:
        system = chat.SYSTEM_PROMPT if args.system is None else args.system
        timed = [(prompt.at, prompt.text) for prompt in prompts]
        session, later = open_session(engine, timed, session_config, system=system, resume=args.resume)
        start, side = session.start_time, engine.model_config.vision.image_size
        if args.resume:
            heading += f"continues {args.resume} at {clock(start)}\n"
        if session_config.clock == "realtime":
            # Compiled beforehand, since the clip does not wait.
            with command.progress("compiling"):
                engine.warm_up((info.height, info.width, 3) if info else (side, side, 3))
            command.freeze_heap()
        if source is None:
            frames = sample_file(args.video, sampling, lambda time: skipped.append(start + time))
        else:
            # Resized to one size, since the source's size may vary.
            frames = fit_frames(source, side)
        frames = (dataclasses.replace(frame, time=start + frame.time) for frame in frames)
        if picture:
            frames = tap(frames, lambda frame: picture.add_frame(frame.rgb, frame.time))
        # Decoded here, each into a buffer of its own.
        events = run_session(session, frames, later, copy=False)
        stop = session.pause if args.save else session.stop
    events = report_skipped(events, skipped)
    if picture:
        events = tap(events, picture.add)
    return Stream(heading, events, stop, picture, session)


def check_selection(selection: SelectionConfig) -> None:
    """Refuses settings of the selection of frames that have no effect on a stream of the command.

    Raises:
      ConfigError: naming them.
    """
    if not selection.enabled:
        gin_bindings.refuse_changed(SelectionConfig, "frames are selected only with --select; give it, too")
    gin_bindings.refuse_changed(
        SelectionConfig,
        "the rate of frames while nothing changes is --fps or frames.fps; set that",
        fields=("fps",),
    )


def run_server(args: argparse.Namespace) -> int:
    """Serves live streams until a signal; returns the exit code."""
    for name in ("prompt", "offline", "save", "resume", "timeline", "fps", "system"):
        if getattr(args, name) not in (None, False, []):
            flag = {"resume": "continue"}.get(name, name)
            raise ConfigError(f"--{flag} is for a --video; without one, this is the live server")
    try:
        # Imported lazily: only the server needs these.
        from starlette.middleware import Middleware

        from moss_jax.serving import chat as chat_completions
        from moss_jax.serving import logs
        from moss_jax.serving.app import make_app, make_server
        from moss_jax.serving.hub import Hub
        from moss_jax.serving.metrics import Metrics
        from moss_jax.serving.security import Gate, check_host, protection, read_tokens
    except ImportError as error:
        raise needs_extra(error) from error
    gin_bindings.parse([str(shipped("configs/serve.gin")), *args.gin_file], args.gin_param)
    selection = override(gin_bindings.settings(SelectionConfig), enabled=args.select or None)
    session = dataclasses.replace(gin_bindings.settings(SessionConfig), selection=selection)
    memory = override(gin_bindings.settings(MemoryConfig), policy=args.memory)
    engine_config = dataclasses.replace(gin_bindings.settings(EngineConfig), slots=args.slots, memory=memory)
    sampling = override(gin_bindings.settings(TokenSampling), seed=args.seed)
    server_config = gin_bindings.settings(ServerConfig)
    security = gin_bindings.settings(SecurityConfig)
    tokens = read_tokens(args.token_file, os.environ)
    check_host(args.host, tokens)
    mesh = parse_mesh(args.mesh) if args.mesh else None
    with command.on_stop_signal(command.leave):
        opened = open_model(
            args.checkpoint, weights=args.weights, encoder_weights=args.encoder_weights, mesh=mesh
        )
        engine = Engine(
            opened.model,
            opened.tokenizer,
            engine_config,
            sampling,
            perception_device=perception_device(args.perception_device),
        )
    hub = Hub(
        Scheduler(engine, SchedulerConfig(clock=args.clock or "realtime")),
        server_config,
        session=session,
        model=opened.name,
        state_folder=args.state_dir,
    )
    gate = Gate(security, tokens=tokens, host=args.host, origins=args.allow_origin)
    chat_config = override(gin_bindings.settings(ChatConfig), file_roots=args.media_root or None)
    completions = chat_completions.routes(hub, chat_config, gin_bindings.settings(FrameSampling))
    app = make_app(
        hub,
        middleware=[Middleware(logs.RequestLog), *protection(gate, args.allow_origin)],
        routes=[Metrics(hub, gate).route(), *completions],
        on_ready=lambda: command.tell("ready"),
    )
    server = make_server(app, hub, host=args.host, port=args.port)
    if args.json:
        # After uvicorn, which configures its own logging.
        logs.set_up()
    command.tell(f"{opened.name}\nhttp://{args.host}:{args.port}/ (compiling ...)")
    server.run()
    stopped_by = server.stopped_by
    code = command.SIGNALLED + signal.SIGTERM if stopped_by == signal.SIGTERM else 0
    if not server.started:
        return 1
    if not hub.was_ready:
        # Does not wait for a thread that may still be compiling.
        command.leave(stopped_by or 0)
    return code


def run_client(args: argparse.Namespace) -> int:
    """Plays a video to a live server and prints the events; returns the exit code."""
    if args.video is None:
        raise ConfigError("--connect needs a --video to show to the server")
    own = ("offline", "memory", "select", "checkpoint", "weights", "encoder_weights", "perception_device")
    for name in (*own, "clock", "save", "resume", "timeline", "state_dir", "mesh"):
        if getattr(args, name) not in (None, False):
            flag = {"resume": "continue"}.get(name, name.replace("_", "-"))
            raise ConfigError(f"--{flag} is decided by the server that --connect names")
    try:
        from moss_jax.serving.client import Client, ServerError, watch
    except ImportError as error:
        raise needs_extra(error) from error
    gin_bindings.parse([str(shipped("configs/serve.gin")), *args.gin_file], args.gin_param)
    sampling = override(gin_bindings.settings(FrameSampling), fps=args.fps)
    if is_live(args.video):
        frames = read_live(args.video, sampling)
    else:
        check_times(args.prompt, probe(args.video))
        frames = sample_file(args.video, sampling)
    options = {
        "instructions": args.system,
        "settings": {} if args.seed is None else {"sampling": {"seed": args.seed}},
        "token": own_token(args.token_file),
    }
    prompts = [(prompt.at, prompt.text) for prompt in args.prompt]
    try:
        with Client(args.connect, **options) as client, command.on_stop_signal(lambda _: client.finish()):
            session = client.session
            assert session is not None
            heading = f"{without_credentials(args.video)} · {args.connect}\n{session.model}\n"
            events = watch(client, frames, prompts)
            if args.json:
                command.tell(heading, end="")
                print_json(events, sys.stdout)
            else:
                console = command.PipeConsole(highlight=False)
                console.print(heading, style="dim", markup=False)
                print_transcript(events, console)
    except (ServerError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise ConfigError(f"{args.connect}: {error}") from error
    return 0


def own_token(path: Path | None) -> str | None:
    """The token that a client sends: the first in the file, or in `MOSS_TOKENS` if no file is given.

    Raises:
      ConfigError: the file cannot be read.
    """
    try:
        text = os.environ.get("MOSS_TOKENS", "") if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path} cannot be read: {error}") from error
    return next(iter(text.split()), None)


def needs_extra(error: ImportError) -> ConfigError:
    """The error for missing libraries of the server."""
    return ConfigError(
        f"this needs {error.name}, of the extra 'serve': pip install 'moss_jax[serve]'; or give a --video "
        "without --connect"
    )


def perception_device(index: int | None) -> "jax.Device | None":  # pyright: ignore[reportInvalidTypeForm]
    """The device that a flag names; None for the model's device."""
    if index is None:
        return None
    devices = jax.devices()
    if not 0 <= index < len(devices):
        raise ConfigError(f"--perception-device is a number from 0 to {len(devices) - 1} here, not {index}")
    return devices[index]


def show(stream: Stream, args: argparse.Namespace) -> None:
    """Runs a stream and prints its events, then draws the picture, even if the stream fails or is stopped."""
    try:
        if args.json:
            command.tell(stream.heading, end="")
            print_json(stream.events, sys.stdout)
        else:
            console = command.PipeConsole(highlight=False)
            console.print(stream.heading, style="dim", markup=False)
            print_transcript(stream.events, console)
    except OSError:
        # Events cannot be printed any more, but the stream must still run for the picture or the save.
        if stream.picture or args.save:
            collections.deque(stream.events, maxlen=0)
        raise
    finally:
        if stream.picture and stream.picture.events:
            stream.picture.save(args.timeline)


def save(session: Session, path: Path) -> None:
    """Saves the stream of a session and reports it."""
    at = session.save(path)
    command.tell(f"saved at {clock(at)}: --continue {path} resumes from there")


def tap[T](items: Iterable[T], keep: Callable[[T], None]) -> Iterator[T]:
    """Passes items through, calling `keep` on each first."""
    for item in items:
        keep(item)
        yield item


@dataclasses.dataclass
class Prompt:
    """A prompt and its stream time in seconds."""

    text: str
    at: float = 0.0


def check_times(prompts: list[Prompt], info: VideoInfo) -> None:
    """Checks that no prompt is later than the end of the clip.

    Raises:
      ConfigError: a prompt is too late.
    """
    last = max((p.at for p in prompts), default=0.0)
    if last > info.duration + 1e-3:
        raise ConfigError(f"--prompt-at {last:g} is beyond the clip, which lasts {info.duration:.1f} s")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; argparse exits with code 2 if it is invalid."""
    gin_bindings.parse([str(shipped("configs/serve.gin"))])
    settings = gin_bindings.settings
    parser = argparse.ArgumentParser(
        description="Watch a video and talk about it, or serve live streams.",
        epilog="Further settings are in configs/serve.gin; flags override them.",
        formatter_class=command.HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--video",
        metavar="FILE",
        help="video or image file, number of a camera, or address such as rtsp://host/path (default: none, "
        "this is the live server)",
    )
    add(
        "--connect",
        metavar="URL",
        help="live server to show the --video to, as http://127.0.0.1:8765 (default: none, the model runs "
        "here)",
    )
    add("--host", default="127.0.0.1", help="address that the live server listens at")
    add("--port", type=command.at_least(0), default=8765, help="port of the live server")
    add("--slots", type=command.at_least(1), default=4, help="streams that the live server runs at once")
    add(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="folder where the live server saves its streams, so that they continue after a restart "
        "(default: none)",
    )
    add(
        "--media-root",
        action="append",
        default=[],
        metavar="DIR",
        help="folder below which the live server reads the videos and images that file:// URLs of chat "
        "completions name; may be given several times (default: none)",
    )
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the tokens that clients of the live server may use, one a line; MOSS_TOKENS in the "
        "environment has further ones (default: none; required with a --host for other machines)",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="another origin whose pages may use the live server, as https://example.org",
    )
    add(
        "--mesh",
        metavar="AXIS=N",
        help="devices that the live server's model is split over, as tensor=2 (default: one device)",
    )
    add(
        "--prompt",
        action=AddPrompt,
        default=[],
        metavar="TEXT",
        help="prompt to the model; may be given several times (default: none, it watches unprompted)",
    )
    add(
        "--prompt-at",
        action=SetTime,
        type=float,
        metavar="SECONDS",
        help="time in the video of the --prompt before it (default: 0)",
    )
    add(
        "--fps",
        type=float,
        help=f"frames to sample per second of video (default: {settings(FrameSampling).fps:g})",
    )
    add(
        "--clock",
        choices=get_args(Clock),
        help="lockstep, the stream's own clock, or realtime, the wall clock (default: "
        f"{settings(SessionConfig).clock}; realtime for the live server)",
    )
    add("--offline", action="store_true", help="prefill the whole clip, then answer")
    add(
        "--memory",
        choices=(FULL, *POLICIES),
        help="what is kept of the frames when the memory bank is full; with full, the stream ends then "
        f"(default: {settings(MemoryConfig).policy})",
    )
    add("--select", action="store_true", help="do not show the model frames in which nothing has changed")
    add(
        "--checkpoint",
        metavar="DIR|REPO",
        help="folder in Hugging Face layout, or repo id as OWNER/NAME[@REVISION] (default: the small model "
        "that ships with the package)",
    )
    add(
        "--weights",
        choices=get_args(DecoderWeights),
        help="quantise the decoder's weights to 8 bits (default: as loaded)",
    )
    add(
        "--perception-device",
        type=int,
        metavar="N",
        help="index of another device, to encode the frames (default: the device that decodes)",
    )
    add(
        "--encoder-weights",
        choices=get_args(EncoderWeights),
        help="quantise the vision encoder to 8 bits (default: as loaded)",
    )
    add(
        "--system",
        metavar="TEXT",
        help="system prompt; empty for none (default: moss_jax.text.chat.SYSTEM_PROMPT, with --offline none)",
    )
    add("--seed", type=command.seed, help=f"seed of the sampling (default: {settings(TokenSampling).seed})")
    add(
        "--save",
        type=command.output_file,
        metavar="FILE",
        help="save the stream at its end, also after Ctrl-C or SIGTERM, for --continue",
    )
    add(
        "--continue",
        dest="resume",
        type=Path,
        metavar="FILE",
        help="continue a saved stream: the video follows what it has seen, and its clock continues",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object per event instead of a transcript; the live server logs in JSON",
    )
    add("--timeline", type=Path, metavar="FILE", help="draw frames, prompts and answers over time, as a .png")
    add("--gin_file", action="append", default=[], metavar="FILE", help="settings that override the defaults")
    add("--gin_param", action="append", default=[], metavar="BINDING", help="e.g. 'frames.fps = 2'")
    command.add_compilation_cache(parser)
    add("--verbose", action="store_true", help="log the choice of kernels")
    return parser.parse_args()


class AddPrompt(argparse.Action):
    """Adds a prompt at the start of the clip."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        namespace.prompt = [*namespace.prompt, Prompt(values)]


class SetTime(argparse.Action):
    """Sets the time of the preceding prompt."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        if not namespace.prompt:
            parser.error("--prompt-at must follow the --prompt that it belongs to")
        if not 0 <= values < float("inf"):
            parser.error(f"--prompt-at is a number of seconds from 0 on, not {values:g}")
        namespace.prompt[-1].at = values


def override[Settings: DataclassInstance](settings: Settings, **flags) -> Settings:
    """Replaces settings by flags of the same names, except those that are None.

    Raises:
      ConfigError: a flag is invalid.
    """
    try:
        return dataclasses.replace(settings, **{k: v for k, v in flags.items() if v is not None})
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error


if __name__ == "__main__":
    sys.exit(main())
