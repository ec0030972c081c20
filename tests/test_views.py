"""Cutout, RandAugment-lite against Pillow, and which view an image gets."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

from tgeo_jax.data import randaugment, views

OPERATIONS = randaugment.OPERATIONS
ROUNDED = ("autocontrast", "brightness", "colour", "contrast")
SIGNED = (
    "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "colour", "contrast"
)  # fmt: skip


# Cutout, on images whose height and width differ.

HEIGHT, WIDTH = 7, 9


def view(clean_view=lambda images: images, *, crop_padding=0, flip=False, **options):
    return jax.jit(views.augment(clean_view, crop_padding=crop_padding, flip=flip, **options))


def keys(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def holes(side: int, count: int) -> np.ndarray:
    """Where each of some images was cut, [N, H, W]."""
    ones = jnp.ones((count, HEIGHT, WIDTH, 2))
    found = np.asarray(view(cutout=side)(keys(count), ones))
    assert set(np.unique(found)) <= {0, 1}
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
    return found[..., 0] == 0


def squares(side: int) -> dict[bytes, tuple[int, int]]:
    """The mask of the clipped square around every pixel; one of even side is longer above."""
    found = {}
    for row in range(HEIGHT):
        for column in range(WIDTH):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            above, left = row - side // 2, column - side // 2
            mask[max(above, 0) : above + side, max(left, 0) : left + side] = True
            found[mask.tobytes()] = (row, column)
    assert len(found) == HEIGHT * WIDTH
    return found


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_cutout_takes_the_clipped_square_around_each_pixel_equally_often(side):
    centres = squares(side)
    found = [centres[mask.tobytes()] for mask in holes(side, 100 * len(centres))]
    counts = [found.count(centre) for centre in centres.values()]
    assert scipy.stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_square_that_fits_has_its_full_size(side):
    masks = holes(side, 100)
    inside = ~(masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2)))
    assert inside.sum() > 5
    assert set(masks[inside].sum((1, 2))) == {side**2}


def test_a_square_larger_than_the_image_may_take_all_of_it():
    assert holes(2 * WIDTH, 20).all()


def test_cutout_sets_to_the_mean_colour_and_leaves_the_rest():
    mean = (0.2, 0.4)
    clean = views.normalise(mean, (0.5, 0.25))
    images = jnp.asarray(np.random.RandomState(0).randint(0, 256, (20, 8, 8, 2)), jnp.uint8)
    found = np.asarray(view(clean, cutout=3)(keys(20), images))
    cut = (found == 0).all(-1)
    assert set(cut.sum((1, 2))) <= {4, 6, 9}  # in a corner, at a border, inside
    np.testing.assert_allclose(found[~cut], np.asarray(clean(images))[~cut], atol=1e-6)
    back = found * [0.5, 0.25] + mean
    np.testing.assert_allclose(back[cut], np.broadcast_to(mean, back[cut].shape), atol=1e-6)


def test_cutout_of_nothing_changes_nothing():
    images = jnp.ones((3, HEIGHT, WIDTH, 1))
    np.testing.assert_array_equal(view(cutout=0)(keys(3), images), images)


# One operation of RandAugment, as Pillow does it.

RANDOM = np.random.RandomState(0)
# Neither square nor of full range, so that axes matter and there is contrast to gain.
COLOUR = RANDOM.randint(30, 200, (12, 16, 3)).astype(np.uint8)
GREY = COLOUR[..., :1]
operate = jax.jit(randaugment.operate)


def pillow(name: str, image: np.ndarray, magnitude: float) -> np.ndarray:
    level, strength = magnitude / 10, abs(magnitude) / 10
    picture = Image.fromarray(image.squeeze())
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "colour": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
    }
    if name == "identity":
        done = picture
    elif name == "autocontrast":
        done = ImageOps.autocontrast(picture)
    elif name in enhancers:
        done = enhancers[name](picture).enhance(1 + 0.9 * level)
    elif name == "posterise":
        done = ImageOps.posterize(picture, 8 - round(4 * strength))
    elif name == "solarise":
        done = ImageOps.solarize(picture, 256 * (1 - strength))
    else:
        done = picture.transform(
            picture.size, Image.Transform.AFFINE, affine(name, level, picture.size),
            Image.Resampling.NEAREST, fillcolor=0,
        )  # fmt: skip
    return np.asarray(done).reshape(image.shape)


def affine(name: str, level: float, size: tuple[int, int]) -> tuple[float, ...]:
    """Pillow's six numbers: from the output's coordinates to the input's, origin in the corner."""
    width, height = size
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "shear_x":
        b = 0.3 * level
    elif name == "shear_y":
        d = 0.3 * level
    elif name == "translate_x":
        c = 0.45 * level * width
    elif name == "translate_y":
        f = 0.45 * level * height
    else:
        assert name == "rotate"
        angle = math.radians(30 * level)
        a, b, d, e = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    x, y = width / 2, height / 2  # what stays in place
    return a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y


@pytest.mark.parametrize("magnitude", [-9.0, -3.0, 4.0, 10.0])
@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_pillow(name, image, magnitude):
    found = np.asarray(operate(OPERATIONS.index(name), image, magnitude))
    expected = pillow(name, image, magnitude)
    assert found.dtype == np.uint8
    assert found.shape == image.shape
    if name in ("identity", "posterise", "solarise"):
        np.testing.assert_array_equal(found, expected)
    elif name in ("autocontrast", "brightness", "colour", "contrast"):
        # Both cut what lies behind the decimal point off, of numbers whose last bits differ:
        # Pillow's table of autocontrast has a rounded slope, XLA may fuse a product with a sum.
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found != expected).mean() < 0.05
    else:
        # Pillow's coordinates have 16 bits after the point: near a border the neighbour is taken.
        assert (found != expected).any(-1).mean() <= 0.01


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"identity", "colour"}))
def test_every_operation_but_the_identity_does_something(name):
    # Colour, too, leaves a grey image as it is.
    assert (operate(OPERATIONS.index(name), GREY, 9.0) != GREY).any()


@pytest.mark.parametrize("name", [*SIGNED, "identity", "posterise", "solarise"])
@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
def test_magnitude_zero_is_the_identity(name, image):
    np.testing.assert_array_equal(operate(OPERATIONS.index(name), image, 0.0), image)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_sign_matters_to_signed_operations_alone(name):
    there, back = (np.asarray(operate(OPERATIONS.index(name), COLOUR, m)) for m in (-7.0, 7.0))
    assert (there != back).any() == (name in SIGNED)


def test_what_a_shift_uncovers_is_black():
    white = np.full((12, 16, 3), 255, np.uint8)
    found = np.asarray(operate(OPERATIONS.index("translate_x"), white, 10.0))
    # .45 * 16 = 7.2: the last seven columns come from outside.
    assert (found[:, :9] == 255).all()
    assert (found[:, 9:] == 0).all()


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y"])
def test_warps_are_about_the_centre(name):
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    found = np.asarray(operate(OPERATIONS.index(name), image, 10.0))
    assert found[1, 1, 0] == 5


def test_a_shift_by_half_a_pixel_takes_no_pixel_twice():
    columns = np.arange(1, 21, dtype=np.uint8).reshape(1, 20, 1)
    found = np.asarray(operate(OPERATIONS.index("translate_x"), columns, 5.0)).ravel()
    # .45 * .5 * 20 = 4.5, and halves go up.
    assert found.tolist() == [*range(6, 21), 0, 0, 0, 0, 0]


@pytest.mark.parametrize("level", [0, 77, 255])
def test_an_image_of_one_colour_has_no_contrast_to_gain(level):
    flat = np.full((4, 4, 3), level, np.uint8)
    for name in ("autocontrast", "contrast", "colour"):
        np.testing.assert_array_equal(operate(OPERATIONS.index(name), flat, 9.0), flat)


# Several operations, drawn at random.


@functools.partial(jax.jit, static_argnums=2)
def applied(keys_B, images, layers):
    own = lambda key, image: randaugment.apply(key, image, layers, 9.0)  # noqa: E731
    return jax.vmap(own)(keys_B, images)


def test_operations_signs_and_layers_are_drawn_alike_and_independently(monkeypatch):
    # Writes down what was drawn, one digit a layer, in place of doing it.
    def note(which, image, magnitude):
        return image * 24 + 2 * which + (magnitude > 0)

    monkeypatch.setattr(randaugment, "operate", note)
    draw = jax.vmap(lambda key: randaugment.apply(key, jnp.int32(0), 2, 9.0))
    counts = np.bincount(jax.jit(draw)(keys(24**2 * 50)), minlength=24**2)
    assert len(counts) == 24**2
    assert scipy.stats.chisquare(counts).pvalue > 0.001


def test_each_layer_is_one_operation_on_the_result_of_the_layers_before():
    images = jnp.stack([COLOUR] * 12)
    one, two = (np.asarray(applied(keys(12), images, layers)) for layers in (1, 2))
    every = jax.jit(jax.vmap(randaugment.operate, in_axes=(0, None, 0)))
    which, magnitude = np.tile(np.arange(12), 2), np.repeat(np.float32([-9, 9]), 12)
    for before, after in ((images, one), (one, two)):
        for image, found in zip(before, after, strict=True):
            candidates = np.asarray(every(which, image, magnitude))
            # Of products and sums the last bit depends on what they are compiled with.
            apart = np.abs(candidates.astype(int) - found.astype(int)).reshape(24, -1).max(1)
            assert (apart <= [name in ROUNDED for name in 2 * OPERATIONS]).any()
    assert len({image.tobytes() for image in two}) > 6


def test_no_layer_leaves_images_alone():
    np.testing.assert_array_equal(applied(keys(2), np.stack([COLOUR] * 2), 0), [COLOUR] * 2)


def test_images_get_what_they_would_get_alone():
    images = np.stack([COLOUR, COLOUR[::-1], COLOUR[:, ::-1], 255 - COLOUR])
    together = np.asarray(applied(keys(4), images, 2))
    assert together.dtype == np.uint8
    for key, image, found in zip(keys(4), images, together, strict=True):
        np.testing.assert_array_equal(applied(key[None], image[None], 2)[0], found)


# Everything together.

EVERYTHING = {
    "crop_padding": 2, "flip": True, "cutout": 5, "randaugment_layers": 2
}  # fmt: skip


def coloured(count: int) -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, (count, 12, 16, 3)).astype(np.uint8)


@pytest.mark.parametrize("seeds", [False, True])
def test_a_view_depends_on_its_own_key_alone_whatever_the_company(seeds):
    clean = views.normalise((0.5,) * 3, (0.25,) * 3)
    look = view(clean, **EVERYTHING)
    images = coloured(10)
    whole = np.asarray(look(keys(10), images))
    rows = np.array([7, 0, 0, 4])
    if seeds:  # as when several seeds train in one program
        some = jax.jit(jax.vmap(look))(keys(10)[rows][:, None], images[rows][:, None])[:, 0]
    else:
        some = look(keys(10)[rows], images[rows])
    np.testing.assert_allclose(some, whole[rows], atol=1e-6)


def test_a_view_is_fixed_by_its_key():
    look = view(**EVERYTHING)
    images = np.stack([COLOUR] * 20)
    first, second, other = (np.asarray(look(keys(20, seed), images)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    # Twenty views of one image, and twenty others.
    assert len({image.tobytes() for image in (*first, *other)}) == 40


def test_what_is_added_leaves_crops_and_flips_as_they_were():
    images = coloured(20)
    plain = view(crop_padding=2, flip=True)(keys(20), images)
    cut = np.asarray(view(crop_padding=2, flip=True, cutout=3)(keys(20), images))
    kept = (cut != 0).any(-1)
    np.testing.assert_array_equal(cut[kept], np.asarray(plain)[kept])
    # Magnitude 0 of what changes nothing then: wherever no autocontrast was drawn.
    mild = view(crop_padding=2, flip=True, randaugment_layers=1, randaugment_magnitude=0.0)
    same = (np.asarray(mild(keys(20), images)) == plain).all((1, 2, 3))
    assert same.sum() > 12  # 18.3, standard deviation 1.2


def test_every_augmentation_has_a_key_of_its_own(monkeypatch):
    def show(key, image, *_):
        return jax.random.key_data(key).reshape(image.shape)

    for name in ("_random_crop", "_random_flip", "_cutout"):
        monkeypatch.setattr(views, name, show)
    monkeypatch.setattr(randaugment, "apply", show)
    blank = jnp.zeros((3, 2, 1, 1), jnp.uint32)
    options = ({"crop_padding": 1}, {"flip": True}, {"cutout": 1}, {"randaugment_layers": 1})
    shown = [np.asarray(view(**each)(keys(3), blank)) for each in options]
    assert len({key.tobytes() for of_images in shown for key in of_images}) == 4 * 3
