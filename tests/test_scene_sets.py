"""Pascal VOC, Cityscapes and plain folders, in small copies of their layouts; CamVid is in test_scenes.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from backstride.models.cli import app
from backstride.models.data import cityscapes, voc
from backstride.models.data.cityscapes import Cityscapes
from backstride.models.data.sets import SceneFolder, detect, open_split
from backstride.models.data.voc import PascalVOC
from backstride.models.training.config import SceneConfig
from backstride.models.training.scenes import SceneTask, open_scenes
from PIL import Image
from typer.testing import CliRunner

DRAW = np.random.default_rng(0)
SIZES = [(6, 8), (5, 9)]


def save_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    pixels = DRAW.integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def save_mask(path: Path, mask: np.ndarray, palette: bool = False) -> np.ndarray:
    picture = Image.fromarray(mask)
    if palette:
        picture.putpalette([part for number in range(256) for part in voc.colour(number)])
        assert picture.mode == "P"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return mask


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """VOCdevkit/VOC2012 with images of two sizes, and one more that only SBD has a mask for."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    names = ["2007_000032", "2008_000007", "2010_000001"]
    for name, size in zip(names, [*SIZES, SIZES[0]], strict=True):
        save_image(root / "JPEGImages" / f"{name}.jpg", size)
        mask = DRAW.integers(0, 21, size, dtype=np.uint8)
        mask[0] = 255
        sbd = name == "2010_000001"
        save_mask(root / ("SegmentationClassAug" if sbd else "SegmentationClass") / f"{name}.png", mask, not sbd)
    (lists / "train.txt").write_text("2007_000032\n2008_000007\n\n")
    (lists / "val.txt").write_text("2008_000007\n")
    (lists / "train_aug.txt").write_text("/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png\n2010_000001")
    return root


def test_voc_items(devkit: Path):
    data = PascalVOC(devkit, "train")
    assert (len(data), data.names, data.sizes) == (2, ("2007_000032", "2008_000007"), SIZES)
    image, mask = data[1]
    with Image.open(devkit / "JPEGImages" / "2008_000007.jpg") as picture:
        torch.testing.assert_close(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    with Image.open(devkit / "SegmentationClass" / "2008_000007.png") as picture:
        assert picture.mode == "P" and mask.tolist() == np.array(picture).tolist()
    assert (mask[0] == 255).all() and mask.max() == 255 and torch.equal(mask, data.mask(1))


def test_voc_is_found_from_every_folder_around_it_and_sbd_by_its_list(devkit: Path):
    for root in (devkit, devkit.parent, devkit.parent.parent):
        assert detect(root) == "voc" and PascalVOC(root, "val").names == ("2008_000007",)
    assert PascalVOC(devkit, "train_aug.txt").names == ("2007_000032", "2010_000001")


def test_voc_colours_are_the_devkit_s():
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {number: voc.colour(number) for number in published} == published
    assert voc.colour(255) == (224, 224, 192)
    assert len(voc.CLASSES) == 21 and list(voc.CLASSES)[15] == "person" and list(voc.CLASSES)[20] == "tvmonitor"


def test_voc_errors(devkit: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no Pascal VOC: give the folder with JPEGImages"):
        PascalVOC(devkit / "JPEGImages", "train")
    with pytest.raises(ValueError, match=r"seg11valid.txt does not exist: name a list .* \(train, train_aug, val\)"):
        PascalVOC(devkit, "seg11valid")
    (devkit / "ImageSets" / "Segmentation" / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt names no image"):
        PascalVOC(devkit, "empty")
    save_mask(devkit / "SegmentationClass" / "2008_000007.png", np.full(SIZES[1], 21, np.uint8))
    with pytest.raises(ValueError, match=r"holds the value 21: in Pascal VOC, classes are 0 ... 20, and 255 doesn't"):
        PascalVOC(devkit, "train")
    save_image(devkit / "SegmentationClass" / "2008_000007.png", SIZES[1])
    with pytest.raises(ValueError, match=r"2008_000007.png is a colour picture \(mode RGB\)"):
        PascalVOC(devkit, "train")
    (devkit / "SegmentationClass" / "2008_000007.png").unlink()
    with pytest.raises(
        ValueError, match=r"SegmentationClass/2008_000007.png is missing, but a list .* SBD's masks into"
    ):
        PascalVOC(devkit, "val")


@pytest.fixture
def city(tmp_path: Path) -> Path:
    """Two cities in train, one in val, labelIds that hold every id."""
    for split, name in (
        ("train", "aachen_000000_000019"),
        ("train", "bonn_000001_000019"),
        ("val", "ulm_000000_000019"),
    ):
        place = Path(split) / name.split("_")[0]
        save_image(tmp_path / "leftImg8bit" / place / f"{name}_leftImg8bit.png", (5, 7))
        ids = np.concatenate([DRAW.permutation(34), [255]]).astype(np.uint8).reshape(5, 7)
        save_mask(tmp_path / "gtFine" / place / f"{name}_gtFine_labelIds.png", ids)
        save_mask(tmp_path / "gtFine" / place / f"{name}_gtFine_instanceIds.png", ids)
    return tmp_path


def train_ids(ids: np.ndarray) -> np.ndarray:
    """The published table, spelt out."""
    table = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
    table |= {28: 15, 31: 16, 32: 17, 33: 18}
    return np.vectorize(lambda id_: table.get(id_, 255))(ids).astype(np.uint8)


def test_cityscapes_items_from_either_kind_of_mask(city: Path):
    assert detect(city) == "cityscapes"
    data = Cityscapes(city, "train")
    assert data.names == ("aachen_000000_000019_leftImg8bit", "bonn_000001_000019_leftImg8bit")
    masks = sorted((city / "gtFine" / "train").glob("*/*_labelIds.png"))
    with Image.open(masks[1]) as picture:
        wanted = train_ids(np.array(picture))
    assert data[1][1].tolist() == wanted.tolist() and sorted(set(wanted.flat)) == [*range(19), 255]
    for path in masks:
        with Image.open(path) as picture:
            save_mask(path.with_name(path.name.replace("labelIds", "labelTrainIds")), train_ids(np.array(picture)))
        path.unlink()
    again = Cityscapes(city, "train")
    assert [again.mask(i).tolist() for i in (0, 1)] == [data.mask(i).tolist() for i in (0, 1)]


def test_cityscapes_names_and_colours():
    assert list(cityscapes.CLASSES.items())[13] == ("car", (0, 0, 142)) and len(cityscapes.CLASSES) == 19
    assert len(set(cityscapes.CLASSES.values())) == 19


def test_cityscapes_errors(city: Path):
    with pytest.raises(ValueError, match=r"the masks of test are not public"):
        Cityscapes(city, "test")
    mask = next((city / "gtFine" / "val").glob("*/*_labelIds.png"))
    save_mask(mask, np.full((5, 7), 34, np.uint8))
    with pytest.raises(
        ValueError, match=r"holds the value 34: in Cityscapes, classes are 7, 8, 11, .*, and 0, 1, .*255"
    ):
        Cityscapes(city, "val")
    mask.unlink()
    with pytest.raises(
        ValueError, match=r"ulm_000000_000019_leftImg8bit.png has no .*ulm/ulm_.*labelIds.png: unpack gtFi"
    ):
        Cityscapes(city, "val")
    (city / "gtFine").rename(city / "fine")
    with pytest.raises(ValueError, match=r"gtFine/val is not a folder: .*gtFine_trainvaltest.zip"):
        Cityscapes(city, "val")
    (city / "gtFine").symlink_to(city / "fine")
    for image in (city / "leftImg8bit" / "val").glob("*/*"):
        image.unlink()
    with pytest.raises(ValueError, match=r"holds no CITY/\*_leftImg8bit.png"):
        Cityscapes(city, "val")


def folder_of(root: Path, count: int, classes: int = 3) -> Path:
    for number in range(count):
        save_image(root / "images" / f"{number}.png", SIZES[0])
        save_mask(root / "masks" / f"{number}.png", np.full(SIZES[0], number % classes, np.uint8))
    return root


def test_the_last_tenth_of_a_folder_is_held_out(tmp_path: Path):
    folder_of(tmp_path, 21)
    assert detect(tmp_path) == "folder" and SceneFolder.scored_split(tmp_path) == "val"
    train, val = SceneFolder(tmp_path, "train"), SceneFolder(tmp_path, "val")
    assert train.names == tuple(map(str, range(19))) and val.names == ("19", "20")
    assert (train.classes, train.colours) == (("class 0", "class 1", "class 2"), ())
    assert val[0][1].unique().tolist() == [1]


def test_a_folder_with_splits_of_its_own_and_named_classes(tmp_path: Path):
    for split, count in (("train", 4), ("val", 1), ("test", 2)):
        folder_of(tmp_path / split, count)
    (tmp_path / "classes.txt").write_text("ground 0 0 0\n\nred car 200 30 31\ntree 0 99 0\nbird 1 2 3\n")
    assert detect(tmp_path) == "folder" and SceneFolder.scored_split(tmp_path) == "test"
    sets = [open_split("folder", tmp_path, split) for split in ("train", "val", "test")]
    assert [len(data) for data in sets] == [4, 1, 2]
    assert {data.classes for data in sets} == {("ground", "red car", "tree", "bird")}
    assert sets[1].colours == ((0, 0, 0), (200, 30, 31), (0, 99, 0), (1, 2, 3))


def test_grey_images_and_binary_masks_of_a_folder(tmp_path: Path):
    deep = DRAW.integers(0, 65536, (4, 6), dtype=np.uint16)
    for number in range(2):
        save_mask(tmp_path / "image" / f"{number}.tif", deep)
        save_mask(tmp_path / "label" / f"{number}.png", np.where(deep > 30000, 255, 0).astype(np.uint8))
    image, mask = SceneFolder(tmp_path, "train")[0]
    assert image.shape == (3, 4, 6) and torch.equal(image[0], image[2])
    torch.testing.assert_close(image[0], torch.from_numpy(deep / np.float32(65535)), rtol=0, atol=1 / 255)
    assert mask.tolist() == (deep > 30000).astype(int).tolist()


def test_folder_errors(tmp_path: Path):
    folder_of(tmp_path, 1)
    with pytest.raises(ValueError, match="holds one pair of image and mask"):
        SceneFolder(tmp_path, "train")
    folder_of(tmp_path, 4)
    with pytest.raises(ValueError, match="split='test': .* has train, val"):
        SceneFolder(tmp_path, "test")
    (tmp_path / "classes.txt").write_text("ground 0 0 0\ncar\nsky\n")
    with pytest.raises(ValueError, match=r"classes.txt must hold a class on each line, all with a colour"):
        SceneFolder(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("ground\ncar\n")
    with pytest.raises(ValueError, match=r"masks/2.png holds the value 2: in the folder, classes are 0, 1, and 255"):
        SceneFolder(tmp_path, "train")


def test_a_folder_that_is_no_set(tmp_path: Path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        detect(tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        ValueError, match=r"no data set known here, but pictures. Known are camvid: train/.*voc: JPEGIma"
    ):
        detect(tmp_path)


def test_a_large_set_is_read_from_disk_each_time_and_checked_first(city: Path, monkeypatch):
    kept = Cityscapes(city, "train")
    monkeypatch.setattr("backstride.models.data.scenes.CACHE_LIMIT", 0)
    data = Cityscapes(city, "train")
    for i in range(2):
        assert all(map(torch.equal, data[i], kept[i])) and torch.equal(data.mask(i), kept.mask(i))
    path = sorted((city / "gtFine" / "train").glob("*/*_labelIds.png"))[1]
    save_mask(path, np.full((5, 7), 7, np.uint8))
    assert not data.mask(1).any() and kept.mask(1).any()
    save_mask(path, np.full((5, 7), 99, np.uint8))
    with pytest.raises(ValueError, match="bonn.* holds the value 99"):
        Cityscapes(city, "train")


def task_on(root: Path, **settings) -> SceneTask:
    fixed = {"network": "segnet-basic", "width": 2, "ops": "torch", "batch_size": 2}
    training, validation, config = open_scenes(SceneConfig(data=str(root), **(fixed | settings)))
    return SceneTask(config, training, validation)


def test_images_of_several_sizes_are_trained_on_in_windows(devkit: Path):
    with pytest.raises(
        ValueError, match=r"the images have 2 sizes, from 5 x 9 to 6 x 8 pixels, and a batch .*--crop 321"
    ):
        task_on(devkit)
    task_on(devkit, batch_size=1)
    task = task_on(devkit, crop=4)
    images, targets, weights = task.batch(0)
    assert images.shape == (2, 3, 4, 4) and targets.shape == weights.shape == (2, 4, 4)
    larger = task_on(devkit, crop=12, class_weights="none")
    images, targets, weights = larger.batch(0)
    assert images.shape == (2, 3, 12, 12) and torch.equal(weights, (targets != 255).float())
    with pytest.raises(ValueError, match="crop=-1: must be positive, or 0"):
        task_on(devkit, crop=-1)


def test_windows_of_image_and_mask_lie_on_each_other(tmp_path: Path):
    for number in range(3):
        mask = save_mask(tmp_path / "label" / f"{number}.png", DRAW.integers(0, 3, (9, 11), dtype=np.uint8))
        save_mask(tmp_path / "image" / f"{number}.png", 80 * mask)
    task = task_on(tmp_path, crop=5)
    for step in range(4):
        images, targets, _ = task.batch(step)
        red = images[:, 0] * task.config.std[0] + task.config.mean[0]
        torch.testing.assert_close(red * 255 / 80, targets.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["voc", "cityscapes", "folder"])
def test_the_command_trains_on_each_set(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    fixtures = {"voc": "devkit", "cityscapes": "city"}
    data = request.getfixturevalue(fixtures[kind]) if kind in fixtures else folder_of(tmp_path / "own", 4)
    out = tmp_path / "run"
    options = f"--data {data} --out {out} --width 2 --steps 1 --batch-size 2 --crop 8 --ops torch"
    if kind == "voc":
        options += " --split train_aug"
    done = CliRunner().invoke(app, ["train", "segnet-basic", *options.split()])
    assert done.exit_code == 0, done.output
    assert "val split" in done.output and (out / "overlay.png").stat().st_size > 5000
    config = SceneConfig.read(out)
    assert (config.dataset, len(config.classes)) == (kind, {"voc": 21, "cityscapes": 19, "folder": 3}[kind])
    picture = tmp_path / "picture.png"
    save_image(picture, (20, 90))
    done = CliRunner().invoke(app, ["predict", str(picture), "--checkpoint", str(out), "--out", str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
