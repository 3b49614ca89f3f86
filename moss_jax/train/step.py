"""The training step: one jitted program over a mesh of devices.

Parameters are flat dicts by name (`decoder/layers/0/attention/qkv/kernel`), one of the trained and one of the
frozen parameters. The optimizer sees only the first.

B sequences, S tokens, F frames, A micro-batches
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from moss_jax.config import ConfigError, ModelConfig, OptimizerConfig, SegmentsConfig, TrainConfig
from moss_jax.data.batch import Batch
from moss_jax.memory import StreamState
from moss_jax.nn import MossVideo
from moss_jax.sharding import RULES, gather, named_sharding, row_share, sum_replicas
from moss_jax.train.losses import LOSS_TERMS, Targets, cross_entropy, find_targets, mean_over, token_losses
from moss_jax.train.optimizer import learning_rate, make_optimizer
from moss_jax.train.segments import empty_memory, make_memories, run_segments
from moss_jax.video import preprocess

# Maximum logits in memory per device: 1 GiB of float32. More are computed in chunks.
MAX_LOGITS = 2**28
# Names of the lists of layers, which remat recomputes one by one.
LAYERS = {"layers", "global_layers"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The input and output of a step.

    Attributes:
      step: number of steps done.
      trained: float32 master weights of the trained parameters.
      frozen: the other parameters, in the compute dtype.
      optimizer: optimizer state of the trained parameters.
      memory: memory of the streams that the next batch continues; None if batches are whole sequences.
    """

    step: Int[Array, ""]
    trained: dict[str, Float[Array, "..."]]
    frozen: dict[str, Float[Array, "..."]]
    optimizer: Any
    memory: StreamState | None = None


class Trainer:
    """Trains a model on a mesh.

    Holds no parameters: `init` or `adopt` creates a state, `step` maps one to the next.

    Args:
      model_config: its `remat` bounds the memory of the step.
      train: settings of the run.
      optimizer: settings of the optimizer.
      mesh: from `sharding.make_mesh`.
      silence_id: id of the tokenizer's `<|silence|>`.
      segments: settings for batches of segments of long streams; None for batches of whole sequences.

    Attributes:
      step: `step(state, batch) -> (state, metrics)`, one jitted optimizer step, which donates its state.
        Metrics are float32 scalars on the device: `loss`, the weighted loss that is minimised; the mean
        cross-entropies `loss_text`, `loss_silence` and `loss_after_silence`, and the numbers of their
        targets, `targets_text`, `targets_silence` and `targets_after_silence`; the mean of each additional
        loss term over all targets, by its name; `grad_norm` before clipping, and of each trained part of the
        model `grad_norm/PART` and `param_norm/PART`, the norm of its new parameters; `learning_rate`; and the
        numbers of `targets`, `tokens` and `frames`. A loss without targets is 0 (`losses.count_of`).
      shardings: sharding of each array of a state, as a `TrainState`; one for all of its memory.

    Raises:
      ConfigError: the mesh or the memories of `segments` do not divide the batch, there is nothing to train,
        or a loss term is unknown.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        train: TrainConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        *,
        silence_id: int,
        segments: SegmentsConfig | None = None,
    ):
        self.model_config = model_config
        self.config = train
        self.mesh = mesh
        self.silence_id = silence_id
        self._check_rows(train.batch_size)
        self.segments = segments
        if segments:
            self._memories = make_memories(segments, model_config)
            if train.accumulate > 1 or train.batch_size % len(self._memories):
                raise ConfigError(
                    f"train.batch_size must be a multiple of the {len(self._memories)} segments.memories "
                    f"and train.accumulate 1; got {train.batch_size} and {train.accumulate}"
                )
        if unknown := [name for name, _ in train.loss_terms if name not in LOSS_TERMS]:
            raise ConfigError(
                f"train.loss_terms must be some of {', '.join(LOSS_TERMS)}; got {', '.join(unknown)}"
            )
        self._terms = {"cross_entropy": cross_entropy} | {
            name: LOSS_TERMS[name] for name, _ in train.loss_terms
        }
        self._dtype = jnp.dtype(train.compute_dtype)
        self._optimizer = make_optimizer(optimizer, train.steps)
        self._learning_rate = learning_rate(optimizer, train.steps)

        self._graph, params = nnx.split(nnx.eval_shape(lambda: MossVideo(model_config, rngs=nnx.Rngs(0))))
        self._variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(params)}
        abstract = self.abstract()
        if not abstract.trained:
            raise ConfigError(f"trainable names only parts without parameters: {', '.join(train.trainable)}")
        # With tensor parallelism, the compiler partitions the step. Otherwise each device computes its rows
        # as if alone, with the kernels of one device, and gathers parameters layer by layer.
        self._by_device = mesh.size > 1 and mesh.shape["tensor"] == 1
        if segments:
            # Rows cycle through the memories, so those of a device must be whole cycles.
            share = train.batch_size // math.prod(mesh.shape[axis] for axis in RULES["batch"])
            self._by_device &= share % len(self._memories) == 0
        memory = self._batch_sharding() if segments else None  # One sharding for all of its arrays.
        without = dataclasses.replace(abstract, memory=None)
        shardings = jax.tree.map(lambda array: array.sharding, without)
        self.shardings = dataclasses.replace(shardings, memory=memory)
        self._all_specs = _specs(self.shardings.trained | self.shardings.frozen)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, self._replicated()))

    def init(self, seed: int) -> TrainState:
        """Returns the initial state with random parameters."""
        # Parameter by parameter: a single program for all of them takes minutes to compile.
        with jax.set_mesh(self.mesh):
            model = MossVideo(self.model_config, rngs=nnx.Rngs(seed), dtype=jnp.float32)
        return self.adopt(model)

    def adopt(self, model: MossVideo) -> TrainState:
        """Returns the initial state with copies of a model's parameters.

        Raises:
          ValueError: the model's parameters are not those of the trainer's model.
        """
        params = {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(model))}
        shapes = {name: variable.shape for name, (_, variable) in self._variables.items()}
        if {name: param.shape for name, param in params.items()} != shapes:
            raise ValueError("the parameters of this model are not those of the trainer's model_config")

        def place(like):
            return {
                # A copy, since the step donates its state.
                name: jnp.array(jax.device_put(params[name], array.sharding), dtype=array.dtype, copy=True)
                for name, array in like.items()
            }

        abstract = self.abstract()
        trained = place(abstract.trained)
        return TrainState(
            step=jax.device_put(jnp.int32(0), self._replicated()),
            trained=trained,
            frozen=place(abstract.frozen),
            optimizer=jax.jit(self._optimizer.init, out_shardings=self.shardings.optimizer)(trained),
            memory=jax.jit(self._empty_memory, out_shardings=self.shardings.memory)(),
        )

    def abstract(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of a state, as needed to restore one."""

        def array(shape, dtype, sharding) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        trained, frozen = {}, {}
        for name, (path, variable) in self._variables.items():
            sharding = named_sharding(variable.get_metadata()["axes"], variable.shape, self.mesh)
            if path[0] in self.config.trainable:
                trained[name] = array(variable.shape, jnp.float32, sharding)
            else:
                frozen[name] = array(variable.shape, self._dtype, sharding)
        # Moments are sharded like their parameters.
        optimizer = optax.tree_map_params(
            self._optimizer,
            lambda moment, param: array(moment.shape, moment.dtype, param.sharding),
            jax.eval_shape(self._optimizer.init, trained),
            trained,
            transform_non_params=lambda x: array(x.shape, x.dtype, self._replicated()),
        )
        memory = jax.tree.map(
            lambda x: array(x.shape, x.dtype, self._batch_sharding()), jax.eval_shape(self._empty_memory)
        )
        return TrainState(array((), jnp.int32, self._replicated()), trained, frozen, optimizer, memory)

    def _empty_memory(self) -> StreamState | None:
        """The memory before the first step."""
        if self.segments is None:
            return None
        return empty_memory(self.segments, self.model_config, self.config.batch_size, self._dtype)

    def model(self, state: TrainState, dtype: DTypeLike) -> MossVideo:
        """Returns the model with copies of a state's parameters, which survive the donation of the state."""
        return self._merge(
            {name: jnp.array(x, dtype=dtype, copy=True) for name, x in (state.trained | state.frozen).items()}
        )

    def put(self, batch: Batch) -> Batch:
        """Assembles the global batch from the rows of each process, sharded over the mesh.

        Raises:
          ConfigError: the mesh does not divide the number of rows of all processes.
        """
        self._check_rows(len(batch.tokens) * row_share(self.mesh)[1])
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._batch_sharding(), x), batch
        )

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """Takes one optimizer step."""
        tokens = jnp.asarray(batch.tokens)
        targets = find_targets(
            tokens,
            jnp.asarray(batch.labels),
            silence_id=self.silence_id,
            image_id=self.model_config.decoder.image_token_id,
            silence_weight=self.config.silence_weight,
        )
        gradient, losses, memory = self._gradient_and_losses(state, batch, targets)
        with jax.named_scope("optimizer"):
            updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.trained)
            trained = cast(dict, optax.apply_updates(state.trained, updates))
        metrics = {
            "loss": self._weighted_sum(losses, targets),
            "loss_text": mean_over(losses["cross_entropy"], targets.text),
            "loss_silence": mean_over(losses["cross_entropy"], targets.silence),
            "loss_after_silence": mean_over(losses["cross_entropy"], targets.after_silence),
            "targets_text": targets.text.sum(),
            "targets_silence": targets.silence.sum(),
            "targets_after_silence": targets.after_silence.sum(),
            "grad_norm": optax.tree.norm(gradient),
            **{f"grad_norm/{part}": norm for part, norm in part_norms(gradient).items()},
            **{f"param_norm/{part}": norm for part, norm in part_norms(trained).items()},
            "learning_rate": self._learning_rate(state.step),
            "targets": (targets.text | targets.silence).sum(),
            "tokens": _lengths(tokens).sum() if batch.segments is None else batch.segments.lengths.sum(),
            "frames": (batch.frame_positions < tokens.shape[1]).sum(),
        }
        for name, _ in self.config.loss_terms:
            metrics[name] = mean_over(losses[name], targets.text | targets.silence)
        state = TrainState(
            step=state.step + 1,
            trained=trained,
            frozen=state.frozen,
            optimizer=optimizer,
            memory=memory,
        )
        return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def _weighted_sum(self, losses: dict[str, Float[Array, "B S"]], targets: Targets) -> Float[Array, ""]:
        """Returns the loss that is minimised."""
        total = losses["cross_entropy"]
        for name, weight in self.config.loss_terms:
            total = total + weight * losses[name]
        return (total * targets.weights).sum()

    def _gradient_and_losses(
        self, state: TrainState, batch: Batch, targets: Targets
    ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "B S"]], StreamState | None]:
        """Returns the gradient of the loss, each loss term at each token, and the memory of the streams."""
        arguments = state.trained, state.frozen, state.memory, batch, targets
        if not self._by_device:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return self._backward(*arguments)
        rows = PartitionSpec(RULES["batch"])
        trained, frozen = (_specs(params) for params in (self.shardings.trained, self.shardings.frozen))
        return jax.shard_map(
            self._backward,
            mesh=self.mesh,
            in_specs=(trained, frozen, rows, rows, rows),
            out_specs=(trained, rows, rows),
            # The kernels don't declare over which mesh axes their outputs vary.
            check_vma=False,
        )(*arguments)

    def _backward(
        self,
        trained: dict[str, Float[Array, "..."]],
        frozen: dict[str, Float[Array, "..."]],
        memory: StreamState | None,
        batch: Batch,
        targets: Targets,
    ) -> tuple[dict[str, Float[Array, "..."]], dict[str, Float[Array, "B S"]], StreamState | None]:
        """Computes `_gradient_and_losses`: if by device, from its shards of the parameters and its rows."""

        def loss(trained, batch, targets):
            model = self._merge(trained | frozen, self._in_compute_dtype)
            vision = self.model_config.vision
            pixels = preprocess(
                batch.frames, image_size=vision.image_size, mean=vision.image_mean, std=vision.image_std
            )
            hidden, new_memory = self._hidden(model, memory, batch, pixels)
            chunks = self._chunks(*targets.ids.shape)
            losses = token_losses(hidden, targets.ids, model.decoder.logits, terms=self._terms, chunks=chunks)
            return self._weighted_sum(losses, targets), (losses, new_memory)

        def add_gradient(total, part):
            # The weights are normalised over the whole batch, so gradients of micro-batches simply add up.
            gradient, (losses, memory) = jax.grad(loss, has_aux=True)(trained, *part)
            total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
            return self._constrain(total, self.shardings.trained), (losses, memory)

        count = self.config.accumulate
        if count == 1:
            gradient, (losses, memory) = add_gradient(None, (batch, targets))
            return self._sum_over_devices(gradient), losses, memory

        def split(x):  # [B, ...] to [A, B/A, ...]; the rows of a device stay on it
            x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
            return self._constrain(x, self._batch_sharding(None))

        def join(x):
            return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        zero = jax.tree.map(jnp.zeros_like, trained)
        gradient, (losses, _) = jax.lax.scan(add_gradient, zero, jax.tree.map(split, (batch, targets)))
        return self._sum_over_devices(gradient), jax.tree.map(join, losses), None

    def _in_compute_dtype(self, name: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """A parameter as layers use it, by device also gathered from all of its shards.

        The gradient of a gathered parameter is reduced and scattered.
        """
        x = x.astype(self._dtype)
        return gather(x, self._all_specs[name], self.mesh) if self._by_device else x

    def _sum_over_devices(self, gradient: dict[str, Float[Array, "..."]]) -> dict[str, Float[Array, "..."]]:
        """Sums a gradient over the devices that have different rows but the same shard of a parameter."""
        if not self._by_device:
            return gradient
        return {name: sum_replicas(x, self._all_specs[name], RULES["batch"]) for name, x in gradient.items()}

    def _constrain(self, x, shardings):
        """Constrains the shardings of arrays that the compiler partitions."""
        return x if self._by_device else jax.lax.with_sharding_constraint(x, shardings)

    def _hidden(
        self, model: MossVideo, memory: StreamState | None, batch: Batch, pixels: Float[Array, "B F H W 3"]
    ) -> tuple[Float[Array, "B S D"], StreamState | None]:
        """Returns the hidden states of a batch, and the memory of its streams."""
        tokens, frame_positions = jnp.asarray(batch.tokens), jnp.asarray(batch.frame_positions)
        if memory is None:
            return model.hidden(tokens, pixels, frame_positions), None
        assert batch.segments is not None
        B, F = frame_positions.shape
        features = model.encode(pixels.reshape(B * F, *pixels.shape[2:]))
        features = features.reshape(B, F, *features.shape[1:])
        return run_segments(model, memory, tokens, features, frame_positions, batch.segments, self._memories)

    def _merge(
        self,
        params: dict[str, Array],
        read: Callable[[str, Float[Array, "..."]], Float[Array, "..."]] | None = None,
    ) -> MossVideo:
        """Returns the model with these parameters.

        Args:
          read: maps a parameter's name and value to what the model gets. For those of the layers it is called
            inside of the layer, so that remat repeats it instead of keeping the result.
        """
        state = []
        for name, (path, variable) in self._variables.items():
            if read is None:
                variable = variable.replace(params[name])
            elif LAYERS.isdisjoint(path):
                variable = variable.replace(read(name, params[name]))
            else:
                hook = functools.partial(lambda name, _, value: read(name, value), name)
                variable = variable.replace(params[name], on_get_value=hook)
            state.append((path, variable))
        return nnx.merge(self._graph, nnx.from_flat_state(state))

    def _chunks(self, rows: int, tokens: int) -> int:
        """Returns the number of chunks in which to compute logits of [rows, tokens, vocab]."""
        shape = (rows, tokens, self.model_config.decoder.vocab_size)
        if not self._by_device:
            shape = named_sharding(("batch", None, "vocab"), shape, self.mesh).shard_shape(shape)
        return math.ceil(math.prod(shape) / MAX_LOGITS)

    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _batch_sharding(self, *before: None) -> NamedSharding:
        """Returns the sharding of arrays whose batch axis follows the replicated axes `before`."""
        return NamedSharding(self.mesh, PartitionSpec(*before, RULES["batch"]))

    def _check_rows(self, rows: int) -> None:
        parts = self.config.accumulate * math.prod(self.mesh.shape[axis] for axis in RULES["batch"])
        if rows % parts:
            raise ConfigError(
                f"a batch of {rows} sequences cannot be split evenly over data x fsdp = "
                f"{parts // self.config.accumulate} devices in {self.config.accumulate} micro-batches; "
                f"make batch_size a multiple of {parts}"
            )


def part_norms(params: dict[str, Float[Array, "..."]]) -> dict[str, Float[Array, ""]]:
    """Returns the L2 norm of each part of the model (vision, compressor, ...); NaN if the part has a NaN."""
    parts: dict[str, list] = {}
    for name, param in params.items():
        parts.setdefault(name.partition("/")[0], []).append(param.astype(jnp.float32))
    return {part: optax.tree.norm(arrays) for part, arrays in parts.items()}


def _specs(shardings: dict[str, NamedSharding]) -> dict[str, PartitionSpec]:
    return {name: sharding.spec for name, sharding in shardings.items()}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _lengths(tokens: Int[Array, "B S"]) -> Int[Array, " B"]:
    """Returns the length of each sequence without its padding, which has id 0."""
    return jnp.where(tokens != 0, jnp.arange(1, tokens.shape[1] + 1), 0).max(axis=1)
