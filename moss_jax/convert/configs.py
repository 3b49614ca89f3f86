"""Conversion between `ModelConfig` and the JSON files of a checkpoint in Hugging Face layout."""

import math
from collections.abc import Mapping
from typing import Any

from moss_jax.config import (
    CompressorConfig,
    ConfigError,
    DecoderConfig,
    ModelConfig,
    RopeConfig,
    VisionConfig,
)
from moss_jax.text import Tokenizer

MODEL_TYPES = ("mllama", "video_mllama")
BOS, EOS, PAD = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
# PIL's constant for the filter that `video.preprocess` resizes with.
_BILINEAR = 2


def from_hugging_face(config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> ModelConfig:
    """Converts the config of a checkpoint.

    Args:
      config: content of `config.json`.
      preprocessor: settings of the image processor: the content of `preprocessor_config.json`, or what
        `processor_config.json` has under `image_processor`.

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
        ratios = config["vision_config"].get("supported_aspect_ratios")
        listed = model.vision.num_aspect_ratio_ids - 1 if ratios is None else len(ratios)
    except KeyError as error:
        raise ConfigError(f"config.json lacks the key {error}") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"config.json holds a value of the wrong type ({error})") from error
    if listed + 1 != model.vision.num_aspect_ratio_ids:
        raise ConfigError(
            f"config.json lists {listed} aspect ratios, but {model.vision.max_num_tiles} tiles have "
            f"{len(model.vision.supported_aspect_ratios)}"
        )
    return model


def to_hugging_face(
    model: ModelConfig, tokenizer: Tokenizer | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of a model.

    With a tokenizer, the config has the ids of its special tokens; without one it has no padding token, since
    the ids that transformers assumes are those of the 11B.
    """
    v, c, d = model.vision, model.compressor, model.decoder
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": d.image_token_id,
        "tie_word_embeddings": False,
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
            **(token_ids(tokenizer) if tokenizer else {"pad_token_id": None}),
        },
    }
    preprocessor = {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(v.image_mean),
        "image_std": list(v.image_std),
        "rescale_factor": 1 / 255,
        "resample": _BILINEAR,
        "max_image_tiles": 1,
        "size": {"height": v.image_size, "width": v.image_size},
    }
    return config, preprocessor


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of the tokens that begin a text, end a turn and pad, as `config.json` names them."""
    special, pad = tokenizer.special, tokenizer.control.get(PAD, tokenizer.special.eot)
    return {"bos_token_id": special.begin_of_text, "eos_token_id": special.eot, "pad_token_id": pad}


def generation_to_hugging_face(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns `generation_config.json`: greedy decoding up to the end of a turn."""
    return {"do_sample": False, **token_ids(tokenizer)}


def tokenizer_to_hugging_face(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns `tokenizer_config.json`, which says how transformers opens a `tokenizer.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "MllamaProcessor",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD if PAD in tokenizer.control else EOS,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }


def _vision(c: dict[str, Any], preprocessor: dict[str, Any]) -> VisionConfig:
    _expect(c, "vision_config", hidden_act="gelu", num_channels=3)
    image_size = _size(c, "image_size")
    return VisionConfig(
        image_size=image_size,
        patch_size=_size(c, "patch_size"),
        hidden_size=_size(c, "hidden_size"),
        intermediate_size=_size(c, "intermediate_size"),
        num_layers=_size(c, "num_hidden_layers"),
        num_global_layers=_size(c, "num_global_layers", least=0),
        num_heads=_size(c, "attention_heads"),
        intermediate_layers=tuple(c["intermediate_layers_indices"]),
        max_num_tiles=_size(c, "max_num_tiles"),
        norm_eps=_number(c, "norm_eps"),
        **_normalisation(preprocessor, image_size),
    )


def _normalisation(preprocessor: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Returns mean and std, for pixels scaled to [0, 1], that give the pixels of an image processor.

    An image processor computes (pixel * factor - mean) / std; a factor that is not 1/255 goes into both.

    Raises:
      ConfigError: it resizes differently from `video.preprocess`.
    """
    where = "the image processor"
    if not isinstance(preprocessor, dict):
        raise ConfigError(f"{where} must be a JSON object, not {type(preprocessor).__name__}")
    given = {key: value for key, value in preprocessor.items() if value is not None}
    size = given.get("size", image_size)
    size = {"height": size, "width": size} if isinstance(size, int) else size
    sides = {side: size.get(side) for side in ("height", "width")}
    _expect(sides, f"{where}.size", height=image_size, width=image_size)
    _expect(given, where, do_resize=True, do_pad=True, resample=_BILINEAR)
    try:
        factor = float(given.get("rescale_factor", 1 / 255)) if given.get("do_rescale", True) else 1.0
        if given.get("do_normalize", True):
            mean = _per_channel(given.get("image_mean", VisionConfig.image_mean))
            std = _per_channel(given.get("image_std", VisionConfig.image_std))
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} has a value of the wrong type ({error})") from error
    scale = factor * 255
    if not 0 < scale < math.inf:
        raise ConfigError(f"{where}.rescale_factor is {factor}; it must be positive")
    return {"image_mean": tuple(x / scale for x in mean), "image_std": tuple(x / scale for x in std)}


def _per_channel(value: Any) -> tuple[float, ...]:
    """Returns a number for each channel; VisionConfig checks that there are three."""
    values = tuple(map(float, (value,) * 3 if isinstance(value, int | float) else value))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{value} is not finite")
    return values


def _decoder(c: dict[str, Any]) -> DecoderConfig:
    _expect(c, "text_config", hidden_act="silu", tie_word_embeddings=False)
    # transformers 5 moved theta into the scaling parameters.
    scaling = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("llama3", "default"):
        raise ConfigError(f"rope_type {kind!r} is not supported; it is llama3 or default")
    theta = _number({"rope_theta": RopeConfig.theta} | c | scaling, "rope_theta")
    rope = RopeConfig(theta=theta, factor=1)
    if kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            factor=_number(scaling, "factor"),
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
            original_max_positions=_size(scaling, "original_max_position_embeddings"),
        )
    return DecoderConfig(
        vocab_size=_size(c, "vocab_size"),
        hidden_size=_size(c, "hidden_size"),
        intermediate_size=_size(c, "intermediate_size"),
        num_layers=_size(c, "num_hidden_layers"),
        num_heads=_size(c, "num_attention_heads"),
        num_kv_heads=_size(c, "num_key_value_heads"),
        cross_attention_layers=tuple(c["cross_attention_layers"]),
        rope=rope,
        norm_eps=_number(c, "rms_norm_eps"),
        max_positions=_size(c, "max_position_embeddings"),
    )


def _size(section: dict[str, Any], key: str, *, least: int = 1) -> int:
    """Returns a size; raises ConfigError if it is not an integer of at least `least`."""
    value = section[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"config.json has {key} {value!r}; it must be an integer of at least {least}")
    return value


def _number(section: dict[str, Any], key: str) -> float:
    """Returns a number; raises ConfigError if it is not a positive and finite one."""
    value = section[key]
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json has {key} {value!r}; it must be a positive number")
    return value


def _expect(section: Mapping[str, Any], name: str, **values: Any) -> None:
    """Raises ConfigError if the section has a value other than the only one that the model supports."""
    for key, value in values.items():
        if section.get(key, value) != value:
            raise ConfigError(f"{name}.{key} is {section[key]!r}; only {value!r} is supported")
