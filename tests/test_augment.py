import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backstride.models.data.augment import elastic_deformation, mirror_pad, random_crop, random_flip_rotate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(height, width):
    """An image whose two channels are each pixel's row and column, and a mask of distinct pixel numbers."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((rows, columns)).float(), rows * width + columns


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (3, 1, 0, 2), (6, 6, 4, 4), (0, 5, 3, 0)])
def test_mirror_pad_is_torchs_reflection_where_that_is_defined(pads):
    image = torch.randn(3, 5, 7, generator=generator())
    assert torch.equal(mirror_pad(image, pads), F.pad(image, pads, mode="reflect"))


def walk(size, position, direction, steps):
    """The pixels that someone visits who turns round at each border."""
    visited = []
    for _ in range(steps):
        if not 0 <= position + direction < size:
            direction = -direction
        position = position + direction if size > 1 else 0
        visited.append(position)
    return visited


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.tuples(*[st.integers(0, 30)] * 4))
def test_mirror_pad_bounces_between_the_borders(height, width, pads):
    left, right, top, bottom = pads
    rows = walk(height, 0, -1, top)[::-1] + list(range(height)) + walk(height, height - 1, 1, bottom)
    columns = walk(width, 0, -1, left)[::-1] + list(range(width)) + walk(width, width - 1, 1, right)
    _, mask = coordinates(height, width)
    assert torch.equal(mirror_pad(mask, pads), mask[rows][:, columns])


def test_mirror_pad_rejects_bad_arguments():
    with pytest.raises(ValueError, match="must not be negative"):
        mirror_pad(torch.zeros(4, 4), (0, -1, 0, 0))
    with pytest.raises(ValueError, match=r"\[0, 4\] has no pixels"):
        mirror_pad(torch.zeros(0, 4), (1, 1, 1, 1))


def test_elastic_deformation_is_reproducible_and_keeps_shape_and_type():
    image, mask = torch.rand(3, 40, 56, generator=generator()).double(), torch.randint(0, 4, (40, 56))
    mask[:5] = 255
    deformed, deformed_mask = elastic_deformation(image, mask, generator(1))
    again, again_mask = elastic_deformation(image, mask, generator(1))
    assert torch.equal(deformed, again) and torch.equal(deformed_mask, again_mask)
    assert deformed.shape == image.shape and deformed.dtype == image.dtype
    assert deformed_mask.shape == mask.shape and deformed_mask.dtype == mask.dtype
    assert set(deformed_mask.unique().tolist()) <= {0, 1, 2, 3, 255}
    assert not torch.allclose(deformed, elastic_deformation(image, mask, generator(2))[0])


def test_elastic_deformation_without_displacement_is_the_identity():
    image, mask = torch.rand(1, 33, 47, generator=generator(), dtype=torch.float64), coordinates(33, 47)[1]
    deformed, deformed_mask = elastic_deformation(image, mask, generator(), sigma=0.0)
    torch.testing.assert_close(deformed, image)
    assert torch.equal(deformed_mask, mask)


def test_elastic_deformation_samples_where_the_interpolated_grid_points():
    height, width = 61, 81
    image = torch.from_numpy(np.random.default_rng(0).random((1, height, width)))
    mask = torch.randint(0, 5, (height, width), generator=generator())
    deformed, deformed_mask = elastic_deformation(image, mask, generator(5), grid=3, sigma=10.0)

    coarse = 10.0 * torch.randn(2, 3, 3, generator=generator(5)).numpy().astype(float)
    dy, dx = (_keys_cubic(_keys_cubic(vectors, height).T, width).T for vectors in coarse)
    y, x = np.mgrid[0:height, 0:width]
    # scipy's "mirror" reflects about the border pixels' centres.
    sampled = ndimage.map_coordinates(image[0].numpy(), (y + dy, x + dx), order=1, mode="mirror")
    np.testing.assert_allclose(deformed[0].numpy(), sampled, atol=1e-4)
    nearest = ndimage.map_coordinates(mask.numpy(), (y + dy, x + dx), order=0, mode="mirror")
    # Pixels whose source lies within float32's rounding of the middle between two may fall either way.
    assert (deformed_mask.numpy() != nearest).mean() < 1e-3


def _keys_cubic(samples, size):
    """Cubic convolution (Keys 1981, with a = -3/4) of the rows of `samples`, end points on end points."""

    def weight(t):
        t = np.abs(t)
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * t**3 + 3.75 * t**2 - 6 * t + 3
        return np.where(t <= 1, near, np.where(t < 2, far, 0))

    places = np.linspace(0, len(samples) - 1, size)
    taps = np.arange(-2, len(samples) + 2)
    return weight(places[:, None] - taps) @ samples[np.clip(taps, 0, len(samples) - 1)]


def test_elastic_displacements_have_the_published_size():
    image, mask = coordinates(101, 101)
    # In the middle the displacement is one draw from N(0, 10 px), and nothing is mirrored there.
    shifts = torch.stack([elastic_deformation(image, mask, generator(seed))[0][:, 50, 50] for seed in range(400)])
    assert abs(shifts.mean() - 50) < 1.5
    assert abs(shifts.std() - 10) < 1


def test_elastic_deformation_rejects_bad_arguments():
    image, mask = coordinates(8, 8)
    with pytest.raises(ValueError, match=r"shapes are \[2, 8, 8\] and \[8, 7\]"):
        elastic_deformation(image, mask[:, 1:], generator())
    with pytest.raises(TypeError, match=r"floating point, not torch\.uint8"):
        elastic_deformation(image.byte(), mask, generator())
    with pytest.raises(ValueError, match="at least 2 points"):
        elastic_deformation(image, mask, generator(), grid=1)


def test_flips_and_rotations_reach_all_eight_symmetries_and_move_the_mask_along():
    image, mask = coordinates(4, 4)
    seen = set()
    draw = generator()
    for _ in range(200):
        moved, moved_mask = random_flip_rotate(image, mask, draw)
        assert torch.equal(moved[0] * 4 + moved[1], moved_mask.float())
        seen.add(tuple(moved_mask.flatten().tolist()))
    assert len(seen) == 8


def test_a_quarter_turn_swaps_height_and_width():
    image, mask = coordinates(3, 5)
    shapes = {tuple(random_flip_rotate(image, mask, generator(seed))[1].shape) for seed in range(20)}
    assert shapes == {(3, 5), (5, 3)}


def test_random_crop_takes_image_and_mask_from_one_place():
    image, mask = coordinates(6, 9)
    corners = set()
    draw = generator()
    for _ in range(300):
        cropped, cropped_mask = random_crop(image, mask, (4, 3), draw)
        assert cropped.shape == (2, 4, 3)
        assert torch.equal(cropped[0] * 9 + cropped[1], cropped_mask.float())
        assert torch.equal(cropped_mask, mask[cropped_mask[0, 0] // 9 :, cropped_mask[0, 0] % 9 :][:4, :3])
        corners.add(int(cropped_mask[0, 0]))
    assert len(corners) == 3 * 7


def test_random_crop_mirrors_an_image_that_is_too_small():
    image, mask = coordinates(3, 20)
    cropped, cropped_mask = random_crop(image, mask, 12, generator())
    assert cropped.shape == (2, 12, 12)
    assert torch.equal(cropped[0] * 20 + cropped[1], cropped_mask.float())
    assert cropped[0, :, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]
    with pytest.raises(ValueError, match="must be positive"):
        random_crop(image, mask, (0, 4), generator())
