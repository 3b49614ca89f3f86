"""Video input: reading files, sampling frames, and preprocessing them for the vision encoder."""

from moss_jax.video.files import VideoError
from moss_jax.video.live import is_live, read_live, without_credentials
from moss_jax.video.preprocess import fit_frame, fitted_size, preprocess
from moss_jax.video.reader import DecodedFrame, Frame, VideoInfo, frame_spans, probe, read
from moss_jax.video.sampling import clip_times, fit_frames, sample_at, sample_clip, sample_file, sample_live
from moss_jax.video.timeline import Span

__all__ = [
    "DecodedFrame",
    "Frame",
    "Span",
    "VideoError",
    "VideoInfo",
    "clip_times",
    "fit_frame",
    "fit_frames",
    "fitted_size",
    "frame_spans",
    "is_live",
    "preprocess",
    "probe",
    "read",
    "read_live",
    "sample_at",
    "sample_clip",
    "sample_file",
    "sample_live",
    "without_credentials",
]
