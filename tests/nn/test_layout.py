"""Kernels in the layout that decodes fastest: the same maps, and the same model."""

import jax
import numpy as np
from flax import nnx

from moss_jax.nn import for_decoding
from moss_jax.nn.layers import Linear
from moss_jax.nn.quantize import PROJECTIONS
from moss_jax.ops.linear import decode_layout

TOLERANCE = 1e-4  # As the law's: of logits of order 1, for sums in another order.


def linears(module) -> dict[str, Linear]:
    return {".".join(map(str, path)): m for path, m in nnx.iter_modules(module) if isinstance(m, Linear)}


def test_elsewhere_the_decoder_stays_as_it_is(small_config, random_model):
    decoder = random_model(small_config()).decoder
    assert for_decoding(decoder) is decoder
    layouts = {platform: decode_layout(platform) for platform in ("cpu", "gpu", "tpu")}
    assert layouts == {"cpu": "inputs_first", "gpu": "outputs_first", "tpu": "inputs_first"}


def test_projections_are_copied_and_all_else_is_shared(small_config, random_model):
    decoder = random_model(small_config()).decoder
    before, after = linears(decoder), linears(for_decoding(decoder, "outputs_first"))
    changed = set()
    for name, linear in before.items():
        old, new = linear.weights, after[name].weights
        assert (old.layout, new.num_inputs) == ("inputs_first", old.num_inputs)
        if new.layout == old.layout:
            assert new.kernel is old.kernel
            continue
        changed.add(name.split(".")[-1])
        n, axes = old.num_inputs, linear.kernel.get_metadata()["axes"]
        np.testing.assert_array_equal(np.moveaxis(new.kernel, range(-n, 0), range(n)), old.kernel)
        assert after[name].kernel.get_metadata()["axes"] == (*axes[n:], *axes[:n])
        assert (new.inputs, new.outputs) == (old.inputs, old.outputs)
    assert changed == {name for names in PROJECTIONS.values() for name in names}


def test_it_is_the_same_model(small_config, random_model):
    model = random_model(small_config())
    arranged = for_decoding(model.decoder, "outputs_first")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 5), np.int32)
    state, count = model.init_state(2, text_capacity=8, bank_capacity=2), np.array([5, 3], np.int32)
    logits = []
    for decoder in (model.decoder, arranged):
        graph, params = nnx.split(decoder)

        @jax.jit
        def decode(params, graph=graph):
            decoder = nnx.merge(graph, params)
            return decoder.logits(decoder.decode(state, tokens, count)[0])

        logits.append(np.asarray(decode(params)))
    np.testing.assert_allclose(logits[1][0], logits[0][0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits[1][1, :3], logits[0][1, :3], rtol=0, atol=TOLERANCE)
