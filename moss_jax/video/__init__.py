"""From a video file or a live source to the pixels that the model sees: reading, sampling, preprocessing."""

from moss_jax.video.preprocess import fit_frame, fitted_size, preprocess
from moss_jax.video.reader import DecodedFrame, Frame, Span, VideoError, VideoInfo, probe, read, timeline
from moss_jax.video.sampling import clip_times, sample_at, sample_clip, sample_file, sample_live

__all__ = [
    "DecodedFrame",
    "Frame",
    "Span",
    "VideoError",
    "VideoInfo",
    "clip_times",
    "fit_frame",
    "fitted_size",
    "preprocess",
    "probe",
    "read",
    "sample_at",
    "sample_clip",
    "sample_file",
    "sample_live",
    "timeline",
]
