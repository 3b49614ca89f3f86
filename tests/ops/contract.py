"""The contract of all ops but attention: what an op's test file lists, and the checks that it gets for it."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import interpreted
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.definitions import UNIT, Rounded, exact

from moss_jax.ops.dispatch import Op
from moss_jax.ops.qarray import QArray

PLAIN = ("xla", "reference")
REPEATS = 20  # On a GPU, equal bit for bit.


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws arrays; they are zeros if `abstract`."""

    abstract: bool = False
    nan: bool = True
    rng: np.random.Generator = dataclasses.field(default_factory=lambda: np.random.default_rng(0))

    def __call__(self, *shape, dtype="bfloat16", size=1.0, centre=0.0) -> jax.Array:
        """Normal numbers."""
        if self.abstract:
            return jnp.zeros(shape, dtype)
        return jnp.asarray(centre + size * self.rng.standard_normal(shape, np.float32), dtype)

    def rows(self, *shape, dtype="bfloat16", size=1.0, centre=0.0) -> jax.Array:
        """Rows of different sizes: the second is zero, the fourth has a NaN if `nan`, the fifth is small."""
        if self.abstract:
            return jnp.zeros(shape, dtype)
        sizes = np.resize(np.float32([1, 0, 8, 1, 2e-3]), (math.prod(shape[:-1]), 1))
        x = size * sizes * (centre + self.rng.standard_normal((len(sizes), shape[-1]), np.float32))
        if len(x) > 3 and self.nan:
            x[3, shape[-1] // 3] = np.nan
        return jnp.asarray(x.reshape(shape), dtype)

    def weights(self, outputs: tuple, inputs: tuple, dtype, *, size=1.0, **scales) -> QArray:
        """Weights by which inputs as large as 1 become outputs of this size."""
        shape, scales = (*outputs, *inputs), {name: jnp.float32(scale) for name, scale in scales.items()}
        if self.abstract:
            return QArray(jnp.zeros(shape, dtype), jnp.zeros(outputs), **scales)
        codes = self.rng.integers(0, 256, shape, np.uint8)
        if jnp.dtype(dtype) == jnp.float8_e4m3fn:
            codes[codes % 128 == 127] = 0  # NaN.
        values = codes.view(dtype)
        size /= np.std(np.float32(values[:8])) * math.sqrt(math.prod(inputs))
        return QArray(jnp.asarray(values), jnp.float32(size * self.rng.uniform(0.5, 1.5, outputs)), **scales)


class Case:
    """A call.

    Attributes:
      kernel: an implementation that takes it, beside those in plain JAX; None for none.
      config: the kernel's; the kernel alone is tried with it.
      sizes: the keyword arguments of the contract's `make`.
    """

    def __init__(self, name: str, kernel: str | None = None, config: Any = None, **sizes):
        self.name, self.kernel, self.config, self.sizes = name, kernel, config, sizes
        self.implementations = [kernel] * (kernel is not None) + [*PLAIN] * (config is None)


class Contract:
    """The checks. A subclass names an op's implementations, and calls that they are tried on.

    Attributes:
      plain: implementations in plain JAX.
      rows: fields of the arguments that have one entry a row, on their first axes.
      keeps_float32: implementations that don't round results to the dtype of the stream between two steps.
      supports_vjp: kernels that do.
      cases: small calls of all implementations; kernels run interpreted on the CPU. Gradients are tested with
        those in float32 and, of kernels, with the first of each.
      real: calls of real size for a GPU, of the implementation that is chosen there.
      unsupported: kernel, sizes, and why the kernel does not take them.
    """

    op: Op
    plain: Sequence[str | None] = (None, *PLAIN)
    rows: Sequence[str] = ("x",)
    keeps_float32: Sequence[str] = ()
    supports_vjp: Sequence[str] = ()
    cases: Sequence[Case]
    real: Sequence[Case]
    unsupported: Sequence[tuple[str, dict[str, Any], str]]

    def make(self, draw: Draw, **sizes) -> Any:
        """Arguments of a call."""
        raise NotImplementedError

    def define(self, a: Any, kept: jnp.dtype) -> Rounded | tuple[Rounded, ...]:
        """Results in float64, for an implementation that rounds to `kept` between two steps."""
        raise NotImplementedError

    def arrays(self, y: Any) -> list[jax.Array]:
        """The arrays of a result."""
        return jax.tree.leaves(y)

    def sample(self, a: Any, y: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        """Some rows of a call and of its results, which fall on every place of a tile."""
        index = np.arange(len(y[0]) - 1, -1, -61)

        def of(x):
            return x[index] if x.shape[:1] == y[0].shape[:1] else x

        rows = {name: jax.tree.map(of, getattr(a, name)) for name in self.rows}
        return dataclasses.replace(a, **rows), [x[index] for x in y]

    def check(self, a: Any, y: list[jax.Array], implementation: str) -> None:
        """Raises AssertionError unless results are right, and have the right dtypes and shapes."""
        like = jax.eval_shape(lambda a: self.arrays(self.op(a, implementation="reference")), a)
        assert [(x.shape, x.dtype) for x in y] == [(x.shape, x.dtype) for x in like]
        wide = implementation in ("reference", *self.keeps_float32) or y[-1].dtype == jnp.float32
        expected = self.define(a, jnp.dtype("float32" if wide else "bfloat16"))
        for found, rounded in zip(y, expected if isinstance(expected, tuple) else (expected,), strict=True):
            rounded.check(found)

    def abstract(self, **sizes) -> Any:
        return jax.eval_shape(lambda: self.make(Draw(abstract=True), **sizes))

    def pytest_generate_tests(self, metafunc):
        if "implementation" in metafunc.fixturenames:
            tried = [(case, name) for case in self.cases for name in case.implementations]
            ids = [f"{case.name}, {name}" for case, name in tried]
            metafunc.parametrize(("case", "implementation"), tried, ids=ids)
        elif "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.real, ids=lambda case: case.name)

    def test_results(self, case, implementation):
        a = self.make(Draw(), **case.sizes)
        call = functools.partial(self.op, implementation=implementation)
        if case.config is not None:  # It fits smaller sizes than the default, which `unsupported` is about.
            call = functools.partial(self.op.implementations[implementation].apply, config=case.config)
        with on_cpu(implementation):
            y = jax.jit(call)(a)
        self.check(a, self.arrays(y), implementation)

    def test_in_float32(self):
        """Under vmap; and gradients are those of the reference."""
        for case in self.cases:
            a = self.make(Draw(nan=False), **case.sizes)
            out = jax.eval_shape(lambda a: self.arrays(self.op(a)), a)[-1]
            if out.dtype != jnp.float32 or any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(a)):
                continue
            leaves, structure = jax.tree.flatten({name: getattr(a, name) for name in self.rows})
            axes = [0 if x.ndim else None for x in leaves]

            def each(*leaves, a=a, structure=structure):
                return self.arrays(self.op(dataclasses.replace(a, **structure.unflatten(leaves))))

            twice = [jnp.stack([x, x]) if x.ndim else x for x in leaves]
            self.check(a, [y[1] for y in jax.jit(jax.vmap(each, axes))(*twice)], "xla")
            pulls = (jax.jit(functools.partial(self.pull, implementation=name)) for name in PLAIN)
            for x, expected in zip(*(pull(a)[1] for pull in pulls), strict=True):
                # For some float32 sums after each other, of some hundred products each.
                np.testing.assert_allclose(x, expected, rtol=0, atol=2000 * UNIT * jnp.abs(expected).max())

    def test_gradients_of_kernels(self):
        """Those of the definition bit for bit, so that training computes the same on all platforms."""
        for kernel in self.supports_vjp:
            case = next(case for case in self.cases if case.kernel == kernel)
            a = self.make(Draw(nan=False), **case.sizes)
            with on_cpu(kernel):
                y, found = self.pull(a, kernel)
            self.check(a, y, "xla")
            for x, expected in zip(found, self.pull(a, "xla")[1], strict=True):
                assert x.dtype == expected.dtype
                np.testing.assert_array_equal(exact(x), exact(expected))

    def rebuild(self, a: Any) -> Any:
        """The call with what is computed from its other arrays computed again, for gradients."""
        return a

    def pull(self, a: Any, implementation: str) -> tuple[list[jax.Array], list[jax.Array]]:
        """Results, and gradients in all arrays of floats of more than 8 bits."""
        leaves, structure = jax.tree.flatten(a)
        which = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating) and x.itemsize > 1]

        def run(floats):
            given = dict(enumerate(leaves)) | dict(zip(which, floats, strict=True))
            call = self.rebuild(structure.unflatten(given.values()))
            return self.arrays(self.op(call, implementation=implementation))

        y, pull = jax.vjp(run, [leaves[i] for i in which])
        rng = np.random.default_rng(1)
        (gradients,) = pull([jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in y])
        return y, gradients

    def test_choices(self):
        """Kernels where they can, lowered as far as that goes without a GPU; reasons where they cannot."""
        calls = []
        for case in self.real:
            a = self.abstract(**case.sizes)
            assert [self.op.choose(a, platform=p) for p in ("cpu", "tpu")] == ["xla", "xla"]
            assert self.op.choose(a, platform="gpu") == (case.kernel or "xla"), case.name
            calls += [(case.kernel, a)] * (case.kernel not in self.plain)
        for kernel, sizes, reason in self.unsupported:
            message = f"{self.op.name} implementation {kernel!r} cannot be used: {reason}"
            a = self.abstract(**sizes)
            with refuses(message):
                self.op.choose(a, kernel, "gpu")
            assert self.op.choose(a, platform="gpu") != kernel

        def run(arguments):
            return [
                self.op.implementations[kernel].apply(a)
                for (kernel, _), a in zip(calls, arguments, strict=True)
            ]

        program = jax.jit(run).trace([a for _, a in calls]).lower(lowering_platforms=("cuda",))
        assert program.as_text().count("@mosaic_gpu") == len(calls)

    @pytest.mark.gpu
    def test_real_sizes(self, case):
        """Right, and always the same bit for bit."""
        a = self.make(Draw(), **case.sizes)
        run = jax.jit(functools.partial(self.op, implementation=case.kernel or "xla"))
        y = self.arrays(run(a))
        self.check(*self.sample(a, y), case.kernel or "xla")
        for _ in range(REPEATS):
            for x, again in zip(y, self.arrays(run(a)), strict=True):
                assert bool(((x == again) | (x != x)).all())


def on_cpu(implementation: str) -> contextlib.AbstractContextManager:
    """On a CPU, kernels for a GPU are interpreted."""
    if implementation in PLAIN or jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    return interpreted.on_gpu()


def refuses(message: str):
    """A call inside raises ValueError with this in its message."""
    return pytest.raises(ValueError, match=re.escape(message))
