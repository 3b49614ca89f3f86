"""Still pictures: tiles, several pictures in a file, EXIF orientation; and what is a video after all."""

import io
import struct
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from video.test_reader import ORIENTATIONS

from moss_jax.config import FrameSampling
from moss_jax.video import VideoError, frame_spans, probe, read, sample_clip, sample_file

SAMPLING = FrameSampling(fps=1, min_frames=4, max_frames=8)


def quarters(height: int = 192, width: int = 256, seed: int = 0) -> np.ndarray:
    """A picture whose four quarters differ, so that any turn, mirroring or missing tile shows."""
    colours = np.random.default_rng(seed).permutation(
        [(220, 30, 30), (30, 200, 40), (30, 40, 220), (230, 220, 20)]
    )
    return colours.reshape(2, 2, 3).repeat(height // 2, 0).repeat(width // 2, 1).astype(np.uint8)


def assert_still(path: Path, expected: np.ndarray, tolerance: float = 3.0) -> None:
    """The file is one frame, upright and whole, whoever looks."""
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    assert (info.is_image, info.duration, info.fps) == (True, 0, None)
    assert len(frame_spans(path)) == 1
    for frames in (list(read(path)), sample_clip(path, SAMPLING), list(sample_file(path, SAMPLING))):
        (frame,) = frames
        assert frame.time == 0
        assert frame.rgb.dtype == np.uint8
        assert np.abs(frame.rgb.astype(int) - expected).mean() < tolerance


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def grid_of_avif(tiles: list[bytes], columns: int, rows: int, width: int, height: int) -> bytes:
    """Combines AVIF pictures of one size to a tiled one, as the tiles of a grid item."""

    def box(kind: bytes, *content: bytes) -> bytes:
        body = b"".join(content)
        return struct.pack(">I4s", 8 + len(body), kind) + body

    def full(kind: bytes, *content: bytes, flags: int = 0, version: int = 0) -> bytes:
        return box(kind, struct.pack(">I", version << 24 | flags), *content)

    def find(data: bytes, kind: bytes) -> bytes:
        at = data.index(kind) - 4
        return data[at : at + int.from_bytes(data[at : at + 4])]

    coded = [find(tile, b"mdat")[8:] for tile in tiles]
    tile_width, tile_height = struct.unpack(">II", find(tiles[0], b"ispe")[12:20])
    count = len(tiles)
    properties = [
        find(tiles[0], b"av1C"),
        full(b"ispe", struct.pack(">II", tile_width, tile_height)),
        full(b"ispe", struct.pack(">II", width, height)),
        full(b"pixi", bytes([3, 8, 8, 8])),
    ]
    grid = struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)

    def meta(start: int) -> bytes:
        infos = [full(b"infe", struct.pack(">HH4sB", i + 2, 0, b"av01", 0), version=2) for i in range(count)]
        infos.insert(0, full(b"infe", struct.pack(">HH4sB", 1, 0, b"grid", 0), version=2))
        places, at = [struct.pack(">HHHHII", 1, 1, 0, 1, 0, len(grid))], start
        for i, data in enumerate(coded):
            places.append(struct.pack(">HHHHII", i + 2, 0, 0, 1, at, len(data)))
            at += len(data)
        links = [struct.pack(">HBBB", 1, 2, 3, 4)]
        links += [struct.pack(">HBBBB", i + 2, 3, 0x81, 2, 4) for i in range(count)]
        return full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(">H", 1)),
            full(b"iinf", struct.pack(">H", count + 1), *infos),
            full(b"iref", box(b"dimg", struct.pack(f">HH{count}H", 1, count, *range(2, count + 2)))),
            box(b"iprp", box(b"ipco", *properties), full(b"ipma", struct.pack(">I", count + 1), *links)),
            box(b"idat", grid),
            full(b"iloc", bytes([0x44, 0x00]), struct.pack(">H", count + 1), *places, version=1),
        )

    head = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + box(b"mdat", *coded)


def saved(rgb: np.ndarray, format: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, format, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------ tiles and previews


@pytest.mark.parametrize("tile_size", [0, 64])
def test_a_heic_is_one_whole_picture(tmp_path, tile_size):
    """As phones take them: of tiles, with a thumbnail."""
    path, rgb = tmp_path / "photo.heic", quarters()
    options = {"tile_size": tile_size} if tile_size else {"thumbnails": [64]}
    pillow_heif.from_pillow(Image.fromarray(rgb)).save(path, **options)
    assert_still(path, rgb)


def test_a_tiled_avif_is_one_whole_picture(tmp_path):
    path, rgb = tmp_path / "tiles.avif", quarters()
    tiles = [
        saved(np.ascontiguousarray(rgb[y : y + 96, x : x + 128]), "AVIF", subsampling="4:4:4")
        for y in (0, 96)
        for x in (0, 128)
    ]
    path.write_bytes(grid_of_avif(tiles, 2, 2, 256, 192))
    assert_still(path, rgb)
    Image.fromarray(rgb).save(tmp_path / "one.avif")
    assert_still(tmp_path / "one.avif", rgb)


def test_the_primary_picture_of_several_is_read(tmp_path):
    first, second = quarters(seed=1), quarters(seed=2)
    burst = pillow_heif.from_pillow(Image.fromarray(first))
    burst.add_from_pillow(Image.fromarray(second))
    burst.save(tmp_path / "burst.heic", primary_index=1)
    assert_still(tmp_path / "burst.heic", second)
    for name, format in (("stereo.jpg", "MPO"), ("pages.tiff", "TIFF")):
        more = {"save_all": True, "append_images": [Image.fromarray(second)]}
        (tmp_path / name).write_bytes(saved(first, format, **more))
        assert_still(tmp_path / name, first, tolerance=6)
    (tmp_path / "icon.ico").write_bytes(saved(first[:192, :192], "ICO", sizes=[(16, 16), (192, 192)]))
    assert_still(tmp_path / "icon.ico", first[:192, :192])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_a_video_and_one_picture_of_it_a_still(tmp_path, format):
    pictures = [quarters(seed=seed) for seed in (1, 2, 3)]
    more = {"save_all": True, "append_images": list(map(Image.fromarray, pictures[1:])), "duration": 500}
    path = tmp_path / f"moving.{format.lower()}"
    path.write_bytes(saved(pictures[0], format, **more))
    info, frames = probe(path), list(read(path))
    assert not info.is_image
    assert info.duration == pytest.approx(1.5)
    assert [frame.time for frame in frames] == pytest.approx([0, 0.5, 1])
    for frame, rgb in zip(frames, pictures, strict=True):
        assert np.abs(frame.rgb.astype(int) - rgb).mean() < 6
    assert len(sample_clip(path, FrameSampling(fps=2))) == 3
    path.write_bytes(saved(pictures[0], format))
    assert_still(path, pictures[0], tolerance=6)


# ------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_photo_is_shown_upright(tmp_path, format, orientation):
    path, rgb = tmp_path / f"photo.{format.lower()}", quarters()
    path.write_bytes(saved(rgb, format, exif=exif(orientation)))
    assert_still(path, ORIENTATIONS[orientation](rgb), tolerance=6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_heic_is_shown_upright(tmp_path, orientation):
    path, rgb = tmp_path / "photo.heic", quarters()
    photo = pillow_heif.from_bytes("RGB", (256, 192), rgb.tobytes())
    photo.info["exif"] = exif(orientation)  # which is stored as a rotation and a mirror of the container, too
    photo.save(path, tile_size=64)
    data = path.read_bytes()
    assert (b"irot" in data or b"imir" in data) == (orientation != 1)
    assert_still(path, ORIENTATIONS[orientation](rgb))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_do_not_matter(tmp_path):
    path, rgb = tmp_path / "photo.jpg", quarters()
    path.write_bytes(saved(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03"))
    assert_still(path, rgb)


def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path):
    grey = np.linspace(0, 65535, 96 * 160).reshape(96, 160).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "scan.png")
    assert_still(tmp_path / "scan.png", np.stack([grey >> 8] * 3, axis=-1), tolerance=1)


# ----------------------------------------------------------------------- photo or raw Motion JPEG


def noise(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["film.mjpeg", "film.MJPG", "film.jpg", "film"])
@pytest.mark.parametrize("padding", [b"", b"\0\0"])
def test_raw_motion_jpeg_is_a_video(tmp_path, name, padding):
    """Also with pictures so large that libav takes the first one for a photo."""
    pictures = [saved(noise(seed), "JPEG", exif=exif(1)) for seed in range(6)]
    (tmp_path / name).write_bytes(padding.join(pictures))
    info, frames = probe(tmp_path / name), list(read(tmp_path / name))
    assert not info.is_image
    assert info.duration == pytest.approx(6 / 25)
    assert [frame.time for frame in frames] == pytest.approx(np.arange(6) / 25)
    expected = [np.asarray(Image.open(io.BytesIO(picture))).astype(int) for picture in pictures]
    assert all(np.abs(f.rgb - e).mean() < 20 for f, e in zip(frames, expected, strict=True))


@pytest.mark.parametrize("behind", ["depth", "thumbnails", "film", "noise"])
def test_a_photo_with_something_behind_it_is_a_still(tmp_path, behind):
    rgb = quarters()
    photo, thumbnail = saved(rgb, "JPEG"), saved(quarters(48, 64), "JPEG")
    data = {
        "depth": saved(quarters(seed=3), "JPEG"),
        "thumbnails": 5 * thumbnail,
        "film": b"\0\0\0\x18ftypmp42" + noise(0).tobytes()[:5000],
        "noise": noise(1).tobytes()[:5000],
    }[behind]
    (tmp_path / "photo.jpg").write_bytes(photo + data)
    assert_still(tmp_path / "photo.jpg", rgb)


def test_a_thumbnail_inside_a_photo_is_not_a_picture_of_a_film(tmp_path):
    rgb = quarters()
    inside = saved(rgb, "JPEG")
    (tmp_path / "photo.jpg").write_bytes(saved(rgb, "JPEG", exif=b"Exif\0\0" + 3 * inside))
    assert_still(tmp_path / "photo.jpg", rgb)


# ------------------------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("format", ["HEIC", "AVIF", "JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("fraction", [0.5, 0.95])
def test_half_a_picture_is_refused(tmp_path, format, fraction):
    path, rgb = tmp_path / f"photo.{format.lower()}", noise(0, 192, 256)
    if format == "HEIC":
        pillow_heif.from_pillow(Image.fromarray(rgb)).save(path, tile_size=64)
    else:
        path.write_bytes(saved(rgb, format))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    for call in (probe, frame_spans, lambda path: list(read(path))):
        with pytest.raises(VideoError) as caught:
            call(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
