"Pictures of all sorts: opened upright and in RGB, or refused in one line."
import io

import numpy as np
import pytest
from PIL import Image
from hypothesis import given, settings, strategies as st

import plumbing.pictures
from plumbing.pictures import image_finder
from tests.helpers import SHARED, fails, huge_png, png, png_chunk, saved

pytest_plugins = ["tests.helpers"]  # its fixtures

PHOTOS = SHARED / "data" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos at {PHOTOS}")
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def of_mode(mode: str, left, right) -> Image.Image:
    "Two pixels side by side."
    image = Image.new(mode, (2, 1), left)
    image.putpixel((1, 0), right)
    return image


def palette(left: int, right: int) -> Image.Image:
    image = of_mode("P", left, right)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image

MODES = {  # name: (picture, file format, options, colours expected left and right)
    "bits": (of_mode("1", 0, 1), "PNG", {}, BLACK, WHITE),
    "grey": (of_mode("L", 9, 200), "PNG", {}, (9, 9, 9), (200, 200, 200)),
    "grey_with_one_transparent": (of_mode("L", 9, 200), "PNG", {"transparency": 9}, WHITE, (200, 200, 200)),
    "grey_alpha": (of_mode("LA", (9, 0), (200, 255)), "PNG", {}, WHITE, (200, 200, 200)),
    "grey_16_bit": (of_mode("I;16", 257 * 9, 257 * 200), "PNG", {}, (9, 9, 9), (200, 200, 200)),
    "int_16_bit": (of_mode("I", 257 * 9, 257 * 200), "TIFF", {}, (9, 9, 9), (200, 200, 200)),
    "int_8_bit": (of_mode("I", 9, 200), "TIFF", {}, (9, 9, 9), (200, 200, 200)),
    "grey_of_12_bits": (of_mode("I;16", 0, 4080), "PNG", {}, BLACK, (254, 254, 254)),
    "grey_of_10_bits": (of_mode("I;16", 512, 1023), "PNG", {}, (127, 127, 127), WHITE),
    "float_0_to_1": (of_mode("F", 0.0, 0.2), "TIFF", {}, BLACK, (51, 51, 51)),
    "float_0_to_255": (of_mode("F", 9.0, 200.0), "TIFF", {}, (9, 9, 9), (200, 200, 200)),
    "colour": (of_mode("RGB", RED, BLUE), "PNG", {}, RED, BLUE),
    "colour_with_one_transparent": (of_mode("RGB", RED, BLUE), "PNG", {"transparency": RED}, WHITE, BLUE),
    "palette": (palette(0, 2), "PNG", {}, RED, BLUE),
    "palette_with_transparency": (palette(0, 2), "PNG", {"transparency": 0}, WHITE, BLUE),
    "palette_half_transparent": (palette(0, 2), "PNG", {"transparency": bytes([128, 255, 255])}, (255, 127, 127), BLUE),
    "alpha": (of_mode("RGBA", (0, 255, 0, 0), (255, 0, 0, 255)), "PNG", {}, WHITE, RED),
    "half_alpha": (of_mode("RGBA", (0, 0, 0, 128), (0, 0, 255, 255)), "PNG", {}, (127, 127, 127), BLUE),
    "print_colours": (of_mode("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), "TIFF", {}, RED, BLACK),
}


@pytest.mark.parametrize("name", MODES)
def test_every_image_mode_becomes_the_right_rgb(name):
    image, kind, options, left, right = MODES[name]
    rgb = plumbing.pictures.load_image(saved(image, kind, **options))
    assert (rgb.mode, rgb.size) == ("RGB", (2, 1))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 0))) == (left, right)


def test_cmyk_jpeg_is_not_inverted():
    rgb = plumbing.pictures.load_image(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.array(rgb.getpixel((8, 8)), dtype=int) - RED).max() < 8


def test_exif_orientation_is_honoured():
    image = of_mode("RGB", RED, BLUE)
    image.getexif()[0x0112] = 6  # the camera lay on its side: show it turned clockwise
    upright = plumbing.pictures.load_image(saved(image, "PNG", exif=image.getexif()))
    assert upright.size == (1, 2)
    assert (upright.getpixel((0, 0)), upright.getpixel((0, 1))) == (RED, BLUE)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE, GREEN)]
    for kind in ("GIF", "PNG"):
        rgb = plumbing.pictures.load_image(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert (rgb.mode, rgb.getpixel((0, 0))) == ("RGB", RED)


def test_an_unusable_image_is_one_line_that_names_it(tmp_path):
    whole = saved(Image.effect_noise((64, 64), 90), "JPEG").getvalue()
    files = {"cut.jpg": whole[:len(whole) // 2], "text.jpg": b"<html>404 not found</html>", "empty.png": b"",
             "huge.png": huge_png(30000), "no_header.png": huge_png(8)[:20],
             # Pillow answers these with errors of other types, which do not know the file's name.
             "short_header.png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", b"\0\0\0\x08"),
             "letters.ppm": b"P6\n1a 16\n255\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in [*files, "missing.jpg", ""]:  # the last one is the folder itself
        assert fails(lambda: plumbing.pictures.load_image(tmp_path / name), tmp_path / name)
        if name in files:  # a picture from a zip has no path: its record gives it a name
            assert fails(lambda: plumbing.pictures.load_image(io.BytesIO(files[name]), "cat 7"), "cat 7")
    assert fails(lambda: plumbing.pictures.load_image(tmp_path / "huge.png"), "30000 x 30000", "smaller")

NOISE = Image.effect_noise((16, 16), 90).convert("RGB")
PICTURES = [saved(NOISE, kind).getvalue() for kind in ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")]


@pytest.mark.filterwarnings("ignore")  # Pillow warns about what it can still read
@given(st.sampled_from(PICTURES), st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
       st.integers(1, 3000))
@settings(max_examples=150, deadline=None)
def test_a_corrupt_image_is_read_or_one_line_that_names_it(raw, changes, length):
    raw = bytearray(raw)
    for place, value in changes:  # near the front, where the headers are
        raw[place] = value
    try:
        assert plumbing.pictures.load_image(io.BytesIO(raw[:length]), "cat 7").mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("cat 7: ") and "\n" not in str(error)


@needs_photos
@pytest.mark.filterwarnings("ignore")  # Pillow's, about the broken EXIF
def test_real_files_load_or_say_what_is_wrong():
    files = [path for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".jpeg", ".png", ".gif", ".webp")]
    assert len(files) >= 20
    for path in files:
        if path.name.startswith("truncated"):
            assert fails(lambda: plumbing.pictures.load_image(path), path)
        else:
            image = plumbing.pictures.load_image(path)
            assert image.mode == "RGB" and np.asarray(image).std() > 5  # not blank
    hopper = np.asarray(plumbing.pictures.load_image(PHOTOS / "hopper.jpg"), dtype=float)
    for name in ("hopper_orientation_3.jpg", "hopper_orientation_6.jpg"):
        turned = np.asarray(plumbing.pictures.load_image(PHOTOS / name), dtype=float)
        assert np.abs(turned - hopper).mean() < 8, name  # JPEG loses a little at each saving


def test_a_link_leads_neither_out_of_the_folder_nor_into_one_whose_name_begins_alike(tmp_path):
    for folder in ("data", "data-private"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(1))
    (tmp_path / "data" / "inside.png").symlink_to(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "secret.png").symlink_to(tmp_path / "data-private" / "a.png")
    find = image_finder(str(tmp_path / "data"))
    assert find("a.png") and find("inside.png")
    with pytest.raises(ValueError, match="secret.png.*leads out"):
        find("secret.png")
