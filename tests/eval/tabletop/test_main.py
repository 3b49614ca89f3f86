"""The command line of the tabletop evaluation."""

import json

from moss_jax.convert import save
from moss_jax.eval.tabletop.__main__ import main
from moss_jax.shipped import shipped


def test_the_command_with_a_random_model(model, tmp_path, capsys):
    save(tmp_path / "random", model, tokenizer=shipped("moss-tiny") / "tokenizer.json")
    out = tmp_path / "out" / "scores.json"
    settings = {"checkpoint": tmp_path / "random", "json": out, "seed": 4, "streams": 3, "blind-streams": 1}
    settings |= {"seconds": 10, "slots": 2, "tokens-per-second": 2}
    settings |= {"weights": "int8", "encoder-weights": "fp8"}
    assert main([f"--{name}={value}" for name, value in settings.items()]) == 0
    result = json.loads(out.read_text())
    assert (result["checkpoint"], result["seed"]) == ("random", 4)
    assert (result["streams"], result["seconds"]) == (3, 10)
    assert result["accuracy"]["n"] >= result["offline"]["accuracy"]["n"]
    assert result["offline"]["accuracy"]["n"] == result["offline"]["streaming_accuracy"]["n"]
    assert result["blind"]["streams"] == 1
    assert (result["weights"], result["encoder_weights"]) == ("int8", "fp8")
    assert result["times_real_time"] > 0
    assert "accuracy" in result["blind"]
    assert "alerts: F1" in capsys.readouterr().out


def test_a_missing_checkpoint_is_reported(tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
