"""The serve command: on real files in a process of its own, and with bad input."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import moss_jax
from moss_jax import serve
from moss_jax.stream import Counters

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets" / "demo.mp4"


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


def events_of(result: subprocess.CompletedProcess) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_a_lockstep_session_on_a_real_file_is_deterministic(checkpoint, tmp_path):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--json", "--seed", 3]
    arguments += ["--prompt", "What is there?", "--prompt", "And now?", "--prompt-at", "5.5"]
    arguments += ["--gin_file", ROOT / "configs" / "demo.gin", "--fps", "0.5"]
    arguments += ["--gin_param", "sampling.temperature = 0.8"]
    first = events_of(run(*arguments, cwd=tmp_path))
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


def test_the_system_prompt_can_be_set(checkpoint, fails):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint]
    arguments += ["--gin_param", "engine.text_capacity = 60"]
    assert "text capacity is 60" in fails(*arguments)
    assert "can be at most 4096" in fails(*arguments[:-1], "engine.text_capacity = 100000")
    assert "text capacity is 60" in fails(*arguments, "--system", "watch " * 100)
    events = events_of(run(*arguments, "--system", "", "--json", "--fps", "0.25"))
    assert events[-1]["type"] == "end"


def test_offline_prefills_the_clip_and_then_answers(checkpoint, tmp_path):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--json", "--offline", "--prompt", "What?"]
    arguments += ["--weights", "int8", "--encoder-weights", "fp8"]
    events = events_of(run(*arguments, "--timeline", tmp_path / "session.png"))
    types = [e["type"] for e in events]
    assert types[:31] == ["frame"] * 30 + ["turn"]
    assert types[-1] == "end"
    assert_is_picture(tmp_path / "session.png")


def test_the_transcript_has_a_heading_and_a_summary(checkpoint):
    result = run("--video", DEMO, "--checkpoint", checkpoint, "--prompt", "What?", "--fps", "0.2")
    assert result.returncode == 0, result.stderr
    assert "demo.mp4 · 448×448 · 30.0 s · 0.2 fps · lockstep" in result.stdout
    assert "  0:00  › What?" in result.stdout
    assert "6 frames" in result.stdout


def test_a_full_bank_is_no_end_of_the_clip(checkpoint):
    arguments = ["--video", DEMO, "--checkpoint", checkpoint, "--fps", "10", "--json"]
    arguments += ["--prompt", "And now?", "--prompt-at", "29"]
    *events, late, end = events_of(run(*arguments))
    assert [e["time"] for e in events if e["type"] == "frame"][-1] == 25.5
    assert (late["type"], late["prompt"], late["time"]) == ("not_asked", "And now?", 29.0)
    assert end["reason"] == "bank_capacity"


def test_the_demo_corrects_itself_alerts_and_is_silent():
    result = subprocess.run(
        ["make", "--silent", "--always-make", "--dry-run", "demo"], capture_output=True, text=True, cwd=ROOT
    )
    command = next(part for part in result.stdout.split(".venv/bin/python ") if part.startswith("serve.py"))
    _, *arguments = shlex.split(command.replace("\\\n", " "))
    events = events_of(run(*arguments, "--json"))
    said = "".join({"turn": "\n", "silence": "\n"}.get(e["type"], e.get("text", "")) for e in events)
    assert "I see a yellow ring and a card with - wait, now there is a blue circle" in said
    assert said.endswith("Now! The ring is gone.\n")
    alerts = [e["stream_time"] for e in events if e["type"] == "text" and e["stream_time"] > 25]
    assert 29 <= alerts[0] < 30
    spoken = {int(e["stream_time"]) for e in events if e["type"] == "text"}
    assert sum(second not in spoken for second in range(30)) >= 10


def test_ctrl_c_ends_a_realtime_stream_cleanly(checkpoint, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "serve.py",
            "--video",
            DEMO,
            "--checkpoint",
            checkpoint,
            "--clock",
            "realtime",
            "--json",
            "--timeline",
            tmp_path / "session.png",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    events = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    assert process.returncode == 0, errors
    assert events[-1]["reason"] == "stopped"
    assert "Traceback" not in errors
    assert_is_picture(tmp_path / "session.png")


def test_a_closed_pipe_is_no_error(checkpoint):
    command = f"{sys.executable} serve.py --video {DEMO} --checkpoint {checkpoint} --json | head -n 2"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


# ------------------------------------------------------------------------------------ bad input


@pytest.fixture
def fails(monkeypatch, capfd):
    """Runs the command in this process; returns its message on stderr."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
        try:
            code = serve.main()
        except SystemExit as exit:
            code = exit.code
        out, err = capfd.readouterr()
        assert code == 2, (code, out, err)
        assert "Traceback" not in err
        assert out == ""
        return err

    return call


def test_bad_videos(fails, tmp_path):
    empty, text, cut = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "cut.mp4"
    empty.touch()
    text.write_text("this is not a video " * 100)
    cut.write_bytes(DEMO.read_bytes()[: DEMO.stat().st_size // 2])
    for file in (tmp_path / "missing.mp4", empty, text, cut, tmp_path):
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
