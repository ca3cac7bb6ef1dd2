"""Group accuracies on hand-made numbers and against a slow loop."""

import math

import pytest
import torch

from common import describe_groups, evaluate, group_report, predict, read_metadata, load_split

GROUPS = describe_groups(["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"], [60, 4, 6, 30], 2)


def test_eight_rows_by_hand():
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    a = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    report = group_report(predicted, y, 2 * y + a, GROUPS)
    assert [(g["n"], g["correct"]) for g in report["groups"]] == [(3, 2), (2, 1), (1, 0), (2, 2)]
    assert [g["acc"] for g in report["groups"]] == [2 / 3, 1 / 2, 0, 1]
    assert [g["minority"] for g in report["groups"]] == [False, True, True, False]
    assert (report["worst_group"], report["acc_worst"]) == (2, 0)  # the worst, not the best
    assert report["acc_mean"] == 5 / 8
    assert report["acc_mean_train_mix"] == pytest.approx((60 * 2 / 3 + 4 * 1 / 2 + 6 * 0 + 30 * 1) / 100)


def test_the_worst_group_need_not_be_a_minority():
    y, a = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    report = group_report(torch.tensor([1, 0, 1, 1]), y, 2 * y + a, GROUPS)
    assert report["worst_group"] == 0 and not report["groups"][0]["minority"]


def test_an_empty_group_is_left_out():
    y, a = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    report = group_report(torch.tensor([0, 0, 0]), y, 2 * y + a, GROUPS)
    assert report["groups"][2] == {"group": 2, "name": "waterbird on land", "n": 0, "correct": 0, "acc": None, "minority": True}
    assert (report["worst_group"], report["acc_worst"]) == (3, 0)
    assert report["acc_mean"] == 2 / 3 and report["acc_mean_train_mix"] == pytest.approx((60 + 4) / (60 + 4 + 30))


@pytest.mark.parametrize("n_classes, n_attributes", [(2, 2), (3, 2), (2, 4)])
def test_against_a_slow_loop(n_classes, n_attributes):
    generator = torch.Generator().manual_seed(n_classes)
    y = torch.randint(n_classes, (500,), generator=generator)
    a = torch.randint(n_attributes, (500,), generator=generator)
    predicted = torch.where(torch.rand(500, generator=generator) < 0.7, y, torch.randint(n_classes, (500,), generator=generator))
    train_counts = torch.randint(1, 100, (n_classes * n_attributes,), generator=generator).tolist()
    report = group_report(predicted, y, y * n_attributes + a, describe_groups("abcdefgh", train_counts, n_attributes))
    accuracies = []
    for c in range(n_classes):
        for b in range(n_attributes):
            hits = [int(predicted[i] == y[i]) for i in range(500) if y[i] == c and a[i] == b]
            row = report["groups"][c * n_attributes + b]
            assert (row["n"], row["correct"]) == (len(hits), sum(hits))
            accuracies.append(sum(hits) / len(hits))
    assert report["acc_worst"] == min(accuracies) and report["worst_group"] == accuracies.index(min(accuracies))
    assert report["acc_mean"] == sum(int(p == t) for p, t in zip(predicted, y)) / 500
    mixed = sum(acc * n for acc, n in zip(accuracies, train_counts)) / sum(train_counts)
    assert math.isclose(report["acc_mean_train_mix"], mixed)


def test_predict_is_in_order_in_eval_mode_and_leaves_the_mode(tmp_path):
    split = load_split(read_metadata("synthetic"), "val", 32, tmp_path)

    class Brightness(torch.nn.Module):
        """Logits from mean brightness; dropout would show if it were on."""
        input_mean, input_std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)

        def forward(self, x):
            bright = x.mean((1, 2, 3))
            return torch.nn.functional.dropout(torch.stack([0.4 - bright, bright - 0.4], 1), 0.5, self.training)

    model = Brightness().train()
    logits = predict(model, split, 32, batch_size=100)
    assert model.training and logits.shape == (1199, 2)
    assert torch.allclose(logits[:, 1], split.images.float().mean((1, 2, 3)) / 255 - 0.4, atol=1e-6)
    report = evaluate(model, split, 32)
    assert report["acc_mean"] == (logits.argmax(1) == split.y).double().mean().item()
