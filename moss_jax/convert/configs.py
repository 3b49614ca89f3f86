"""Conversion between `ModelConfig` and `config.json` with `preprocessor_config.json`."""

from typing import Any

from moss_jax.config import (
    CompressorConfig,
    ConfigError,
    DecoderConfig,
    ModelConfig,
    RopeConfig,
    VisionConfig,
)

MODEL_TYPES = ("mllama", "video_mllama")


def from_hugging_face(config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> ModelConfig:
    """Converts the config of a checkpoint.

    Args:
      config: content of `config.json`.
      preprocessor: content of `preprocessor_config.json`; only `image_mean` and `image_std` are read.

    Raises:
      ConfigError: an unknown model type, a missing key or an unsupported value.
    """
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise ConfigError(f"config.json has model_type {kind!r}; supported are {' and '.join(MODEL_TYPES)}")
    preprocessor = preprocessor or {}
    try:
        model = ModelConfig(
            vision=_vision(config["vision_config"], preprocessor),
            compressor=CompressorConfig(
                mode=config.get("mllama_pool_mode", config.get("pool_mode", "average")),
                stride=config.get("mllama_pool_stride", config.get("stride", 4)),
            ),
            decoder=_decoder(config["text_config"]),
        )
    except KeyError as error:
        raise ConfigError(f"config.json lacks the key {error}") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"config.json holds a value of the wrong type ({error})") from error
    ratios = config["vision_config"].get("supported_aspect_ratios")
    if ratios is not None and len(ratios) + 1 != model.vision.num_aspect_ratio_ids:
        raise ConfigError(
            f"config.json lists {len(ratios)} aspect ratios, but {model.vision.max_num_tiles} tiles have "
            f"{len(model.vision.supported_aspect_ratios)}"
        )
    return model


def to_hugging_face(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of a model."""
    v, c, d = model.vision, model.compressor, model.decoder
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": d.image_token_id,
        "mllama_pool_mode": c.mode,
        "mllama_pool_stride": c.stride,
        "vision_config": {
            "model_type": "mllama_vision_model",
            "attention_heads": v.num_heads,
            "hidden_act": "gelu",
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_layers_indices": list(v.intermediate_layers),
            "intermediate_size": v.intermediate_size,
            "max_num_tiles": v.max_num_tiles,
            "norm_eps": v.norm_eps,
            "num_channels": 3,
            "num_global_layers": v.num_global_layers,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
            "supported_aspect_ratios": [list(ratio) for ratio in v.supported_aspect_ratios],
            "vision_output_dim": v.output_size,
        },
        "text_config": {
            "model_type": "mllama_text_model",
            "cross_attention_layers": list(d.cross_attention_layers),
            "hidden_act": "silu",
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "max_position_embeddings": d.max_positions,
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "rms_norm_eps": d.norm_eps,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": d.rope.factor,
                "low_freq_factor": d.rope.low_freq_factor,
                "high_freq_factor": d.rope.high_freq_factor,
                "original_max_position_embeddings": d.rope.original_max_positions,
            },
            "rope_theta": d.rope.theta,
            "tie_word_embeddings": False,
            "vocab_size": d.vocab_size,
        },
    }
    preprocessor = {
        "image_mean": list(v.image_mean),
        "image_std": list(v.image_std),
        "rescale_factor": 1 / 255,
        "resample": 2,
        "max_image_tiles": 1,
        "size": {"height": v.image_size, "width": v.image_size},
    }
    return config, preprocessor


def _vision(c: dict[str, Any], preprocessor: dict[str, Any]) -> VisionConfig:
    _expect(c, "vision_config", hidden_act="gelu", num_channels=3)
    normalisation = {
        key: tuple(preprocessor[key]) for key in ("image_mean", "image_std") if key in preprocessor
    }
    return VisionConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_global_layers=c["num_global_layers"],
        num_heads=c["attention_heads"],
        intermediate_layers=tuple(c["intermediate_layers_indices"]),
        max_num_tiles=c["max_num_tiles"],
        norm_eps=c["norm_eps"],
        **normalisation,
    )


def _decoder(c: dict[str, Any]) -> DecoderConfig:
    _expect(c, "text_config", hidden_act="silu", tie_word_embeddings=False)
    # transformers 5 moved theta into the scaling parameters.
    scaling = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("llama3", "default"):
        raise ConfigError(f"rope_type {kind!r} is not supported; it is llama3 or default")
    theta = scaling.get("rope_theta", c.get("rope_theta", RopeConfig.theta))
    rope = RopeConfig(theta=theta, factor=1)
    if kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            factor=scaling["factor"],
            low_freq_factor=scaling["low_freq_factor"],
            high_freq_factor=scaling["high_freq_factor"],
            original_max_positions=scaling["original_max_position_embeddings"],
        )
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        cross_attention_layers=tuple(c["cross_attention_layers"]),
        rope=rope,
        norm_eps=c["rms_norm_eps"],
        max_positions=c["max_position_embeddings"],
    )


def _expect(section: dict[str, Any], name: str, **values: Any) -> None:
    """Raises ConfigError if the section has another value than the only one that the model supports."""
    for key, value in values.items():
        if section.get(key, value) != value:
            raise ConfigError(f"{name}.{key} is {section[key]!r}; only {value!r} is supported")
