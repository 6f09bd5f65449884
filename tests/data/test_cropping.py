"""The square that the model sees of a picture, and the time ids that say which."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from sharpening.data.cropping import crop_and_resize
from tests.support.captioned_files import encoded, position_image


def crop(image, resolution=16, center_crop=True, random_flip=False, seed=0):
    pixels, time_ids = crop_and_resize(
        image, resolution, center_crop, random_flip, torch.Generator().manual_seed(seed)
    )
    assert pixels.shape == (3, resolution, resolution) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    return ((pixels + 1) * 127.5), time_ids


@pytest.mark.parametrize("size", [(200, 64), (64, 200), (64, 64), (65, 64)])
@pytest.mark.parametrize("center_crop", [True, False])
def test_time_ids_name_the_pixels_that_the_model_sees(size, center_crop):
    width, height = size
    seen = Counter()
    for seed in range(40):
        pixels, time_ids = crop(position_image(*size), 64, center_crop, True, seed)
        original_height, original_width, top, left, *target = time_ids
        assert (original_width, original_height, target) == (*size, [64, 64])
        x, y = pixels[0].round(), pixels[1].round()
        flipped = bool(x[0, 0] > x[0, 1])
        across = torch.arange(left, left + 64)
        expected_x = width - 1 - across if flipped else across
        assert torch.equal(x, expected_x.expand(64, 64).float())
        assert torch.equal(y, torch.arange(top, top + 64)[:, None].expand(64, 64).float())
        seen[flipped, top, left] += 1
    assert 8 < sum(count for (flipped, *_), count in seen.items() if flipped) < 32
    corners = {(top, left) for _, top, left in seen}
    if center_crop:
        assert corners == {(round((height - 64) / 2), round((width - 64) / 2))}
    elif abs(width - height) > 1:
        assert len(corners) > 20


def test_the_corner_counts_in_the_scaled_image():
    image = position_image(240, 120)
    pixels, (height, width, top, left, *_) = crop(image, 40, center_crop=False, seed=3)
    assert (height, width, top) == (120, 240, 0)
    expected = 3 * (torch.arange(left, left + 40) + 0.5) - 0.5  # scaled by a third
    assert torch.allclose(pixels[0, 20, 1:-1], expected[1:-1], atol=1)


def test_pixels_span_minus_one_to_one_and_enlarging_works():
    image = Image.new("RGB", (4, 4), (0, 128, 255))
    pixels, _ = crop_and_resize(image, 16, True, False, torch.Generator())
    assert pixels[:, 8, 8].tolist() == [-1, pytest.approx(128 / 127.5 - 1, abs=1e-6), 1]


def _palette(transparent):
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return Image.open(io.BytesIO(encoded(image, transparency=bytes([255, 0 if transparent else 255]))))


def _sixteen_bit(mode, value):
    return Image.frombytes(mode, (20, 20), np.full(400, value, ">u2" if mode == "I;16B" else "<u2").tobytes())


MODES = {
    "RGB": (lambda: Image.new("RGB", (20, 20), (200, 100, 50)), (200, 100, 50)),
    "L": (lambda: Image.new("L", (20, 20), 77), (77,) * 3),
    "1": (lambda: Image.new("1", (20, 20), 1), (255,) * 3),
    "LA": (lambda: Image.new("LA", (20, 20), (0, 51)), (204,) * 3),
    "RGBA opaque": (lambda: Image.new("RGBA", (20, 20), (200, 100, 50, 255)), (200, 100, 50)),
    "RGBA clear": (lambda: Image.new("RGBA", (20, 20), (200, 100, 50, 0)), (255,) * 3),
    "RGBA half": (lambda: Image.new("RGBA", (20, 20), (255, 0, 0, 51)), (255, 204, 204)),
    "P": (lambda: _palette(False), (200, 100, 50)),
    "P clear": (lambda: _palette(True), (255,) * 3),
    "RGB with a clear colour": (
        lambda: Image.open(io.BytesIO(encoded(Image.new("RGB", (20, 20), (9, 8, 7)), transparency=(9, 8, 7)))),
        (255,) * 3,
    ),
    "CMYK": (lambda: Image.new("CMYK", (20, 20), (0, 255, 255, 0)), (255, 0, 0)),
    "YCbCr": (lambda: Image.new("YCbCr", (20, 20), (77, 128, 128)), (77,) * 3),
    "I;16": (lambda: _sixteen_bit("I;16", 200 * 257), (200,) * 3),
    "I;16B": (lambda: _sixteen_bit("I;16B", 200 * 257), (200,) * 3),
    "I": (lambda: Image.new("I", (20, 20), 100 * 257), (100,) * 3),
    "16-bit PNG": (lambda: Image.open(io.BytesIO(encoded(_sixteen_bit("I;16", 50 * 257)))), (50,) * 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    make, colour = MODES[mode]
    pixels, _ = crop(make())
    assert pixels[:, 8, 8].round().tolist() == list(colour)
    assert float((pixels - pixels[:, :1, :1]).abs().max()) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = position_image(40, 24)
    turn = Image.Transpose
    stored_as = {
        1: None,
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }[orientation]
    stored = upright if stored_as is None else upright.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, time_ids = crop(Image.open(io.BytesIO(encoded(stored, exif=exif))), 24)
    assert time_ids == (24, 40, 0, 8, 24, 24)
    assert torch.equal(pixels, crop(upright, 24)[0])


def test_pictures_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        crop(Image.new("F", (20, 20)))
    with pytest.raises(ValueError, match="1 x 60000, too narrow"):
        crop(Image.new("L", (1, 60000)), 64)


def test_geometry_equals_torchvision():
    from torchvision import transforms

    rng = np.random.default_rng(0)
    for size in ((37, 91), (91, 37), (50, 33), (20, 21)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        reference = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
        assert torch.allclose(crop(image, 32)[0] / 255, reference(image), atol=1e-6)
