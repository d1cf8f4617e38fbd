import numpy as np
import pytest
import torch
from backstride.models.data.cells import TouchingCells
from backstride.models.data.folder import FolderSegmentation
from PIL import Image
from skimage.measure import label

CELLS = np.random.default_rng(0).integers(0, 2, (6, 8), dtype=np.uint8)


def write(root, name, image, mask, image_folder="image", mask_folder="label"):
    """Writes one pair; arrays or Pillow pictures, `name` with its suffix."""
    for folder, picture in ((image_folder, image), (mask_folder, mask)):
        if picture is not None:
            (root / folder).mkdir(exist_ok=True, parents=True)
            picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            picture.save(root / folder / name)


def grey(height=6, width=8, value=100):
    return np.full((height, width), value, dtype=np.uint8)


def test_items_hold_the_files_pixels_and_classes(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    write(tmp_path, "a.png", pixels, CELLS)
    data = FolderSegmentation(tmp_path)
    image, mask = data[0]
    assert (len(data), data.num_classes, data.class_values, data.names, data.in_channels) == (
        1,
        2,
        (0, 1),
        ("a",),
        1,
    )
    assert image.dtype == torch.float32 and mask.dtype == torch.int64
    torch.testing.assert_close(image, torch.from_numpy(pixels[None]).float() / 255)
    assert mask.tolist() == CELLS.tolist()


def test_colour_images_and_sixteen_bits(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    write(tmp_path / "rgb", "a.png", rgb, CELLS)
    image, _ = FolderSegmentation(tmp_path / "rgb")[0]
    torch.testing.assert_close(image, torch.from_numpy(rgb).permute(2, 0, 1).float() / 255)

    deep = np.full((6, 8), 65535, dtype=np.uint16)
    write(tmp_path / "deep", "a.tif", deep, CELLS)
    image, _ = FolderSegmentation(tmp_path / "deep")[0]
    assert image.shape == (1, 6, 8) and (image == 1).all()


def test_order_is_natural_and_indices_pick_from_it(tmp_path):
    for number in (10, 2, 1, 0):
        write(tmp_path, f"slice{number}.png", grey(value=number), CELLS)
    assert FolderSegmentation(tmp_path).names == ("slice0", "slice1", "slice2", "slice10")
    part = FolderSegmentation(tmp_path, indices=[3, 1])
    assert part.names == ("slice10", "slice1")
    assert round(part[0][0].max().item() * 255) == 10
    with pytest.raises(IndexError):
        part[2]
    with pytest.raises(ValueError, match="index 4 is out of range.*4 pairs"):
        FolderSegmentation(tmp_path, indices=[4])


@pytest.mark.parametrize("names", [("images", "masks"), ("imgs", "mask"), ("Image", "Labels")])
def test_folder_names(tmp_path, names):
    write(tmp_path, "a.bmp", grey(), CELLS, *names)
    assert len(FolderSegmentation(tmp_path)) == 1


def test_binary_masks_of_0_and_255(tmp_path):
    write(tmp_path, "a.png", grey(), grey(value=0))
    write(tmp_path, "b.png", grey(), 255 * CELLS)
    data = FolderSegmentation(tmp_path)
    assert data.class_values == (0, 255) and data.num_classes == 2
    assert data[0][1].unique().tolist() == [0]
    assert data[1][1].tolist() == CELLS.tolist()


def test_255_is_ignored_when_there_are_more_classes(tmp_path):
    mask = CELLS.copy()
    mask[0, 0] = 255
    write(tmp_path, "a.png", grey(), mask)
    data = FolderSegmentation(tmp_path)
    assert data.class_values == (0, 1)
    assert data[0][1].tolist() == mask.tolist()


def test_a_palette_mask_counts_by_its_indices(tmp_path):
    classes = CELLS + CELLS[::-1]
    mask = Image.fromarray(classes)
    mask.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    assert mask.mode == "P"
    write(tmp_path, "a.png", grey(), mask)
    data = FolderSegmentation(tmp_path)
    assert data.num_classes == 3
    assert data[0][1].tolist() == classes.tolist()


def test_a_one_bit_mask(tmp_path):
    write(tmp_path, "a.png", grey(), Image.fromarray(CELLS.astype(bool)))
    data = FolderSegmentation(tmp_path)
    assert data.class_values == (0, 1) and data[0][1].tolist() == CELLS.tolist()


def test_a_large_set_is_read_from_disk_each_time(tmp_path, monkeypatch):
    write(tmp_path, "a.png", grey(), CELLS)
    kept = FolderSegmentation(tmp_path)
    monkeypatch.setattr("backstride.models.data.folder.CACHE_LIMIT", 0)
    read = FolderSegmentation(tmp_path)
    write(tmp_path, "a.png", grey(value=7), CELLS)
    assert round(kept[0][0].max().item() * 255) == 100
    assert round(read[0][0].max().item() * 255) == 7


def _colour_mask(root):
    write(root, "b.png", grey(), np.zeros((6, 8, 3), dtype=np.uint8))


def _other_size(root):
    write(root, "b.png", grey(), np.zeros((6, 7), dtype=np.uint8))


def _gap(root):
    write(root, "b.png", grey(), np.full((6, 8), 3, dtype=np.uint8))


def _smooth(root):
    write(root, "b.png", grey(), np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)


def _mixed_modes(root):
    write(root, "b.png", np.zeros((6, 8, 3), dtype=np.uint8), CELLS)


def _transparent(root):
    write(root, "b.png", np.zeros((6, 8, 4), dtype=np.uint8), CELLS)


def _no_mask(root):
    write(root, "b.png", grey(), None)


def _no_image(root):
    write(root, "b.png", None, CELLS)


def _same_stem(root):
    write(root, "a.bmp", grey(), None)


def _not_a_picture(root):
    (root / "image" / "b.png").write_text("hello")
    write(root, "b.png", None, CELLS)


def _cut_off(root):
    write(root, "b.png", grey(), np.random.default_rng(0).integers(0, 2, (99, 99), dtype=np.uint8))
    write(root, "b.png", grey(99, 99), None)
    path = root / "label" / "b.png"
    path.write_bytes(path.read_bytes()[:300])


def _pages(root):
    page = Image.fromarray(grey())
    page.save(root / "image" / "b.tif", save_all=True, append_images=[page])
    write(root, "b.tif", None, CELLS)


def _two_mask_folders(root):
    (root / "masks").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_colour_mask, r"label/b\.png is a colour picture \(mode RGB\).*map each colour to its number"),
        (_other_size, r"label/b\.png is 7 x 6 pixels, but .*image/b\.png is 8 x 6.*nearest-neighbour"),
        (_gap, r"label/b\.png holds the value 3; the masks hold 3 values: 0, 1, 3\..*renumber"),
        (_smooth, r"label/b\.png holds the value 5; .* hold 49 values: 0, 1, 5, .*JPEG"),
        (_mixed_modes, r"image/b\.png has the mode RGB, but .*image/a\.png has L"),
        (_transparent, r"image/b\.png has the mode RGBA: convert it"),
        (_no_mask, r"image/b\.png has no partner named b\.\* in .*label"),
        (_no_image, r"label/b\.png has no partner named b\.\* in .*image"),
        (_same_stem, r"a\.bmp and a\.png have the same stem"),
        (_not_a_picture, r"image/b\.png cannot be read as a picture"),
        (_cut_off, r"label/b\.png is damaged"),
        (_pages, r"image/b\.tif holds 2 pages"),
        (_two_mask_folders, r"exactly one folder named label, labels, mask, masks, but holds label, masks"),
    ],
)
def test_errors_name_the_file_and_the_remedy(tmp_path, spoil, message):
    write(tmp_path, "a.png", grey(), CELLS)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        # The spoilt pair is not among the picked ones: every file is checked all the same.
        FolderSegmentation(tmp_path, indices=[0])


def test_errors_for_missing_folders_and_a_single_class(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        FolderSegmentation(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder named image, images, imgs, but holds nothing"):
        FolderSegmentation(tmp_path)
    (tmp_path / "image").mkdir()
    (tmp_path / "label").mkdir()
    with pytest.raises(ValueError, match="image holds no picture"):
        FolderSegmentation(tmp_path)
    write(tmp_path, "a.png", grey(), grey(value=0))
    with pytest.raises(ValueError, match="every pixel of every mask is 0.*at least two classes"):
        FolderSegmentation(tmp_path)


def test_isbi_2012(data_dir):
    data = FolderSegmentation(data_dir / "isbi2012" / "train", indices=range(25, 30))
    assert data.names == ("25", "26", "27", "28", "29")
    assert data.class_values == (0, 255) and data.in_channels == 1
    image, mask = data[0]
    assert image.shape == (1, 512, 512) and mask.unique().tolist() == [0, 1]
    # Membranes are dark and the minority.
    assert image[0][mask == 0].mean() < image[0][mask == 1].mean()
    assert (mask == 0).float().mean() < 0.3


def test_cells_depend_on_seed_and_index_only():
    data, again = TouchingCells(4, 64, seed=3), TouchingCells(40, 64, seed=3)
    for index in (2, 0):
        for ours, theirs in zip(data[index], again[index], strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(data[-1][0], data[3][0])
    assert not torch.equal(data[0][0], data[1][0])
    assert not torch.equal(data[0][0], TouchingCells(4, 64, seed=4)[0][0])


def test_cells_fit_the_item_format():
    data = TouchingCells(2, (40, 72))
    items = list(data)
    assert len(items) == len(data) == 2
    for image, mask in items:
        assert image.shape == (1, 40, 72) and image.dtype == torch.float32
        assert mask.shape == (40, 72) and mask.dtype == torch.int64
        assert image.min() >= 0 and image.max() <= 1
        assert mask.unique().tolist() == [0, 1]


def test_cells_touch_and_are_kept_apart():
    image, mask = TouchingCells(1, 256, seed=0)[0]
    cells = np.asarray(label(mask.numpy(), connectivity=1))
    # No component spans more than a cell, and many background pixels lie between two cells, 3 pixels apart.
    assert 25 < cells.max() < 80
    assert np.bincount(cells.ravel())[1:].max() < 4000
    padded = np.pad(cells, 2)
    around = np.stack([np.roll(padded, (dy, dx), (0, 1))[2:-2, 2:-2] for dy in (-2, 0, 2) for dx in (-2, 0, 2)])
    lowest = np.where(around == 0, cells.max() + 1, around).min(0)
    border = (cells == 0) & (around.max(0) > lowest)
    assert border.mean() > 0.02
    assert image[0].numpy()[border].mean() < image[0].numpy()[cells > 0].mean() - 0.15


def test_cells_reject_bad_arguments():
    with pytest.raises(ValueError, match="count=0"):
        TouchingCells(0)
    with pytest.raises(ValueError, match="at least 16 x 16"):
        TouchingCells(1, 8)
    with pytest.raises(ValueError, match="seed=-1"):
        TouchingCells(1, seed=-1)
    with pytest.raises(IndexError, match="index 5 is out of range for 5"):
        TouchingCells(5)[5]
