"""The serve command on real files, and with bad input; in a process of its own where that matters."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from rtsp import Camera, filming

import moss_jax
from moss_jax import serve
from moss_jax.config import FrameSampling
from moss_jax.stream import Counters, FrameSeen, Text, Turn
from moss_jax.stream.saved import read_stream
from moss_jax.video import sample_clip

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets" / "demo.mp4"
# A random model never stops talking.
SLOWLY = ["--gin_param", "session.tokens_per_second = 4", "--gin_param", "session.tail_seconds = 1"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model, tokenizer):
    """A checkpoint that loads and compiles quickly."""
    folder = moss_jax.save(tmp_path_factory.mktemp("checkpoint") / "small", model)
    tokenizer.save(folder)
    return folder


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "serve.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=options.pop("cwd", ROOT),
        **options,
    )


@pytest.fixture
def signals_restored():
    """Signals as they were; after one, the command keeps its handlers until the process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_here(monkeypatch, capfd):
    """`run_here(*arguments)` runs the command like `run`, but in this process, which has JAX imported."""

    def call(*arguments) -> subprocess.CompletedProcess:
        words = ["serve.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        capfd.readouterr()
        try:
            code = serve.main()
        except SystemExit as exit:
            code = exit.code
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


@pytest.fixture
def fails(run_here):
    """Runs the command on bad input; returns its message on stderr."""

    def call(*arguments) -> str:
        result = run_here(*arguments)
        assert result.returncode == 2, result
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        return result.stderr

    return call


def events_of(result: subprocess.CompletedProcess) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_lockstep_session_on_a_real_file_is_deterministic(checkpoint, tmp_path, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--json", "--seed", 3]
    arguments += ["--prompt", "What is there?", "--prompt", "And now?", "--prompt-at", "5.5"]
    arguments += ["--gin_file", ROOT / "configs" / "demo.gin", "--fps", "0.5"]
    arguments += ["--gin_param", "sampling.temperature = 0.8"]
    first = events_of(run_here(*arguments))
    second = events_of(run(*arguments, "--timeline", "session.png", cwd=tmp_path))
    assert [e | {"wall_time": 0} for e in first] == [e | {"wall_time": 0} for e in second]
    assert [e["prompt"] for e in first if e["type"] == "turn"] == ["What is there?", "And now?"]
    assert [e["time"] for e in first if e["type"] == "frame"] == list(map(float, range(0, 30, 2)))
    assert first[-1]["type"] == "end"
    assert first[-1]["reason"] == "finished"
    assert set(first[-1]["counters"]) == set(Counters.__dataclass_fields__)
    assert_is_picture(tmp_path / "session.png")


def assert_is_picture(path: Path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        # It has frames: the clip shows a wooden table, and nothing else in a timeline is brown.
        red, _, blue = np.moveaxis(np.asarray(image.convert("RGB"), int), -1, 0)
        assert (red - blue > 60).mean() > 0.02


def test_the_system_prompt_can_be_set(checkpoint, fails, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint]
    arguments += ["--gin_param", "engine.text_capacity = 60"]
    assert "text capacity is 60" in fails(*arguments)
    assert "can be at most 4096" in fails(*arguments[:-1], "engine.text_capacity = 100000")
    assert "text capacity is 60" in fails(*arguments, "--system", "watch " * 100)
    events = events_of(run_here(*arguments, *SLOWLY, "--system", "", "--json", "--fps", "0.25"))
    assert events[-1]["type"] == "end"


def test_offline_prefills_the_clip_and_then_answers(checkpoint, tmp_path, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--json", "--offline", "--prompt", "What?"]
    arguments += ["--weights", "int8", "--encoder-weights", "fp8"]
    events = events_of(run_here(*arguments, "--timeline", tmp_path / "session.png"))
    types = [e["type"] for e in events]
    assert types[:31] == ["frame"] * 30 + ["turn"]
    assert types[-1] == "end"
    assert_is_picture(tmp_path / "session.png")


def test_a_long_clip_is_seen_at_its_rate_unless_nothing_may_be_forgotten(checkpoint, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--json", "--offline", "--prompt", "What?"]
    arguments += ["--gin_param", "engine.bank_capacity = 16", "--fps", "2"]
    result = run_here(*arguments)
    assert [e["time"] for e in events_of(result) if e["type"] == "frame"] == [i / 2 for i in range(60)]
    # No bar: this is no terminal.
    assert len(result.stderr.splitlines()) == 2
    frames = [e["time"] for e in events_of(run_here(*arguments, "--memory", "full")) if e["type"] == "frame"]
    assert frames == pytest.approx([30 * i / 16 for i in range(16)])


def test_frames_that_cannot_be_decoded_are_told(checkpoint, tmp_path):
    with av.open(str(DEMO)) as container:
        wreck = [packet for packet in container.demux(video=0) if packet.size][30]
    path = tmp_path / "damaged.mp4"
    path.write_bytes(DEMO.read_bytes().replace(bytes(wreck), bytes(wreck.size)))
    arguments = ["--video", path, "--checkpoint", checkpoint, "--json", "--prompt", "What?", "--fps", "0.5"]
    result = run(*arguments, "--offline")
    events = events_of(result)
    (skipped,) = [event for event in events if event["type"] == "skipped"]
    assert (skipped["time"], skipped["count"]) == (pytest.approx(float(wreck.pts * wreck.time_base)), 1)
    assert sum(event["type"] == "frame" for event in events) == 15
    assert f"{path} is damaged: skipped 1 frame" in result.stderr


def test_the_transcript_has_a_heading_and_a_summary(checkpoint, run_here):
    result = run_here(
        "--video", DEMO, "--checkpoint", checkpoint, *SLOWLY, "--prompt", "What?", "--fps", "0.2"
    )
    assert result.returncode == 0, result.stderr
    assert "demo.mp4 · 448×448 · 30.0 s · 0.2 fps · lockstep" in result.stdout
    assert "  0:00  › What?" in result.stdout
    assert "6 frames" in result.stdout


def test_frames_in_which_nothing_changes_may_be_left_out(checkpoint, tmp_path, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, *SLOWLY, "--prompt", "What?", "--select"]
    *events, end = events_of(run_here(*arguments, "--json", "--timeline", tmp_path / "session.png"))
    frames = [event for event in events if event["type"] in ("frame", "unseen")]
    assert [event["time"] for event in frames] == list(range(30))
    unseen = [event for event in frames if event["type"] == "unseen"]
    assert {event["reason"] for event in unseen} == {"still"}
    assert 10 <= len(unseen) == end["counters"]["frames_still"] <= 25
    assert_is_picture(tmp_path / "session.png")
    result = run_here(*arguments, "--gin_param", "selection.max_fps = 4")
    assert "30.0 s · 1 to 4 fps · lockstep" in result.stdout
    assert re.search(r"\d+ frames still, \d+ frames above the rate", result.stdout)


def test_settings_of_the_selection_without_effect_are_refused(fails):
    def refused(*bindings: str, flags=()) -> str:
        return fails("--video", DEMO, *flags, *(f"--gin_param=selection.{binding}" for binding in bindings))

    message = refused("max_gap = 10", "min_change = 0.5")
    assert "selection.min_change, selection.max_gap have no effect" in message
    assert "only with --select; give it, too" in message
    message = refused("fps = 2", "max_fps = 4", flags=["--select"])
    assert "selection.fps has no effect: the rate of frames while nothing changes is --fps" in message
    assert "--select is for live streams" in refused(flags=["--select", "--offline", "--prompt", "What?"])


def test_a_full_bank_ends_no_stream_but_one_that_may_not_forget(checkpoint, run_here):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, *SLOWLY, "--fps", "2", "--json"]
    arguments += ["--gin_param", "engine.bank_capacity = 16", "--prompt", "And now?", "--prompt-at", "29"]
    *events, end = events_of(run_here(*arguments))
    assert [e["time"] for e in events if e["type"] == "frame"][-1] == 29.5
    assert end["reason"] == "finished"
    *events, late, end = events_of(run_here(*arguments, "--memory", "full"))
    assert [e["time"] for e in events if e["type"] == "frame"][-1] == 7.5
    assert (late["type"], late["prompt"], late["time"]) == ("not_asked", "And now?", 29.0)
    assert end["reason"] == "bank_capacity"


@pytest.mark.slow
def test_the_demo_corrects_itself_alerts_and_is_silent():
    result = subprocess.run(
        ["make", "--silent", "--always-make", "--dry-run", "demo"], capture_output=True, text=True, cwd=ROOT
    )
    command = next(part for part in result.stdout.split(".venv/bin/python ") if part.startswith("serve.py"))
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    events = events_of(run(*arguments, "--json"))
    said = "".join({"turn": "\n", "silence": "\n"}.get(e["type"], e.get("text", "")) for e in events)
    assert "a yellow ring and a card with - wait, now there is a blue circle" in said
    assert said.endswith("Now! The ring is gone.\n")
    alerts = [e["stream_time"] for e in events if e["type"] == "text" and e["stream_time"] > 25]
    assert 29 <= alerts[0] < 30
    spoken = {int(e["stream_time"]) for e in events if e["type"] == "text"}
    assert sum(second not in spoken for second in range(30)) >= 10


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "serve.py", "--video", DEMO, "--json", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_ends_a_realtime_stream_cleanly(checkpoint, tmp_path):
    picture = tmp_path / "session.png"
    process = start("--checkpoint", checkpoint, "--clock", "realtime", "--timeline", picture)
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    events = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert process.returncode == 0, errors
    assert events[-1]["reason"] == "stopped"
    assert re.fullmatch(r"compiling \.\.\.\ncompiling: \d+ s\ndemo\.mp4 .*\nsmall\n", errors)
    assert_is_picture(picture)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("signals_restored")
def test_a_signal_cuts_an_answer_offline_and_keeps_what_was_said(
    checkpoint, tmp_path, monkeypatch, capfd, number, code
):
    def answer_offline(engine, frames, prompt, **_):
        for index, frame in enumerate(frames):
            yield FrameSeen(stream_time=frame.time, wall_time=0.0, index=index, time=frame.time)
        yield Turn(stream_time=29.0, wall_time=0.0, prompt=prompt)
        yield Text(stream_time=29.0, wall_time=0.0, text="A")
        signal.raise_signal(number)
        while True:  # Until it is cut.
            yield Text(stream_time=29.0, wall_time=0.0, text=" card")

    monkeypatch.setattr(serve, "answer_offline", answer_offline)
    picture = tmp_path / "session.png"
    arguments = ["--offline", "--prompt", "What?", "--json", "--timeline", str(picture)]
    monkeypatch.setattr(
        sys, "argv", ["serve.py", "--video", str(DEMO), "--checkpoint", str(checkpoint), *arguments]
    )
    assert serve.main() == code
    out, err = capfd.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["type"] for event in events[:32]] == ["frame"] * 30 + ["turn", "text"]
    assert "Traceback" not in err
    assert_is_picture(picture)


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_a_closed_pipe_is_no_error(checkpoint, tmp_path, arguments):
    picture = tmp_path / "session.png"
    words = [sys.executable, "serve.py", "--video", DEMO, "--checkpoint", checkpoint, "--timeline", picture]
    command = shlex.join(map(str, [*words, *arguments])) + " | head -n 2"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == (2 if arguments else 0)
    assert_is_picture(picture)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_a_sentence_and_the_picture_is_drawn(checkpoint, tmp_path):
    picture = tmp_path / "session.png"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [
                *(sys.executable, "serve.py", "--video", DEMO, "--checkpoint", checkpoint),
                *(*SLOWLY, "--fps", "0.5", "--timeline", picture),
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "serve.py: the output: No space left on device"
    assert "Traceback" not in result.stderr
    assert_is_picture(picture)


@pytest.mark.slow
def test_events_print_where_the_terminal_has_no_unicode(checkpoint, tmp_path):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--fps", "0.2", "--prompt", "Où est 猫?"]
    # Without JAX's own settings, so that compiled programs are kept in the user's cache.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)}
    events = events_of(run(*arguments, "--json", env=environment))
    assert events[0]["prompt"] == "Où est 猫?"
    assert list((tmp_path / "moss_jax" / "compiled").iterdir())
    shown = run(*arguments, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert r"  0:00  \u203a O\xf9 est \u732b?" in shown.stdout
    assert "6 frames" in shown.stdout


def test_an_ip_camera_is_watched_until_it_hangs_up(checkpoint):
    """It films for two minutes, in which the command compiles, unless it is switched off."""
    greys = [np.full((48, 64, 3), 20 * (number % 10), np.uint8) for number in range(1200)]
    with filming(Camera(greys)) as url:
        arguments = ["--checkpoint", checkpoint, "--fps", "5", "--prompt", "What is there?"]
        process = start("--video", url, *arguments)
        lines = []
        while sum('"type": "frame"' in line for line in lines) < 5 and (line := process.stdout.readline()):
            lines.append(line)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    *events, end = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    times = [event["time"] for event in events if event["type"] == "frame"]
    assert len(times) >= 5
    assert times == sorted(set(times))
    assert [event["prompt"] for event in events if event["type"] == "turn"] == ["What is there?"]
    assert end["reason"] == "finished"
    assert "stream · live · 5 fps · realtime" in errors


def test_an_ip_camera_without_such_a_stream_is_a_sentence(checkpoint, fails):
    with filming(Camera([np.zeros((48, 64, 3), np.uint8)])) as url:
        message = fails("--video", f"{url}/other", "--checkpoint", checkpoint)
    assert f"{url}/other cannot be opened (server returned 404 not found)" in message


# --------------------------------------------------------------------------- saving and resuming


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[Path]:
    """Twelve seconds of the demo clip, and its two halves, without loss."""
    folder = tmp_path_factory.mktemp("films")
    frames = [frame.rgb for frame in sample_clip(DEMO, FrameSampling(max_frames=30))][:12]
    for name, part in (("whole", frames), ("first", frames[:6]), ("second", frames[6:])):
        with av.open(str(folder / f"{name}.mkv"), "w") as film:
            stream = film.add_stream("ffv1", rate=1)
            stream.height, stream.width = part[0].shape[:2]
            stream.pix_fmt = "bgr0"
            for rgb in part:
                film.mux(stream.encode(av.VideoFrame.from_ndarray(rgb).reformat(format="bgr0")))
            film.mux(stream.encode())
    return [folder / f"{name}.mkv" for name in ("whole", "first", "second")]


def test_a_saved_stream_goes_on_with_the_next_video(checkpoint, films, tmp_path, run_here):
    """In another process, in mid-answer, after compactions: as one stream of both videos."""
    whole, first, second = films
    path = tmp_path / "day.safetensors"
    common = ["--checkpoint", checkpoint, "--json", "--seed", 3]
    common += ["--gin_param", "sampling.temperature = 0.8", "--gin_param", "engine.bank_capacity = 4"]
    # No time for the last answer at the end of the first, so that it goes on where it was.
    common += ["--gin_param", "session.tail_seconds = 0", "--gin_param", "session.tokens_per_second = 6"]
    expected = events_of(
        run_here("--video", whole, *common, "--prompt", "What?", "--prompt", "And?", "--prompt-at", 8.5)
    )
    begun = run_here("--video", first, *common, "--prompt", "What?", "--save", path)
    assert begun.stderr.endswith(f"saved at 0:06: --continue {path} resumes from there\n")
    *before, end = events_of(begun)
    assert end["reason"] == "finished"
    went_on = run(
        *("--video", second, *common, "--prompt", "And?", "--prompt-at", 2.5),
        *("--continue", path, "--save", path, "--timeline", tmp_path / "session.png"),
    )
    after = events_of(went_on)
    assert f"continues {path} at 0:06" in went_on.stderr
    assert [e | {"wall_time": 0} for e in (*before, *after)] == [e | {"wall_time": 0} for e in expected]
    assert [e["time"] for e in after if e["type"] == "frame"] == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert sum(e["type"] == "text" for e in after) > 10
    assert read_stream(path).dialogue["start_time"] == 12.0


def test_sigterm_saves_the_stream(checkpoint, tmp_path):
    path = tmp_path / "day.safetensors"
    process = start(
        *("--checkpoint", checkpoint, "--clock", "realtime", "--save", path),
        *("--prompt", "What?", "--prompt", "And?", "--prompt-at", 20),
    )
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    events = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert process.returncode == 143, errors
    # It is not over, but its video is.
    assert not [e for e in events if e["type"] == "end"]
    assert [e["prompt"] for e in events if e["type"] == "not_asked"] == ["And?"]
    assert f"--continue {path} resumes from there" in errors
    stream = read_stream(path)
    assert stream.dialogue["counts"]["frames"] == sum(e["type"] == "frame" for e in events)
    assert stream.dialogue["start_time"] >= events[-1]["stream_time"]


def test_streams_that_cannot_go_on(fails, checkpoint, tmp_path, films, run_here):
    path = tmp_path / "day.safetensors"
    arguments = ["--video", films[1], "--checkpoint", checkpoint]
    assert f"there is no {path}" in fails(*arguments, "--continue", path)
    path.write_text("this is no stream " * 100)
    assert "is not a saved stream" in fails(*arguments, "--continue", path)
    assert "leave out --system" in fails(*arguments, "--continue", path, "--system", "Watch.")
    for flag in ("--save", "--continue"):
        assert "for live streams" in fails(*arguments, "--offline", "--prompt", "What?", flag, path)
    assert "cannot be written" in fails(*arguments, "--save", tmp_path)
    assert run_here(*arguments, "--save", path).returncode == 0
    message = fails(*arguments, "--continue", path, "--memory", "merge")
    assert "memory.policy is 'pyramid' there and 'merge' here" in message
    assert len(message.splitlines()) == 1
    message = fails("--video", films[1], "--continue", path)
    assert "open the checkpoint that it was saved with" in message


# ------------------------------------------------------------------------------------ bad input


def test_bad_videos(fails, tmp_path):
    empty, text, cut = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "cut.mp4"
    empty.touch()
    text.write_text("this is not a video " * 100)
    cut.write_bytes(DEMO.read_bytes()[: DEMO.stat().st_size // 2])
    for file in (tmp_path / "missing.mp4", tmp_path / ("x" * 300), empty, text, cut, tmp_path):
        message = fails("--video", file)
        assert str(file) in message
        assert len(message.splitlines()) == 1


def test_bad_numbers_and_times(fails):
    assert "fps must be a positive number" in fails("--video", DEMO, "--fps", "0")
    assert "fps must be a positive number" in fails("--video", DEMO, "--fps", "-2")
    late = fails("--video", DEMO, "--prompt", "hi", "--prompt-at", "30.5")
    assert "--prompt-at 30.5 is beyond the clip, which lasts 30.0 s" in late
    assert "must follow the --prompt" in fails("--video", DEMO, "--prompt-at", "1")
    assert "from 0 on" in fails("--video", DEMO, "--prompt", "hi", "--prompt-at=-1")
    wide = fails("--video", DEMO, "--gin_param", "engine.text_capacity = 10000")
    assert "engine.text_capacity can be at most 8192" in wide
    assert "serve.py: --fps must be" in fails("--video", DEMO, "--fps", "nan")
    assert "sampling.seed must be at least 0" in fails("--video", DEMO, "--gin_param", "sampling.seed = -1")


def test_a_recording_that_was_joined_is_as_long_as_its_parts(fails, tmp_path):
    with av.open(str(DEMO)) as source, av.open(str(tmp_path / "part.ts"), "w") as part:
        stream = part.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                part.mux(packet)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(2 * (tmp_path / "part.ts").read_bytes())
    late = fails("--video", joined, "--prompt", "hi", "--prompt-at", "60.5")
    assert "--prompt-at 60.5 is beyond the clip, which lasts 60.0 s" in late


def test_unknown_weights(fails):
    assert "argument --weights: invalid choice: 'int4'" in fails("--video", DEMO, "--weights", "int4")
    assert "argument --encoder-weights: invalid" in fails("--video", DEMO, "--encoder-weights", "int8")


def test_no_such_perception_device(fails):
    message = fails("--video", DEMO, "--perception-device", "7")
    assert "--perception-device is a number from 0 to" in message
    assert "not 7" in message


def test_bad_checkpoints(fails, tmp_path, checkpoint):
    assert "no such folder" in fails("--video", DEMO, "--checkpoint", tmp_path / "nothing")
    assert "no config.json" in fails("--video", DEMO, "--checkpoint", tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").unlink()
    assert "no tokenizer" in fails("--video", DEMO, "--checkpoint", broken)


def test_prompts_that_do_not_fit(fails, checkpoint):
    long = "what is this " * 2000
    for arguments in (
        ["--prompt", long],
        ["--prompt", long, "--prompt-at", "3"],
        ["--offline", "--prompt", long],
    ):
        assert "text capacity" in fails("--video", DEMO, "--checkpoint", checkpoint, *arguments)


def test_offline_wants_one_prompt_and_no_time(fails):
    assert "one --prompt" in fails("--video", DEMO, "--offline")
    assert "no meaning" in fails("--video", DEMO, "--offline", "--prompt", "a", "--prompt-at", "2")


def test_pictures_that_cannot_be_written(fails, tmp_path):
    assert "written as .png, not as session.jpg" in fails("--video", DEMO, "--timeline", "session.jpg")
    missing = tmp_path / "nowhere" / "session.png"
    assert f"{missing} cannot be written" in fails("--video", DEMO, "--timeline", missing)


def test_bad_gin(fails):
    assert "nearest valid name" in fails("--video", DEMO, "--gin_param", "session.clok = 'realtime'")
    assert "nowhere.gin" in fails("--video", DEMO, "--gin_file", "nowhere.gin")
