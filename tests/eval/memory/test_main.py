"""The command line of the evaluation of memory."""

import json

import pytest
from PIL import Image

from moss_jax.convert import save
from moss_jax.eval.memory.__main__ import main
from moss_jax.shipped import shipped


def run(**settings) -> int:
    return main([f"--{name.replace('_', '-')}={value}" for name, value in settings.items()])


def test_the_command_with_a_random_model(model, tmp_path, capsys):
    save(tmp_path / "random", model, tokenizer=shipped("moss-tiny") / "tokenizer.json")
    out = tmp_path / "out"
    files = {"json": out / "memory.json", "figure": out / "memory.png"}
    # A bank of four frames is that of the baselines, whose programs are then compiled already.
    settings = {"minutes": 0.1, "streams": 1, "seed": 1, "past": 0.2, "policy": "window", "budget": 4}
    settings |= {"old": 0.5, "quiet": 0.01}
    assert run(checkpoint=tmp_path / "random", **files, **settings) == 0
    result = json.loads(files["json"].read_text())
    assert (result["old"], result["quiet"]) == (0.5, 0.01)
    assert (result["checkpoint"], result["seed"], result["minutes"]) == ("random", 1, 0.1)
    assert [run["memory"] for run in result["runs"]] == ["window", "full", "empty bank", "recent-4"]
    for found in result["runs"]:
        assert found["by_age"].keys() == result["constant_guess"]["by_age"].keys()
        assert found["all"]["total"] == result["constant_guess"]["all"]["total"] > 0
        assert not found.get("streams_cut_short")
    with Image.open(files["figure"]) as figure:
        assert figure.format == "PNG"
    printed = capsys.readouterr().out
    assert "age of the evidence" in printed
    assert "window 4" in printed


@pytest.mark.slow
def test_what_the_shipped_model_remembers(tmp_path):
    settings = {"minutes": 0.5, "streams": 3, "slots": 2, "past": 0.2, "policy": "merge", "budget": 8}
    assert run(json=tmp_path / "memory.json", **settings, bank_dtype="int8", render_processes=1) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    runs = {(run["memory"], run["frames"], run["bank_dtype"]): run for run in result["runs"]}
    names = ("merge", 8, "int8"), ("window", 8, "int8"), ("full", 30, None)
    four, empty, recent = ("window", 4, None), ("empty bank", 4, None), ("recent-4", 4, None)
    assert list(runs) == [*names, four, empty, recent]
    sizes = {name: found["bank_bytes"] for name, found in runs.items()}
    assert sizes["merge", 8, "int8"] == sizes["window", 8, "int8"] < 2 * sizes[recent]
    assert 4 * sizes["full", 30, None] == 30 * sizes[recent]
    right = {name: found["all"]["right"] for name, found in runs.items()}
    assert right["full", 30, None] >= right[four] > right[empty]
    assert right[recent] > right[empty]
    assert runs["full", 30, None]["last_minute"]["accuracy"]["value"] > 0.8


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--policy=merge,heap", "must be one of window, pyramid, merge, not 'heap'"),
        ("--bank-dtype=int4", "must be one of none, int8, fp8, not 'int4'"),
        ("--budget=8,0", "must be at least 1, not 0"),
        ("--minutes=nan", "must be at least a second"),
        ("--past=1.5", "must be between 0 and 1"),
        ("--quiet=-1", "must be between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense(flag, message, capsys):
    with pytest.raises(SystemExit):
        main([flag])
    assert message in capsys.readouterr().err


def test_a_bank_that_is_too_small_is_refused_before_anything_runs(capsys):
    assert run(policy="pyramid", budget=2, minutes=0.1, streams=1) == 2
    assert "is too small for a pyramid" in capsys.readouterr().err
