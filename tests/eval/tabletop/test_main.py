"""The command line of the tabletop evaluation."""

import json

import pytest

from moss_jax.convert import save
from moss_jax.eval.tabletop.__main__ import main
from moss_jax.eval.tabletop.evaluation import encoded
from moss_jax.shipped import shipped
from moss_jax.stream import FrameSeen, FrameUnseen


def test_the_command_with_a_random_model(model, tmp_path, capsys):
    save(tmp_path / "random", model, tokenizer=shipped("moss-tiny") / "tokenizer.json")
    out = tmp_path / "out" / "scores.json"
    settings = {"checkpoint": tmp_path / "random", "json": out, "seed": 10, "streams": 3, "blind-streams": 1}
    settings |= {"seconds": 10, "slots": 2, "tokens-per-second": 2}
    settings |= {"last": 7, "policy": "merge", "budget": 6, "text-capacity": 256}
    settings |= {"weights": "int8", "encoder-weights": "fp8"}
    settings |= {"bank-dtype": "int8", "text-dtype": "fp8", "event-rate": "0.01,0.02", "max-gap": 20}
    assert main(["--select", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    result = json.loads(out.read_text())
    assert (result["checkpoint"], result["seed"]) == ("random", 10)
    assert (result["streams"], result["seconds"], result["last"]) == (3, 10, 7)
    assert (result["policy"], result["frames"], result["text_capacity"]) == ("merge", 6, 256)
    # In whole streams, nothing is due at 17 frames.
    assert result["silence"]["n"] == 10
    assert result["accuracy"]["n"] >= result["offline"]["accuracy"]["n"]
    assert result["offline"]["accuracy"]["n"] == result["offline"]["streaming_accuracy"]["n"]
    assert result["blind"]["streams"] == 1
    assert (result["weights"], result["encoder_weights"]) == ("int8", "fp8")
    assert result["times_real_time"] > 0
    assert "accuracy" in result["blind"]
    assert (result["bank_dtype"], result["text_dtype"]) == ("int8", "fp8")
    assert result["event_rate"] == [0.01, 0.02]
    assert (result["selection"]["enabled"], result["selection"]["max_gap"]) == (True, 20)
    # Hardly anything happens, so little more than the first frames are encoded.
    assert result["encoded"]["n"] == 30
    assert 0.1 <= result["encoded"]["value"] < 0.5
    out = capsys.readouterr().out
    assert "alerts: F1" in out
    assert "frames encoded" in out


def test_narrations_of_whole_streams(model, tmp_path):
    save(tmp_path / "random", model, tokenizer=shipped("moss-tiny") / "tokenizer.json")
    out = tmp_path / "scores.json"
    settings = {"checkpoint": tmp_path / "random", "json": out, "streams": 2, "seconds": 20, "slots": 1}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["--narrated", "--skip-offline", "--skip-blind", *flags]) == 0
    result = json.loads(out.read_text())
    assert result["narrated"]
    assert result["accuracy"]["n"] == 0
    assert result["narration"]["recall"]["n"] > 0


def test_the_share_of_frames_encoded():
    def frame(kind, **reason):
        return kind(slot=0, stream_time=0.0, wall_time=0.0, index=0, time=0.0, **reason)

    unseen = [frame(FrameUnseen, reason=reason) for reason in ("still", "rate", "alike")]
    ratio = encoded([[frame(FrameSeen), *unseen], [frame(FrameSeen)]])
    assert (ratio.hits, ratio.total) == (3, 5)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--event-rate=0.1", "must be two numbers, LOW,HIGH, not '0.1'"),
        ("--event-rate=0.5,0.1", "must be a range within (0, 1], not 0.5,0.1"),
        ("--max-gap=0", "must be positive, not 0"),
        ("--max-gap=soon", "must be a number of seconds, not 'soon'"),
    ],
)
def test_bad_flags_are_refused(flag, message, capsys):
    with pytest.raises(SystemExit):
        main([flag])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-gap=10"], "--max-gap has no effect without --select; give both, or leave it out"),
        (["--last=33"], "--last 33 exceeds the 32 s of a stream; give at most that"),
        (["--blind-streams=1", "--skip-blind"], "--blind-streams has no effect with --skip-blind"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint_is_reported(tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
