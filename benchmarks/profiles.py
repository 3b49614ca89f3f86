"""Profiles of programs: kernel time of a traced call by phase and part of the model."""

import collections
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

# Scopes that the model and the training step name.
PARTS = {
    "vision_encoder", "compressor", "projector", "keys_and_values", "remember", "self_layer", "cross_layer",
    "attention", "lm_head", "optimizer",
}  # fmt: skip


def name_operations() -> None:
    """Makes traces name every operation; call it before JAX uses a device.

    Kernels that XLA launches as CUDA graphs ("command buffers") have the name of the graph.
    """
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="


def device_ms(program: jax.stages.Compiled, call: Callable[[], object], calls: int = 2) -> dict[str, float]:
    """Milliseconds of device time of one call by phase and part, largest first.

    Kernels are attributed to the operation that XLA names them by: a fusion to its root. Over several
    devices the mean is returned.

    Args:
      call: runs the program once, and waits for it.
    """
    parts = {
        found[1]: part_of(found[2])
        for found in re.finditer(
            r'%?([\w.\-]+) = [^\n]*metadata=\{[^}\n]*op_name="([^"]+)"', program.as_text()
        )
    }
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    total: collections.Counter[str] = collections.Counter()
    for plane in data.planes:
        for event in (event for line in plane.lines for event in line.events):
            operation = dict(event.stats).get("hlo_op")
            if operation is not None:
                total[parts.get(str(operation), "other")] += event.duration_ns
    scale = 1e6 * calls * jax.device_count()
    return {part: nanoseconds / scale for part, nanoseconds in total.most_common()}


def part_of(operation: str) -> str:
    """Phase and part of an operation, such as "backward self_layer/attention", by its name in JAX."""
    found = dict.fromkeys(word for word in re.findall(r"\w+", operation) if word in PARTS)
    part = "/".join(found) or "other"
    if part == "optimizer":
        return part
    phase = "forward"
    if "rematted_computation" in operation:
        phase = "recompute"
    elif "transpose(" in operation:
        phase = "backward"
    return f"{phase} {part}"
