import numpy as np
import pytest
import torch
from backstride.models.visual import (
    class_map,
    loss_curve,
    overlay,
    palette,
    probability_map,
    sample_sheet,
    save_picture,
)
from PIL import Image


def striped(height=12, width=20, classes=3):
    """A mask of vertical stripes 0, 1, …, each as wide as the next."""
    return (torch.arange(width) * classes // width).expand(height, width).clone()


def test_class_map_keeps_the_classes_as_pixel_values(tmp_path):
    mask = striped()
    mask[0, 0] = 255
    save_picture(class_map(mask), tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.mode == "P"
        assert np.array(picture).tolist() == mask.tolist()
        colours = np.array(picture.convert("RGB"))
    assert colours[5, 0].tolist() == [0, 0, 0] and colours[0, 0].tolist() == palette()[255].tolist()


def test_the_first_twenty_one_classes_have_different_colours():
    assert len({tuple(colour) for colour in palette()[:22].tolist()}) == 22


def test_probability_map_is_read_back_to_half_a_grey_level():
    probability = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    grey = np.array(probability_map(probability))
    assert grey.dtype == np.uint8 and grey.shape == (7, 9)
    assert np.abs(grey / 255 - probability.numpy()).max() <= 0.5 / 255 + 1e-7
    with pytest.raises(ValueError, match=r"\[7, 9\] with values from 1 to 1\.9"):
        probability_map(1 + 0 * probability + 0.99 * (probability > probability.median()))


def test_overlay_leaves_class_0_tints_the_others_and_outlines_them():
    image = torch.full((1, 12, 20), 0.5)
    mask = torch.zeros(12, 20, dtype=torch.int64)
    mask[2:10, 4:16] = 2
    picture = np.array(overlay(image, mask)).astype(float)
    grey, colour = np.full(3, 127.5), palette()[2].astype(float)
    np.testing.assert_allclose(picture[mask == 0], np.broadcast_to(grey, (144, 3)), atol=0.5)
    assert picture[2, 8].tolist() == colour.tolist()
    # The inside lies on the line between grey and the colour, nearer to the image than to the colour.
    share = (picture[5, 8] - grey) / (colour - grey)
    assert np.ptp(share) < 0.05 and 0.2 < share.mean() < 0.5


def test_overlay_of_a_colour_image_and_ignored_pixels():
    image = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(6, 8, dtype=torch.int64)
    plain = np.array(overlay(image, mask))
    assert np.abs(plain - 255 * image.permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-4
    mask[:3] = 255
    assert (np.array(overlay(image, mask))[2] == palette()[255]).all()


def test_the_legend_shows_each_name_beside_its_colour():
    image, mask = torch.zeros(1, 40, 300), striped(40, 300)
    picture = overlay(image, mask, ["road", "a name that is rather long", "tree"])
    assert picture.width == 300 and picture.height > 40
    legend = np.array(picture)[40:]
    for number in (1, 2):
        assert (legend == palette()[number]).all(-1).sum() > 100
    narrow = overlay(image[..., :120], striped(40, 120), ["road", "a long name", "tree"])
    assert narrow.height > picture.height


def test_only_classes_that_occur_are_in_the_legend_and_it_is_as_wide_as_a_name():
    image, mask = torch.zeros(1, 40, 30), torch.full((40, 30), 2)
    picture = overlay(image, mask, ["road", "river", "a name that is wider than the picture"])
    assert picture.width > 200 and picture.height < 80
    legend = np.array(picture)[40:]
    assert (legend == palette()[2]).all(-1).sum() > 100 and not (legend == palette()[1]).all(-1).any()


def test_classes_in_black_are_left_as_they_are_and_ignored_pixels_are_no_one_s_colour():
    image, mask = torch.full((3, 6, 8), 0.5), torch.zeros(6, 8, dtype=torch.int64)
    mask[3:] = 255
    picture = np.array(overlay(image, mask, colours=[(0, 0, 0), (150, 150, 150)]))
    assert (picture[:3] == 128).all() and (picture[3] == (224, 224, 192)).all()
    assert np.reshape(class_map(mask, [(9, 8, 7)]).getpalette(), (-1, 3))[[0, 1, 255]].tolist() == [
        [9, 8, 7],
        palette()[1].tolist(),
        [224, 224, 192],
    ]


def test_picture_errors():
    image, mask = torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[1, 4, 4\] and mask \[3, 4\] differ in size"):
        overlay(image, mask[1:])
    with pytest.raises(ValueError, match=r"its shape is \[2, 4, 4\]"):
        overlay(image.expand(2, 4, 4), mask)
    with pytest.raises(ValueError, match=r"torch.float32 \[4, 4\]"):
        class_map(mask.float())
    with pytest.raises(ValueError, match="from 0 to 300"):
        class_map(mask + 300 * torch.eye(4, dtype=torch.int64))


HISTORY = {
    "train": [(step, 2.0 / step + 0.3) for step in range(1, 121)],
    "validation": [(40, 0.6), (80, 0.5), (120, 0.45)],
}


def drawn(monkeypatch, history, path):
    """The axes that loss_curve draws, caught when it saves them."""
    caught = []
    monkeypatch.setattr("backstride.models.visual.Figure.savefig", lambda figure, *_, **__: caught.append(figure))
    loss_curve(history, path)
    return caught[0].axes[0]


def test_loss_curve_shows_each_curve(tmp_path, monkeypatch):
    axes = drawn(monkeypatch, HISTORY, tmp_path / "loss.png")
    raw, smooth, validation = axes.lines
    assert list(zip(*raw.get_data(), strict=True)) == HISTORY["train"]
    assert list(zip(*validation.get_data(), strict=True)) == HISTORY["validation"]
    # The mean over 6 steps stands in the middle of them.
    steps, losses = smooth.get_data()
    assert (steps[0], len(steps)) == (4, 115)
    assert losses[0] == pytest.approx(np.mean([loss for _, loss in HISTORY["train"][:6]]))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["train (mean over 6 steps)", "validation"]
    assert axes.get_xlabel() == "training step" and "nats" in axes.get_ylabel() and axes.get_title()


def test_loss_axis_is_logarithmic_only_for_a_wide_span(tmp_path, monkeypatch):
    assert drawn(monkeypatch, HISTORY, tmp_path / "a.png").get_yscale() == "linear"
    wide = {"train": [(1, 10.0), (2, 0.01)]}
    assert drawn(monkeypatch, wide, tmp_path / "b.png").get_yscale() == "log"


def test_loss_curve_of_short_and_empty_histories(tmp_path):
    loss_curve({"train": [(1, 0.7)], "validation": []}, tmp_path / "loss.png")
    loss_curve({"train": []}, tmp_path / "empty.png")
    for name in ("loss.png", "empty.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (960, 540)


def test_sample_sheet_scores_the_predictions(tmp_path, monkeypatch):
    image, truth = torch.rand(1, 24, 30, generator=torch.Generator().manual_seed(0)), striped(24, 30, 2)
    before, after = torch.zeros_like(truth), truth
    caught = []
    monkeypatch.setattr("backstride.models.visual.Figure.savefig", lambda figure, *_, **__: caught.append(figure))
    sample_sheet([(image, truth, before, after)] * 2, tmp_path / "sheet.png", names=["a", "b"])
    axes = caught[0].axes
    assert [cell.get_title() for cell in axes[:4]] == ["image", "truth", "before", "after"]
    assert [cell.get_xlabel() for cell in axes[:4]] == ["", "", "mean IoU 0.250", "mean IoU 1.000"]
    assert [axes[0].get_ylabel(), axes[4].get_ylabel()] == ["a", "b"]


def test_sample_sheet_colours_regions_of_two_classes_apart(tmp_path, monkeypatch):
    image, truth = torch.zeros(1, 20, 20), torch.zeros(20, 20, dtype=torch.int64)
    truth[2:8, 2:18] = truth[12:18, 2:18] = 1
    caught = []
    monkeypatch.setattr("backstride.models.visual.Figure.savefig", lambda figure, *_, **__: caught.append(figure))
    sample_sheet([(image, truth)], tmp_path / "sheet.png", columns=("image", "truth"))
    shown = np.array(caught[0].axes[1].images[0].get_array())
    assert shown[5, 10].tolist() != shown[15, 10].tolist() != [0, 0, 0]


def test_sample_sheet_writes_a_picture_and_checks_the_columns(tmp_path):
    image, truth = torch.rand(3, 24, 30), striped(24, 30, 3)
    truth[:2] = 255
    sample_sheet([(image, truth, truth)], tmp_path / "sheet.png", columns=("image", "truth", "prediction"))
    with Image.open(tmp_path / "sheet.png") as picture:
        assert np.array(picture).std() > 10
    with pytest.raises(ValueError, match="a row of 3 pictures does not fit the 4 columns"):
        sample_sheet([(image, truth, truth)], tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "map.png"
    save_picture(class_map(striped()), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk went away")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="the disk went away"):
        save_picture(class_map(striped(classes=2)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_sample_sheet_with_a_legend(tmp_path, monkeypatch):
    image, truth = torch.zeros(3, 20, 60), striped(20, 60, 2)
    truth[0] = 255
    caught = []
    monkeypatch.setattr("backstride.models.visual.Figure.savefig", lambda figure, *_, **__: caught.append(figure))
    colours = [(0, 0, 0), (10, 200, 30), (1, 2, 3)]
    columns, names = ("image", "truth", "prediction"), ["ground", "tree", "bird"]
    sample_sheet([(image, truth, truth)], tmp_path / "sheet.png", columns, classes=names, colours=colours)
    (legend,) = caught[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["ground", "tree", "not counted"]
    drawn = [tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in legend.get_patches()]
    assert drawn == [(255, 255, 255), (10, 200, 30), (224, 224, 192)]
    # Two named classes aren't regions, and a flat picture has a flat row.
    shown = np.array(caught[0].axes[1].images[0].get_array())
    assert shown[10, 50].tolist() == [round(0.38 * part) for part in (10, 200, 30)]
    assert caught[0].get_figheight() < 2
