"""Video input: reading files, sampling frames, and preprocessing them for the vision encoder."""

from moss_jax.video.preprocess import fit_frame, fitted_size, preprocess
from moss_jax.video.reader import DecodedFrame, Frame, Span, VideoError, VideoInfo, frame_spans, probe, read
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
    "frame_spans",
    "preprocess",
    "probe",
    "read",
    "sample_at",
    "sample_clip",
    "sample_file",
    "sample_live",
]
