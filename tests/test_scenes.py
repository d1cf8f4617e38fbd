import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backstride.models.cli import app
from backstride.models.data.camvid import CLASSES, VOID, CamVid
from backstride.models.losses import median_frequency_weights
from backstride.models.metrics import ConfusionMatrix
from backstride.models.predict import normalise
from backstride.models.segmentation.networks import NETWORKS, build_scene_network
from backstride.models.training.config import SceneConfig
from backstride.models.training.scenes import SceneTask, evaluate_scenes, open_scenes
from backstride.models.visual import overlay
from PIL import Image
from typer.testing import CliRunner


def write_scenes(root: Path, count: int = 5, size: tuple[int, int] = (16, 20)) -> Path:
    """CamVid's layout: four stripes from the top down, each with a colour of its own; the last row is void."""
    generator = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for folder in (root / split, root / f"{split}annot"):
            folder.mkdir(parents=True)
        for number in range(count):
            rows = (np.arange(size[0]) + generator.integers(0, 4)) * 4 // (size[0] + 3)
            mask = np.broadcast_to(rows[:, None], size).astype(np.uint8).copy()
            image = np.stack([60 * mask, 255 - 60 * mask, generator.integers(0, 255, size)], -1).astype(np.uint8)
            mask[-1] = VOID
            Image.fromarray(image).save(root / split / f"{number}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{number}.png")
    return root


@pytest.fixture
def scenes(tmp_path) -> Path:
    return write_scenes(tmp_path / "camvid")


def task_on(root: Path, **settings) -> SceneTask:
    fixed = {"network": "segnet-basic", "width": 4, "steps": 2, "every": 1, "batch_size": 2, "ops": "torch"}
    training, validation, config = open_scenes(SceneConfig(data=str(root), **(fixed | settings)))
    return SceneTask(config, training, validation)


def test_camvid_items(scenes):
    data = CamVid(scenes, "train")
    image, mask = data[1]
    with Image.open(scenes / "train" / "1.png") as picture:
        torch.testing.assert_close(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
    with Image.open(scenes / "trainannot" / "1.png") as picture:
        classes = np.array(picture)
    assert mask.tolist() == np.where(classes == 11, 255, classes).tolist() and (mask[-1] == 255).all()
    assert (len(data), data.names[:2], mask.dtype) == (5, ("0", "1"), torch.int64)


def test_scaled_items(scenes):
    image, mask = CamVid(scenes, "val", 3)[0]
    whole, classes = CamVid(scenes, "val")[0]
    assert image.shape == (3, 5, 6) and mask.shape == (5, 6)
    for row, column in itertools.product(range(5), range(6)):
        block = whole[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        torch.testing.assert_close(image[:, row, column], block.mean((1, 2)), rtol=0, atol=0.51 / 255)
        assert mask[row, column] == classes[3 * row + 1, 3 * column + 1]


def test_camvid_errors(scenes):
    with pytest.raises(ValueError, match="split='all' is unknown"):
        CamVid(scenes, "all")
    with pytest.raises(ValueError, match="train is not a folder: give the folder of CamVid"):
        CamVid(scenes / "train", "train")
    with pytest.raises(ValueError, match="scale=0"):
        CamVid(scenes, "train", 0)
    Image.fromarray(np.full((16, 20), 12, np.uint8)).save(scenes / "trainannot" / "3.png")
    with pytest.raises(ValueError, match=r"3.png holds the value 12: in CamVid, classes are 0 ... 10, and 11 doesn't"):
        CamVid(scenes, "train")
    Image.fromarray(np.zeros((16, 21), np.uint8)).save(scenes / "trainannot" / "3.png")
    with pytest.raises(ValueError, match=r"trainannot/3.png is 21 x 16 pixels, but .*train/3.png is 20 x 16"):
        CamVid(scenes, "train")


def test_the_real_set(data_dir):
    data = CamVid(data_dir / "camvid", "val")
    assert len(data) == 101 and data[0][0].shape == (3, 360, 480)
    values = torch.cat([mask.unique() for _, mask in (data[i] for i in range(101))]).unique()
    assert values.tolist() == [*range(11), 255]


def test_median_frequency_weights_by_hand():
    masks = [torch.tensor([[0, 0, 0, 1], [0, 0, 255, 255]]), torch.tensor([[0, 2, 2, 2]])]
    # f = 6 / 12, 1 / 8, 3 / 4: class 1 is in the first mask only, class 2 in the second, class 3 nowhere.
    torch.testing.assert_close(median_frequency_weights(masks, 4), torch.tensor([1.0, 4.0, 2 / 3, 0.0]))
    with pytest.raises(ValueError, match="range from 0 to 2"):
        median_frequency_weights(masks, 2)


def test_scores_are_the_published_scorer_s():
    """The formulae of the scorer that FCN's authors publish, on its histogram n_ij."""
    draw = torch.Generator().manual_seed(0)
    pred, target = torch.randint(0, 4, (2, 30, 40), generator=draw)
    target[pred == 3] = 3
    target[:4] = 255
    confusion = ConfusionMatrix(5)  # class 4 never occurs
    confusion.update(pred, target)
    kept = target != 255
    n = np.histogram2d(target[kept].numpy(), pred[kept].numpy(), bins=5, range=[[-0.5, 4.5], [-0.5, 4.5]])[0]
    with np.errstate(invalid="ignore"):
        accuracy = np.diag(n) / n.sum(1)
        iou = np.diag(n) / (n.sum(1) + n.sum(0) - np.diag(n))
    frequency = n.sum(1) / n.sum()
    assert confusion.fcn_scores() == pytest.approx(
        {
            "pixel_accuracy": np.diag(n).sum() / n.sum(),
            "mean_accuracy": np.nanmean(accuracy),
            "mean_iou": np.nanmean(iou),
            "frequency_weighted_iou": (frequency[frequency > 0] * iou[frequency > 0]).sum(),
        }
    )


def test_void_counts_neither_in_the_loss_nor_in_the_scores(scenes):
    task = task_on(scenes)
    images, targets, weights = task.batch(0)
    assert images.shape == (2, 3, 16, 20) and (targets == 255).any() and not weights[targets == 255].any()
    network, loss = task.network, task.loss((images, targets, weights))
    logits = network(images)
    wanted = F.cross_entropy(logits, targets, task.class_weights, ignore_index=255)
    torch.testing.assert_close(loss, wanted)
    network.eval()
    scores = evaluate_scenes(task, task.validation)
    for mask in task.validation._masks:
        assert (mask == 255).any()
        mask[mask == 255] = 0
    assert evaluate_scenes(task, task.validation) != scores


def test_batches_show_every_image_once_and_mirror_some(scenes):
    task = task_on(scenes, batch_size=5)
    images = [normalise(task.training[i][0], task.config.mean, task.config.std) for i in range(5)]
    mirrored = 0
    for step in range(4):
        batch = task.batch(step)[0]
        for image in images:
            plain, turned = ((batch == view).all(3).all(2).all(1).sum() for view in (image, image.flip(-1)))
            assert plain + turned == 1
            mirrored += int(turned)
    assert 3 < mirrored < 17
    assert torch.equal(task.batch(2)[0], task.batch(2)[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_built_narrow(name):
    network = build_scene_network(name, 7, 2, "torch").eval()
    size = tuple(max(getattr(network, "smallest", 1), least) for least in (20, 30))
    assert network(torch.zeros(1, 3, *size)).shape == (1, 7, *size)
    with pytest.raises(ValueError, match="width=0"):
        build_scene_network(name, 7, 0, "torch")
    with pytest.raises(ValueError, match=f"network='lenet' is unknown: choose .*{name}"):
        build_scene_network("lenet", 7, 2, "torch")


def test_overlay_in_camvid_s_colours():
    image, mask = torch.full((3, 30, 400), 0.5), (torch.arange(400) // 34).expand(30, 400).clamp_max(10).clone()
    mask[:5] = 255
    picture = np.array(overlay(image, mask, list(CLASSES), list(CLASSES.values())))
    assert picture.shape[0] > 30
    for number, colour in enumerate(CLASSES.values()):
        legend = picture[30:].reshape(-1, 3)
        assert (legend == colour).all(-1).sum() > 100
        wanted = 0.62 * 127.5 + 0.38 * np.array(colour)
        np.testing.assert_allclose(picture[20, 34 * number + 15], wanted, atol=1)
    assert picture[2, 17].tolist() == pytest.approx([0.62 * 127.5 + 0.38 * part for part in (224, 224, 192)], abs=1)


def test_the_command_trains_scores_and_draws(scenes, tmp_path):
    out = tmp_path / "run"
    options = f"--data {scenes} --out {out} --width 4 --every 20 --batch-size 2 --optimizer adamw --lr 0.02 --ops torch"
    done = CliRunner().invoke(app, ["train", "segnet-basic", *options.split(), "--steps", "40"])
    assert done.exit_code == 0, done.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pixel_accuracy"] > 0.7 > 2 * metrics["commonest_class"] and metrics["iou_road"] > 0.3
    assert "iou_bicyclist" not in metrics
    assert SceneConfig.read(out).network == "segnet-basic"
    for name in ("overlay.png", "loss.png", "samples/step-000040.png"):
        with Image.open(out / name) as picture:
            assert np.array(picture).std() > 5
    again = CliRunner().invoke(app, ["train", "segnet-basic", "--out", str(out), "--resume"])
    assert again.exit_code == 0, again.output


def test_the_command_asks_for_data(tmp_path):
    done = CliRunner().invoke(app, ["train", "segnet", "--out", str(tmp_path)])
    assert isinstance(done.exception, ValueError) and "--data is missing" in str(done.exception)
