"""Corruptions of images against loops, closed forms and the libraries that the source used.

Shapes: N images, C channels, H height, W width.
"""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from moe_lib.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt

# Table K.1 of ITU-T T.81 (the JPEG standard).
LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
SHAPES = [(3, 1, 8, 8), (2, 1, 28, 28), (2, 3, 32, 32), (2, 3, 9, 14)]


def by_severity(*strengths):
    return list(enumerate(strengths, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape):
    return torch.randint(0, 256, shape, generator=generator(3), dtype=torch.uint8)


def smooth_images(channels, side):
    """Sixteen images of a few waves each, over the whole range."""
    at = torch.arange(side) / side
    wave = torch.rand(16, channels, 4, 3, generator=generator(1)) * 4
    phase = wave[..., 0, None, None] * at[:, None] + wave[..., 1, None, None] * at + wave[..., 2, None, None]
    x_NCHW = torch.sin(2 * torch.pi * phase).sum(2)
    low, high = x_NCHW.amin((2, 3), keepdim=True), x_NCHW.amax((2, 3), keepdim=True)
    return ((x_NCHW - low) / (high - low) * 255).to(torch.uint8)


def assert_levels(corrupted_NCHW, expected_NCHW, tolerance=0.5):
    """Equal up to the rounding to whole levels."""
    expected = np.clip(expected_NCHW, 0, 255)
    assert np.abs(corrupted_NCHW.numpy() - expected).max() <= tolerance + 1e-4


# ---------------------------------------------------------------------------- what each one computes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("severity", "deviation"), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_noise_on_mid_grey_is_gaussian(severity, deviation, channels):
    grey = torch.full((20, channels, 32, 32), 128, dtype=torch.uint8)
    noise = (corrupt(grey, "noise", severity, generator()).double() - 128) / 255
    count = noise.numel()
    rounding = 1 / 12 / 255**2
    assert noise.mean().abs() < 5 * deviation / count**0.5
    assert noise.var().item() == pytest.approx(deviation**2 + rounding, rel=5 * (2 / count) ** 0.5)
    assert ((noise.abs() < deviation).double().mean() - 0.6827).abs() < 0.03
    assert np.corrcoef(noise[:10].flatten(), noise[10:].flatten())[0, 1] == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("severity", "sigma"), by_severity(0.4, 0.6, 0.7, 0.8, 1.0))
def test_blur_is_that_of_scipy(severity, sigma, shape):
    images = random_images(*shape)
    expected = gaussian_filter(images.numpy().astype(float), sigma, mode="nearest", axes=(2, 3))
    assert_levels(corrupt(images, "blur", severity, generator()), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("severity", "factor"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_by_loops(severity, factor, shape):
    images = random_images(*shape)
    expected = np.empty(shape)
    for n, c in np.ndindex(shape[:2]):
        values = images[n, c].flatten().tolist()
        mean = sum(values) / len(values)
        expected[n, c] = np.reshape([mean + factor * (x - mean) for x in values], shape[2:])
    assert_levels(corrupt(images, "contrast", severity, generator()), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("severity", "amount"), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_by_loops(severity, amount, shape):
    images = random_images(*shape)
    images[0, :, 0, 0] = 0
    expected = np.empty(shape)
    for n, h, w in np.ndindex(shape[0], *shape[2:]):
        pixel = [x / 255 for x in images[n, :, h, w].tolist()]
        if len(pixel) == 1:
            brighter = [pixel[0] + amount]
        else:
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            brighter = colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1))
        expected[n, :, h, w] = [255 * x for x in brighter]
    assert_levels(corrupt(images, "brightness", severity, generator()), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("severity", "share"), by_severity(0.95, 0.9, 0.85, 0.75, 0.65))
def test_pixelate_is_that_of_pillow(severity, share, shape):
    """Pillow rounds after each of its four passes, which costs up to a level more."""
    images = random_images(*shape)
    height, width = shape[2:]
    expected = np.empty(shape)
    for n, c in np.ndindex(shape[:2]):
        small = Image.fromarray(images[n, c].numpy()).resize(
            (int(width * share), int(height * share)), Image.Resampling.BOX
        )
        expected[n, c] = np.asarray(small.resize((width, height), Image.Resampling.BOX))
    assert_levels(corrupt(images, "pixelate", severity, generator()), expected, tolerance=1)


@pytest.mark.parametrize(("severity", "quality"), by_severity(80, 65, 58, 50, 40))
def test_jpeg_is_its_textbook_form(severity, quality):
    """Blocks of 8 x 8: cosine transform, rounding to multiples of the table, and back. Codecs use integer
    arithmetic, so that a coefficient half way may be rounded to the other side."""
    images = smooth_images(1, 32)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = np.clip((np.array(LUMINANCE) * scale + 50) // 100, 1, 255)
    expected = np.empty(images.shape)
    for n, row, column in np.ndindex(len(images), 4, 4):
        block = (n, 0, slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
        coefficients = dctn(images[block].numpy().astype(float) - 128, norm="ortho")
        expected[block] = idctn(np.rint(coefficients / table) * table, norm="ortho") + 128
    error = np.abs(corrupt(images, "jpeg", severity, generator()).numpy() - np.clip(expected, 0, 255))
    assert np.median(error) <= 0.5
    assert error.mean() < 0.5


def test_jpeg_knows_red_from_blue():
    images = smooth_images(3, 32)
    found = corrupt(images, "jpeg", 1, generator())
    assert_levels(found.double().mean((2, 3)), images.double().mean((2, 3)).numpy(), tolerance=3)


# --------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 28), (3, 32)])
def test_distortion_grows_with_severity(name, channels, side):
    """At 8 pixels a side two severities of pixelate make the same boxes."""
    images = smooth_images(channels, side)
    distortions = [
        (corrupt(images, name, severity, generator()).double() - images).abs().mean().item()
        for severity in SEVERITIES
    ]
    assert distortions[0] > 0
    if side == 8 and name == "pixelate":
        assert distortions[0] == distortions[1] < distortions[2] == distortions[3] < distortions[4]
    else:
        assert distortions == sorted(set(distortions))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 8, 8), (1, 1, 1, 1)])
def test_shape_and_type_stay_and_the_originals_too(name, shape):
    images = random_images(*shape)
    copy, state = images.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        corrupted = corrupt(images, name, severity, generator())
        assert corrupted.shape == shape
        assert corrupted.dtype == torch.uint8
    assert torch.equal(images, copy)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alone_and_the_generator_alone_decides(name):
    images = smooth_images(3, 32)
    whole = corrupt(images, name, 3, generator())
    assert torch.equal(whole, corrupt(images, name, 3, generator()))
    assert torch.equal(whole[:4], corrupt(images[:4], name, 3, generator()))
    assert torch.equal(whole, corrupt(images, name, 3, generator(1))) == (name != "noise")


@pytest.mark.parametrize("name", ["blur", "contrast", "pixelate"])
@pytest.mark.parametrize("level", [0, 1, 100, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_constant_images_stay_as_they_are(name, level, channels):
    images = torch.full((2, channels, 28, 28), level, dtype=torch.uint8)
    for severity in SEVERITIES:
        assert torch.equal(corrupt(images, name, severity, generator()), images)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_equal_channels_are_treated_as_one(name):
    """A grey image in three channels. Noise is drawn per channel."""
    grey = smooth_images(1, 32)
    colour = corrupt(grey.expand(-1, 3, -1, -1), name, 4, generator())
    if name == "noise":
        assert not torch.equal(colour[:, 0], colour[:, 1])
    else:
        assert torch.equal(colour, corrupt(grey, name, 4, generator()).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("name", ["noise", "brightness"])
def test_values_beyond_the_range_are_cut_off(name):
    white = torch.full((4, 3, 16, 16), 255, dtype=torch.uint8)
    black = torch.zeros_like(white)
    assert corrupt(white, name, 5, generator()).max() == 255
    assert corrupt(white, name, 5, generator()).min() > 128
    assert corrupt(black, name, 5, generator()).max() < 128


@pytest.mark.parametrize(
    ("images", "name", "severity", "message"),
    [
        (
            random_images(1, 1, 8, 8),
            "fog",
            1,
            "unknown corruption 'fog'; known: noise, blur, contrast, .*jpeg",
        ),
        (random_images(1, 1, 8, 8), "noise", 0, "severity must be 1, 2, 3, 4 or 5, got 0"),
        (random_images(1, 1, 8, 8), "jpeg", 6, "severity must be 1, 2, 3, 4 or 5, got 6"),
        (random_images(1, 1, 8, 8), "blur", 2.5, "severity must be 1, 2, 3, 4 or 5, got 2.5"),
        (torch.zeros(1, 1, 8, 8), "blur", 1, r"images must be uint8 .*got torch.float32 \(1, 1, 8, 8\)"),
        (random_images(1, 2, 8, 8), "blur", 1, r"\[N, 1 or 3, H, W\], got torch.uint8 \(1, 2, 8, 8\)"),
        (random_images(1, 8, 8), "blur", 1, r"images must have shape .* got \[1, 8, 8\]"),
    ],
)
def test_bad_input_is_named(images, name, severity, message):
    with pytest.raises(ValueError, match=message):
        corrupt(images, name, severity, generator())
