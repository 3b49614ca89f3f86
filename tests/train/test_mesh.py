"""Training on meshes of eight devices gives the losses of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# Mesh, micro-batches, remat. The second run saves a checkpoint, from which the last one resumes.
RUNS = [
    ((1, 1, 1), 1, "none"),
    ((2, 2, 1), 2, "full"),
    ((1, 4, 2), 2, "none"),
    ((2, 2, 2), 1, "full"),
]
# Of long streams.
SEGMENT_MESHES = [(1, 1, 1), (2, 2, 1)]
MESHES = [mesh for mesh, *_ in RUNS[1:]]
ROWS = 8  # of the batch
# Of losses: on another mesh sums have another order, with relative errors of some hundred times 2^-24. Twenty
# steps of Adam with its large eps do not amplify them much.
RTOL = 1e-4

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Without optimization it compiles faster.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def printed() -> dict:
    """The output of eight_devices.py."""
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("eight_devices.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps([RUNS, SEGMENT_MESHES])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(printed) -> dict:
    """The result of each run by its mesh."""
    return dict(zip([mesh for mesh, *_ in RUNS], printed["runs"], strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(results, mesh):
    """Also with micro-batches and with remat, which some of the runs have."""
    alone = results[1, 1, 1]["losses"]
    assert alone[-1] < 0.8 * alone[0]
    np.testing.assert_allclose(results[mesh]["losses"], alone, rtol=RTOL)


def test_a_run_resumes_on_another_mesh(results):
    losses, resumed = results[2, 2, 2]["losses"], results[2, 2, 2]["resumed_losses"]
    assert 0 < len(resumed) < len(losses)
    np.testing.assert_allclose(resumed, losses[-len(resumed) :], rtol=RTOL)


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_and_rows_are_sharded(results, mesh):
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
    assert results[mesh]["rows"] == [ROWS // (data * fsdp)] * (data * fsdp * tensor)


@pytest.mark.parametrize("mesh", MESHES)
def test_shardings_of_the_state(results, mesh):
    assert results[mesh]["moments_are_sharded_like_parameters"]
    assert results[mesh]["keeps_its_shardings"]


@pytest.mark.parametrize("mesh", MESHES)
def test_hidden_states_are_sharded_by_row(results, mesh):
    """They would not be if the embedding's sharding of the width propagated through the decoder."""
    assert not results[mesh]["has_hidden_states_of_the_whole_batch"]
    assert results[1, 1, 1]["has_hidden_states_of_the_whole_batch"]


def test_long_streams_have_the_losses_of_one_device(printed):
    alone, *others = printed["segments"]
    assert alone[-1] < 0.95 * alone[0]
    for losses in others:
        np.testing.assert_allclose(losses, alone, rtol=RTOL)


def test_a_seed_gives_the_same_parameters_on_any_mesh(printed):
    assert printed["same_initial_parameters"]
