"""Table 1 as one homography, against torchvision's operations applied one after the other."""

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import InterpolationMode

from common import augment, center, draw_augmentation, homographies, warp

SIZE, S = 96, 128
SIZES = torch.tensor([[150, 200], [200, 150], [180, 180], [90, 240]])  # original height, width


def ramps(n=4):
    """Images that tell where a pixel came from: channel 0 grows with x, 1 with y, 2 is full. Interpolation
    keeps linear functions, so values read after a warp are source coordinates in pixels, + 50."""
    line = torch.arange(S, dtype=torch.uint8)
    x, y = line.expand(S, S) + 50, line[:, None].expand(S, S) + 50
    return torch.stack([x, y, torch.full((S, S), 250, dtype=torch.uint8)]).repeat(n, 1, 1, 1)


def one_by_one(image, original, crop, flip, angle, shift, zoom, corners):
    """The same on one image (3, S, S), each step a torchvision function, all bilinear."""
    height, width = original.tolist()
    top, left, h, w = (crop * torch.tensor([S / height, S / width] * 2)).tolist()  # on the squeezed image
    theta = torch.tensor([[[w / S, 0, (2 * left + w) / S - 1], [0, h / S, (2 * top + h) / S - 1]]])
    grid = torch.nn.functional.affine_grid(theta, (1, 3, SIZE, SIZE), align_corners=False)  # F.crop takes whole pixels only
    x = torch.nn.functional.grid_sample(image[None].float(), grid, align_corners=False, padding_mode="border")[0]
    x = TF.hflip(x) if flip else x
    x = TF.rotate(x, float(angle), InterpolationMode.BILINEAR)
    x = TF.affine(x, 0, [float(v) * SIZE for v in shift], float(zoom), [0.0], InterpolationMode.BILINEAR)
    start = [[0, 0], [SIZE, 0], [SIZE, SIZE], [0, SIZE]]
    return TF.perspective(x, start, (corners * SIZE).round().int().tolist(), InterpolationMode.BILINEAR)


FIXED = {
    "crop": torch.tensor([[10.0, 20, 120, 130], [5, 5, 160, 140], [0, 0, 180, 180], [3, 40, 80, 100]]),
    "flip": torch.tensor([False, True, False, True]),
    "angle": torch.tensor([0.0, 12.0, -15.0, 7.0]),
    "shift": torch.tensor([[0.0, 0.0], [0.1, -0.05], [-0.0625, 0.1], [0.03125, 0.0]]),
    "zoom": torch.tensor([1.0, 1.1, 0.9, 0.95]),
    "corners": torch.tensor([[[0, 0], [1, 0], [1, 1], [0, 1]], [[6, 3], [90, 5], [91, 92], [2, 90]],
                             [[0, 9], [96, 0], [88, 96], [9, 87]], [[4, 4], [93, 1], [96, 95], [0, 90]]]) / torch.tensor([[[1.0]], [[SIZE]], [[SIZE]], [[SIZE]]]),
}
NEUTRAL = {"angle": torch.zeros(4), "shift": torch.zeros(4, 2), "zoom": torch.ones(4), "corners": FIXED["corners"][:1].repeat(4, 1, 1)}


@pytest.mark.parametrize("step", ["crop", "flip", "angle", "shift", "zoom", "corners", "all"])
def test_against_torchvision(step):
    fixed = FIXED if step == "all" else {**FIXED, **NEUTRAL, "flip": torch.zeros(4, dtype=torch.bool)}
    if step in FIXED:
        fixed = {**fixed, step: FIXED[step]}
    ours = warp(ramps(), *homographies(SIZES, **fixed), SIZE) * 255
    for i in range(4):
        expected = one_by_one(ramps(1)[0], SIZES[i], **{key: value[i] for key, value in fixed.items()})
        visible = (expected[2] > 249.5) & (ours[i, 2] > 249.5)  # where neither touches the black outside
        assert ((expected[2] > 125) == (ours[i, 2] > 125)).float().mean() > 0.985  # they see the same region
        assert visible.float().mean() > 0.4
        inner = -torch.nn.functional.max_pool2d(-visible[None].float(), 5, 1, 2)[0] > 0  # interpolation blurs edges step by step
        assert (ours[i] - expected)[:, inner].abs().max() < 0.1, f"image {i}"  # a tenth of a pixel


def test_black_outside_is_where_torchvision_has_it():
    """Turning shows black corners even where the source image goes on outside the crop."""
    fixed = {**FIXED, **NEUTRAL, "angle": torch.full((4,), 15.0)}
    ours = warp(ramps(), *homographies(SIZES, **fixed), SIZE)
    assert (ours[:, :, 0, 0] == 0).all() and (ours[:, :, -1, -1] == 0).all() and (ours[:, 2, SIZE // 2, SIZE // 2] > 0.9).all()


def test_parameters_follow_table_1():
    sizes = torch.tensor([[400, 400]]).repeat(4000, 1)
    drawn = draw_augmentation(sizes, "table1", torch.Generator().manual_seed(0))
    top, left, h, w = drawn["crop"].T
    area = h * w / 400**2
    assert 0.69 < area.min() < 0.72 and 0.98 < area.max() <= 1
    assert 0.74 < (w / h).min() < 0.85 and 1.30 < (w / h).max() < 1.34
    assert top.min() == 0 and left.min() == 0 and (top + h).max() == 400 and (left + w).max() == 400
    assert 14.9 < drawn["angle"].abs().max() <= 15 and abs(drawn["angle"].mean()) < 0.5
    assert 0.099 < drawn["shift"].abs().max() <= 0.1
    assert 0.9 <= drawn["zoom"].min() < 0.901 and 1.099 < drawn["zoom"].max() <= 1.1
    inwards = (drawn["corners"] - torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])).abs()
    assert 0.099 < inwards.max() <= 0.1 and 0.45 < (inwards.amax((1, 2)) > 0).double().mean() < 0.55
    assert (drawn["corners"] >= 0).all() and (drawn["corners"] <= 1).all()
    assert 0.45 < drawn["flip"].double().mean() < 0.55


def test_crop_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(1, 200, 300)
    reference = torch.tensor([RandomResizedCrop.get_params(image, [0.7, 1.0], [0.75, 1.33]) for _ in range(3000)]).double()
    ours = draw_augmentation(torch.tensor([[200, 300]]).repeat(3000, 1), "crop-flip")["crop"]
    for k in range(4):  # quantiles of top, left, height, width
        for q in (0.1, 0.5, 0.9):
            assert abs(ours[:, k].quantile(q) - reference[:, k].quantile(q)) < 5


def test_very_long_images_fall_back_to_the_central_crop():
    image = torch.zeros(1, 40, 400)
    expected = RandomResizedCrop.get_params(image, [0.7, 1.0], [0.75, 1.33])  # no box of that shape fits
    assert draw_augmentation(torch.tensor([[40, 400]]), "crop-flip")["crop"][0].tolist() == list(expected)


def test_batch_composition_and_slices_do_not_matter():
    images, sizes = torch.randint(0, 255, (21, 3, 256, 256), dtype=torch.uint8), torch.full((21, 2), 256)
    drawn = draw_augmentation(sizes, "table1")
    to_image, frames = homographies(sizes, **drawn)
    together = warp(images, to_image, frames, 224)
    alone = torch.cat([warp(images[i:i + 1], to_image[i:i + 1], [m[i:i + 1] for m in frames], 224) for i in range(21)])
    assert torch.equal(together, alone) and 0 <= together.min() and together.max() <= 1


def test_none_and_crop_flip_and_seed():
    images, sizes = ramps(), SIZES
    assert torch.equal(augment(images, sizes, SIZE, "none"), center(images, SIZE))
    assert augment(images, sizes, SIZE, "crop-flip")[:, 2].min() > 0.97  # no black corners
    one, two, three = (augment(images, sizes, SIZE, "table1", torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_center_takes_the_middle():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[..., 1:7, 1:7] = 255
    assert center(images, 6).min() == 1 and center(images, 8).min() == 0
