"""Training on meshes of eight devices gives the losses of one device, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Mesh, parts that the batch is taken in, remat.
RUNS = [
    ((1, 1, 1), 1, "none"),
    ((8, 1, 1), 1, "none"),
    ((1, 8, 1), 1, "none"),
    ((2, 4, 1), 1, "none"),
    ((1, 4, 2), 2, "none"),
    ((2, 2, 2), 1, "full"),
]
MESHES = [mesh for mesh, *_ in RUNS[1:]]
ROWS = 8  # of the batch

ROOT = Path(__file__).parents[2]
# Quicker to compile.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def printed() -> dict:
    """What the program says."""
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(RUNS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(printed) -> dict:
    """What came of each run, by its mesh."""
    return dict(zip([mesh for mesh, *_ in RUNS], printed["runs"], strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(results, mesh):
    """Also in accumulated parts and with remat, which some of the runs have."""
    alone = results[1, 1, 1]["losses"]
    assert alone[-1] < 0.8 * alone[0]
    np.testing.assert_allclose(results[mesh]["losses"], alone, atol=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_are_split(results, mesh):
    data, fsdp, tensor = mesh
    parts = results[mesh]["parts"]
    both = [
        "decoder/layers/0/attention/qkv/kernel",
        "decoder/layers/1/attention/kv/kernel",
        "decoder/lm_head/kernel",
    ]
    both += ["vision/layers/0/mlp/fc1/kernel", "vision/layers/0/attention/out/kernel"]
    assert {parts[name] for name in both} == {fsdp * tensor}
    assert parts["decoder/embedding"] == fsdp
    assert parts["vision/layers/0/mlp/fc1/bias"] == tensor
    assert parts["decoder/norm/weight"] == 1
    assert results[mesh]["rows"] == [ROWS // (data * fsdp)] * 8


@pytest.mark.parametrize("mesh", MESHES)
def test_a_state_lies_as_planned(results, mesh):
    assert results[mesh]["moments_lie_as_parameters"]
    assert results[mesh]["stays_where_it_is_put"]


@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_holds_the_hidden_states_of_the_whole_batch(results, mesh):
    """As it would if the embedding's split of the width went through the decoder."""
    assert not results[mesh]["holds_the_whole_batch"]
    assert results[1, 1, 1]["holds_the_whole_batch"]


def test_a_seed_gives_the_same_parameters_on_any_mesh(printed):
    assert printed["same_at_first"]
