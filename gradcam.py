"""Stage 5: where does the network look? Grad-CAM before and after fine-tuning, and a number beside the picture.

    python gradcam.py                                           # the run of train_erm.py and finetune_contrastive.py
    python gradcam.py --run runs/wb0 --masks CUB/segmentations --target label
    python gradcam.py --run runs/wb0 --after runs/wb0/finetune*/best.pt --images a.jpg b.jpg

Paper: section 2.2.4, Figure 10. For some test images of the minority groups, the image and the maps of the ERM
network and of the fine-tuned one. Where masks of the object exist, also over the whole test split and per group:
the share of a map's mass inside the object, the pointing game, and the overlap (IoU), beside two controls.
Writes RUN/gradcam/ (replaced): args.json, fig10_gradcam.png and, with masks, focus.csv, focus.png; results.json.
"""

import argparse
import copy
import itertools
import math
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (BadInput, batches, center, check_flags, check_stage, classifier_heads, draw_with_replacement,
                    is_transformer, load_model, normalize, one_line_errors, plain, prunable_layers, reopen, warn, whole_folder, write_csv,
                    write_json)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

MEASURES = {"mass": "mass inside the object", "pointing": "pointing game", "iou": "IoU at the object's area"}
CONTROLS = ("random head", "gaussian")


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--run", type=Path, default="runs/synthetic", help="run folder shared by all stages (default %(default)s)")

    g = p.add_argument_group("networks")
    g.add_argument("--before", type=Path, help="network on top (default RUN/erm/best.pt)")
    g.add_argument("--after", nargs="+", metavar="FILE", help="networks below it, one or more (default RUN/finetune/best.pt)")
    g.add_argument("--data", help="where the data are now, if they moved since training (default: as the checkpoint says)")

    g = p.add_argument_group("maps")
    g.add_argument("--layer",
                   help="module whose output is mapped, by dotted name (default: the last convolution before the head, not on "
                        "a shortcut: layer4.2.conv3 in ResNet-50, as in the paper; in a transformer the first norm of the last "
                        "block)")
    g.add_argument("--target", default="0",
                   help="class whose logit is explained: label (each image's own), predicted, or a class number; paper: "
                        "dimension 0, here and usually landbird or non-blond, in the released code, whose encoding is "
                        "reversed, waterbird or blond (default %(default)s)")

    g = p.add_argument_group("images")
    g.add_argument("--groups", type=int, nargs="+", metavar="G",
                   help="groups to draw test images from (default the minority groups)")
    g.add_argument("--n", type=int, default=8, help="images to draw, spread evenly over the groups (default %(default)s)")
    g.add_argument("--images", nargs="+", metavar="FILE", help="draw these files instead, and measure nothing")
    g.add_argument("--masks", type=Path, metavar="DIR",
                   help="object masks of the test images: PNGs of the same relative path and size; object is what exceeds half "
                        "of the file's largest value (default: the built-in set has its own, other data are not measured)")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0,
                   help="of the choice of images, the random head and the bootstrap (default %(default)s)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    g.add_argument("--batch-size", type=int, default=128, help="images per pass (default %(default)s)")
    g.add_argument("--cache", type=Path, default="runs/cache", help="where decoded images are kept (default %(default)s)")
    return p.parse_args()


def main():
    args = parse_args()
    check_flags(args, "n", "batch_size")
    args.before = args.before or args.run / "erm" / "best.pt"
    args.after = args.after or [str(args.run / "finetune" / "best.pt")]
    models, checkpoint, test = load_networks(args)
    before, *after = models
    size, classes = checkpoint["size"], class_names(checkpoint, args.before)
    layer = args.layer = choose_layer(args.layer, models[before])
    grid = map_grid(models[before], layer, size)
    explained = check_target(args, classes)
    if args.images:
        S = size if checkpoint["data"]["data"] == "synthetic" else round(size * 256 / 224)
        names, images, y, shapes = args.images, read_images(args.images, S), None, None
    else:
        args.groups = choose_groups(args.groups, test.groups)
        index = choose_images(test, args.groups, args.n, args.seed)
        names, images, y = [test.files[i] for i in index], test.images[index], test.y[index]
        shapes = object_masks(test, index, size, args.masks)[0] if has_masks(args, test) else None
    print(" ".join(f"{key}={value}" for key, value in plain(args).items()))

    # The picture: a seeded choice of images, or the user's own
    shown = {name: explain(model, images.to(args.device), y, layer, size, args) for name, model in models.items()}
    groups = [None] * len(names) if args.images else test.g[index].tolist()
    captions = [Path(name).name if j is None else group_title(test.groups[j]) for name, j in zip(names, groups)]
    drawn = [{"file": name, "group": groups[i], "label": None if y is None else int(y[i]),
              "networks": {model: verdict(maps[i], logits[i]) for model, (maps, logits) in shown.items()}}
             for i, name in enumerate(names)]
    print(f"Grad-CAM of {layer} ({grid[0]} x {grid[1]}) for the logit of {explained}")
    print_images(drawn, classes)

    # The numbers: the whole test split, where the object's place is known
    rows, problems = [], Counter()
    if test is not None and has_masks(args, test):
        measured = {**models, "random head": random_head(models[before], args.seed)}
        scores, area, problems = measure(measured, test, layer, size, args)
        rows = focus_rows(scores, area, test, before, after, args.seed)
        if problems:
            warn(f"of {len(test.y)} test images are left out for their masks: {listed(problems)}")
        print_focus(rows)
    elif test is not None:
        print("no object masks (--masks DIR): nothing measured")

    folder = args.run / "gradcam"
    with whole_folder(folder, args) as new:
        plot_images(center(images, size), shown, drawn, captions, shapes, classes, explained, layer,
                    new / "fig10_gradcam.png")
        if rows:
            write_csv(new / "focus.csv", rows)
            plot_focus(rows, [*models, *CONTROLS], explained, new / "focus.png")
        write_json(new / "results.json", {
            "stage": "gradcam", "before": str(args.before), "after": dict(zip(after, args.after)), "layer": layer,
            "grid": grid, "target": args.target, "target_class": explained, "classes": classes, "images": drawn,
            "without_mask": dict(problems), "focus": rows})
    print(f"wrote {folder}/")


# ---- the method ----

def grad_cam(model, x, layer, target=None, upsampled=True):
    """Grad-CAM of the logit of class `target` (a number, or one per image (B,); default: the predicted class) for normalised
    images x (B, 3, H, W), at the output of module `layer` (its last call). Returns maps (B, H, W), not negative and not
    scaled, and logits (B, C); upsampled False: maps (B, h, w), as the layer has them. In eval mode; leaves no hook, no .grad
    and every module's mode as it was."""
    module, kept, modes = model.get_submodule(layer), [], [(m, m.training) for m in model.modules()]

    def cut(_, inputs, out):
        if not isinstance(out, torch.Tensor):
            raise BadInput(f"--layer {layer}: gives no single tensor")
        torch.set_grad_enabled(True)  # only what follows the layer is recorded
        kept[:] = [out.detach().requires_grad_()]
        return kept[0].clone()  # what goes on may be overwritten, by an in-place ReLU

    hook = module.register_forward_hook(cut)
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            logits = model(x)
            if not kept:
                raise BadInput(f"--layer {layer}: not run in the forward pass")
            classes = logits.argmax(1) if target is None else torch.as_tensor(target, device=x.device).expand(len(x))
            gradient, = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept)
    finally:
        hook.remove()
        for m, mode in modes:
            m.training = mode
    activation, gradient = (as_grid(model, layer, values) for values in (kept[0].detach(), gradient))
    maps = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True).relu()
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False) if upsampled else maps
    return maps[:, 0], logits.detach()


def as_grid(model, layer, values):
    """What a layer gives as (B, C, h, w): tokens (B, T, C) without class and register tokens, in rows; channels of a Swin's
    norm, which come last, in front."""
    if values.dim() == 4:
        channels = getattr(model.get_submodule(layer), "normalized_shape", values.shape[1:2])[-1]
        return values if values.shape[1] == channels else values.permute(0, 3, 1, 2)
    if values.dim() == 3:
        patches = values[:, getattr(model, "num_prefix_tokens", int(hasattr(model, "class_token"))):]  # timm; torchvision
        side = math.isqrt(patches.shape[1])
        if side > 0 and side ** 2 == patches.shape[1]:
            return patches.transpose(1, 2).unflatten(2, (side, side))
    raise BadInput(f"--layer {layer}: gives {tuple(values.shape[1:])} for an image, which is no map; candidates are "
                   + ", ".join(candidates(model)))


def candidates(model):
    """Layers to map, from input to output: in a transformer the first norm of each block, else convolutions that are neither
    head nor shortcut (a downsampling convolution runs beside the main path)."""
    if is_transformer(model):
        return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ("norm1", "ln_1")]
    return [name for name in prunable_layers(model) if not {"downsample", "shortcut"}.intersection(name.split("."))]


def is_empty(maps):
    """Which maps (B, H, W) are flat, and so show nothing: (B,). A map is flat where nothing speaks for the class, or where
    the layer has a single position."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return ~(high - low > 1e-5 * high)  # not "<=": what is not a number is empty as well


def random_head(model, seed=0):
    """A copy of the model whose classifier head is as before training: what follows from it alone is what the map of
    the trained network is worth."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in classifier_heads(model):
            model.get_submodule(name).reset_parameters()
    return model


# ---- the numbers ----

def gaussian(size):
    """A map (size, size) that knows no image: a Gaussian at the centre, its standard deviation a quarter of the side."""
    line = torch.exp(-((torch.arange(size) + 0.5) / size - 0.5).square() / (2 * 0.25 ** 2))
    return line[:, None] * line


def focus(maps, masks):
    """How far maps (B, H, W) lie on objects, masks bool (B, H, W): (B, 3) in [0, 1], the share of a map's mass inside the
    object; whether its maximum is (the pointing game); the IoU of the object with the highest pixels, as many as the object
    has. Equal pixels share a hit among them (coarse maps have plateaus). NaN: the map is empty or the mask is."""
    values, inside, area = maps.flatten(1), masks.flatten(1), masks.flatten(1).sum(1)
    mass = (values * inside).sum(1) / values.sum(1)
    steps = (values / values.amax(1, keepdim=True) * 2 ** 16).round()  # upsampled plateaus are equal up to rounding only

    def hits(level, slots):  # so many slots, given to the highest pixels, those at `level` sharing what is left
        above, level = steps > level, steps == level
        return (above & inside).sum(1) + (slots - above.sum(1)) * (level & inside).sum(1) / level.sum(1)

    pointing = hits(steps.amax(1, keepdim=True), 1)
    both = hits(steps.sort(1, descending=True).values.gather(1, (area[:, None] - 1).clamp(min=0)), area)
    scores = torch.stack([mass, pointing, both / (2 * area - both)], 1)
    return scores.masked_fill((is_empty(maps) | (area == 0))[:, None], math.nan)


def bootstrap(values, seed=0, resamples=1000):
    """Mean (K,) and 95 % interval (2, K) of values (n, K) over images drawn anew; NaN is left out of a column, and is the
    result where a column has nothing else."""
    n, generator, known = len(values), torch.Generator().manual_seed(seed), ~values.isnan()
    times = draw_with_replacement(n, generator, resamples)
    means = (times @ values.nan_to_num()) / (times @ known.float())
    return values.nanmean(0), means.nanquantile(torch.tensor([0.025, 0.975]), 0)


def read_mask(path, S, original_size):
    """The object's mask, bool (S, S), resized as its image is, or a word for why there is none."""
    if not path.is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            if (image.height, image.width) != tuple(original_size):
                return "of another size than the image"
            grey = np.asarray(image.convert("L"))
    except (OSError, ValueError, SyntaxError):  # PIL raises SyntaxError on a broken PNG
        return "unreadable"
    # CUB's grey values count annotators: more than half of them, or whatever is on in a mask of two values
    binary = Image.fromarray(np.where(grey > grey.max() / 2, 255, 0).astype(np.uint8))
    return np.asarray(binary.resize((S, S), Image.BILINEAR)) > 127


def object_masks(split, index, size, folder=None):
    """Masks of the images `index`, as the network sees them, bool (B, size, size), without a pixel where there is none, and
    {why: how many have none}."""
    if folder is None:
        masks, problems = split.masks[index], Counter()
    else:
        S, names = split.images.shape[-1], [folder / Path(split.files[i]).with_suffix(".png") for i in index]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(read_mask, names, [S] * len(names), split.original_sizes[index].tolist()))
        problems = Counter(mask for mask in found if isinstance(mask, str))
        masks = torch.from_numpy(np.stack([np.zeros((S, S), bool) if isinstance(mask, str) else mask for mask in found]))
    seen = center(255 * masks[:, None].byte(), size)[:, 0] > 0.5
    outside = int((~seen.flatten(1).any(1)).sum()) - problems.total()
    return seen, problems + Counter({"empty in the centre crop": outside})


def measure(models, split, layer, size, args):
    """Focus of every model on the whole split: {name: (N, 3)}, the object's share of each image (N,), 0 without a mask, and
    {why: how many have none}."""
    blob, scores, area, problems = gaussian(size).to(args.device), {name: [] for name in (*models, "gaussian")}, [], Counter()
    steps = math.ceil(len(split.y) / args.batch_size)
    for index, images in tqdm(batches(split, args.batch_size, device=args.device), "maps", steps, disable=None, leave=False):
        masks, bad = object_masks(split, index, size, args.masks)
        problems += bad
        area.append(masks.float().mean((1, 2)))
        masks = masks.to(args.device)
        for name, model in models.items():
            maps, _ = explain(model, images, split.y[index], layer, size, args)
            scores[name].append(focus(maps, masks).cpu())
        scores["gaussian"].append(focus(blob.expand_as(masks), masks).cpu())
    if problems.total() == len(split.y):
        raise BadInput(f"--masks {args.masks}: no usable mask for any of the {len(split.y)} test images ({listed(problems)}); "
                       f"looked for {args.masks / Path(split.files[0]).with_suffix('.png')} and so on")
    return {name: torch.cat(parts) for name, parts in scores.items()}, torch.cat(area), problems


def listed(problems):
    return ", ".join(f"{n} {why}" for why, n in problems.items())


def explain(model, images, y, layer, size, args):
    """Maps (B, size, size) and logits (B, C) of images as stored, uint8 (B, 3, S, S), with labels y (B,), for --target."""
    target = {"label": y, "predicted": None}.get(args.target, args.target)
    return grad_cam(model, normalize(center(images, size), model), layer, int(target) if isinstance(target, str) else target)


def focus_rows(scores, area, split, before, after, seed):
    """Rows of focus.csv: for every group and model, then for what each later model differs by from the first (over the
    images where both maps show something), n images with a mask, empty maps, and means with 95 % intervals."""
    columns = {**scores, **{f"{name} - {before}": scores[name] - scores[before] for name in after}}
    rows = []
    for group in split.groups:
        members = (split.g == group["group"]) & (area > 0)
        if not members.any():
            continue
        mean, interval = bootstrap(torch.cat([values[members] for values in columns.values()], 1), seed)
        numbers = torch.cat([mean[None], interval]).view(3, len(columns), len(MEASURES))
        for i, (name, values) in enumerate(columns.items()):
            rows.append({"model": name, **{key: group[key] for key in ("group", "name", "minority")}, "n": int(members.sum()),
                         "empty": int(values[members, 0].isnan().sum()), "area": round(float(area[members].mean()), 4)})
            for j, measure_name in enumerate(MEASURES):
                for key, number in zip(("", "_low", "_high"), numbers[:, i, j].tolist()):
                    rows[-1][measure_name + key] = None if math.isnan(number) else round(number, 4)
    return rows


# ---- what is asked for ----

def load_networks(args):
    """{name: model} with the earlier one first, its checkpoint, and the test split (None with --images). A network is called
    by the folder of its checkpoint."""
    paths = [str(args.before), *args.after]
    for path in paths:
        if not Path(path).is_file():
            script, flag = ("train_erm.py", "before") if path == paths[0] else ("finetune_contrastive.py", "after")
            raise BadInput(f"{path}: no such checkpoint; run {script} first or pass --{flag} FILE")
    if args.images:
        (model, checkpoint), test = load_model(args.before, args.device), None
    else:
        model, checkpoint, splits = reopen(args.before, args.data, args.cache, args.device, ("test",))
        test = splits["test"]
    names = [Path(path).resolve().parent.name for path in paths]
    names = names if len({*names, *CONTROLS}) == len(names) + len(CONTROLS) else paths
    if len({*names}) < len(names):
        raise BadInput(f"--before and --after name one checkpoint twice: {', '.join(paths)}")
    models = {names[0]: model}
    for name, path in zip(names[1:], args.after):
        models[name], other = load_model(path, args.device)
        for key in ("arch", "n_classes", "size"):  # and the classes below: the same number need not be the same classes
            if other[key] != checkpoint[key]:
                raise BadInput(f"{path} has {key} {other[key]} and {args.before} has {checkpoint[key]}; networks must be alike")
        ours, theirs = (", ".join(class_names(saved, source)) for saved, source in ((checkpoint, args.before), (other, path)))
        if theirs != ours:
            raise BadInput(f"{path} tells {theirs} apart and {args.before} {ours}; networks must be alike")
    for network in models.values():
        network.to(memory_format=torch.channels_last)  # the same numbers; convolution and pooling are faster so on a CPU
    return models, checkpoint, test


def class_names(checkpoint, path):
    """What the classes are called: the first word of their groups' names ('landbird on water')."""
    check_stage(checkpoint, path)
    groups, n = checkpoint["metrics"]["train"]["groups"], checkpoint["n_classes"]
    return [groups[c * len(groups) // n]["name"].split()[0].strip(",") for c in range(n)]


def choose_layer(layer, model):
    """The layer asked for (the paper writes layer4.2.conv3.weight) or the default one. Raises BadInput with the candidates."""
    known = candidates(model)
    if layer is None and not known:
        raise BadInput("this network has neither convolutions nor blocks with a first norm; name a layer with --layer")
    layer = known[-1] if layer is None else layer.removesuffix(".weight")
    if layer not in dict(model.named_modules()) or not layer:
        raise BadInput(f"--layer {layer}: this network has no such module; candidates are {', '.join(known)}")
    return layer


def map_grid(model, layer, size):
    """Height and width [h, w] of the layer's map before it is upsampled; where that is too little to say where something is,
    names a layer that has more."""
    blank = torch.zeros(1, 3, size, size, device=model.input_mean.device)
    def grid_of(name):
        return list(grad_cam(model, blank, name, upsampled=False)[0].shape[1:])
    grid = grid_of(layer)
    if min(grid) < 4:
        finer = next((name for name in reversed(candidates(model)) if min(grid_of(name)) >= 4), None)
        warn(f"the map of {layer} has {grid[0]} x {grid[1]} positions for {size} x {size} pixels and says little about where"
             + (f"; a finer one: --layer {finer}" if finer else ""))
    return grid


def check_target(args, classes):
    """Which class is explained, in words."""
    if args.target in ("label", "predicted"):
        if args.images and args.target == "label":
            raise BadInput("--target label: files given with --images have no label; use predicted or a class number")
        return "each image's own label" if args.target == "label" else "the class that each network predicts"
    if args.target not in map(str, range(len(classes))):
        raise BadInput(f"--target {args.target}: expected label, predicted or a class number, "
                       + ", ".join(f"{c} ({name})" for c, name in enumerate(classes)))
    return f"class {args.target} ({classes[int(args.target)]})"


def choose_groups(groups, known):
    """Groups to draw images from: those asked for, else the minority groups, else (where there is none) all."""
    unknown = [j for j in groups or [] if j not in range(len(known))]
    if unknown:
        raise BadInput(f"--groups {unknown[0]}: the groups are " + ", ".join(f"{g['group']} ({g['name']})" for g in known))
    return groups or [g["group"] for g in known if g["minority"]] or [g["group"] for g in known]


def choose_images(split, groups, n, seed):
    """Indices of n images, as many from each group as from the next, at random (fewer if a group has fewer)."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for j, share in zip(groups, torch.arange(n).tensor_split(len(groups))):
        members = (split.g == j).nonzero()[:, 0]
        parts.append(members[torch.randperm(len(members), generator=generator)[:len(share)]])
    index = torch.cat(parts)
    if not len(index):
        raise BadInput(f"--groups {' '.join(map(str, groups))}: no test image in these groups")
    return index


def read_images(paths, S):
    """Image files as a split holds them, uint8 (N, 3, S, S)."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB").resize((S, S), Image.BILINEAR)).transpose(2, 0, 1))
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError on a broken PNG
            raise BadInput(f"--images {path}: cannot be read as an image ({error})") from error
    return torch.from_numpy(np.stack(images))


def has_masks(args, split):
    return args.masks is not None or split.masks is not None


def verdict(image_map, logits):
    """What one network says of one image (map (H, W), logits (C,)), as plain types."""
    confidence, predicted = logits.softmax(0).max(0)
    return {"predicted": int(predicted), "confidence": round(float(confidence), 4), "empty": bool(is_empty(image_map[None])[0])}


def group_title(group):
    return f"{group['name']}{'*' if group['minority'] else ''}"


def in_words(says, classes, label):
    """'landbird 93 %', with '(wrong)' behind it where it is."""
    wrong = label is not None and says["predicted"] != label
    return f"{classes[says['predicted']]} {100 * says['confidence']:.0f} %{' (wrong)' if wrong else ''}"


def print_images(drawn, classes):
    for row in drawn:
        told = "; ".join(f"{model}: {in_words(says, classes, row['label'])}{', map empty' if says['empty'] else ''}"
                         for model, says in row["networks"].items())
        print(f"{row['file']}{'' if row['label'] is None else ': is ' + classes[row['label']]}; {told}")


def print_focus(rows):
    print("\nFocus on the object over the test split, in %, mean [95 % interval]; * minority")
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [row for row in rows if row["group"] == group]
        first = of_group[0]
        print(f"{group} {group_title(first)}, n = {first['n']}, object {100 * first['area']:.1f} % of the image")
        for row in of_group:
            cells = [f"{name} {percent(row, name):26s}" for name in MEASURES]
            print(f"  {row['model']:28s} {' '.join(cells)}{' empty ' + str(row['empty']) if row['empty'] else ''}".rstrip())


def percent(row, name):
    """A measure in percent with its interval; differences are signed."""
    if row[name] is None:
        return "-"
    sign = "+" if " - " in row["model"] else ""
    mean, low, high = (format(100 * row[name + key], sign + ".1f") for key in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


# ---- the figures ----

def plot_images(pictures, shown, drawn, captions, shapes, classes, explained, layer, path):
    """Figure 10: a column per image, the picture on top and a row of maps per network, the earlier network first. A map is
    scaled by its own maximum and laid over the picture in grey; white: the object's outline, where it is known."""
    fig, axes = plt.subplots(1 + len(shown), len(drawn), figsize=(max(4.5, 1 + 1.3 * len(drawn)), 0.6 + 1.5 * (1 + len(shown))),
                             layout="constrained", squeeze=False)
    for i, row in enumerate(drawn):
        picture = pictures[i].permute(1, 2, 0).numpy()
        axes[0][i].imshow(picture)
        axes[0][i].set_xlabel(captions[i], fontsize=7)
        for ax, (name, (maps, _)) in zip(axes[1:, i], shown.items()):
            says = row["networks"][name]
            ax.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
            if says["empty"]:
                ax.text(0.5, 0.5, "map is empty", transform=ax.transAxes, ha="center", va="center", fontsize=8,
                        bbox={"facecolor": "white", "edgecolor": "none"})
            else:
                heat = ax.imshow((maps[i] / maps[i].max()).cpu().numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.6)
            if shapes is not None and shapes[i].any():
                ax.contour(shapes[i].numpy(), levels=[0.5], colors="white", linewidths=0.8)
            ax.set_xlabel(in_words(says, classes, row["label"]), fontsize=7)
    for ax, name in zip(axes[:, 0], ["image", *shown]):
        ax.set_ylabel(name, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    if any(ax.images[1:] for ax in axes.flat):
        bar = fig.colorbar(heat, ax=axes[1:], fraction=0.02, pad=0.01)
        bar.set_label("Grad-CAM (1: the map's maximum)", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    notes = ["white: outline of the object"] if shapes is not None else []
    notes += ["* minority"] if any("*" in caption for caption in captions) else []
    fig.suptitle(f"Grad-CAM of {layer} for {explained}\n{'; '.join(notes)}".strip(), fontsize=9)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def plot_focus(rows, names, explained, path):
    """The three measures per group and network, with 95 % intervals, and the object's share of the image, which is what a
    map that is the same everywhere would have as its mass inside the object."""
    groups = {row["group"]: row for row in rows}
    place, ticks = {j: i for i, j in enumerate(groups)}, np.arange(len(groups))
    fig, axes = plt.subplots(1, len(MEASURES), figsize=(4 * len(MEASURES), 3.8), layout="constrained", sharey=True)
    markers = {**dict(zip(names, zip(itertools.cycle("osD^vP"), itertools.cycle(("black", "white", "0.6"))))),
               "random head": ("x", "black"), "gaussian": ("+", "black")}
    for ax, (key, title) in zip(axes, MEASURES.items()):
        for k, name in enumerate(names):
            of_name = [row for row in rows if row["model"] == name and row[key] is not None]
            x = [place[row["group"]] + 0.7 * ((k + 0.5) / len(names) - 0.5) for row in of_name]
            mean, low, high = (np.array([100 * row[key + part] for row in of_name]) for part in ("", "_low", "_high"))
            ax.errorbar(x, mean, [mean - low, high - mean], fmt=markers[name][0], mfc=markers[name][1], mec="black",
                        ecolor="0.3", ms=6, capsize=2, lw=1, label=name)
        if key == "mass":
            areas = [100 * row["area"] for row in groups.values()]
            ax.hlines(areas, ticks - 0.4, ticks + 0.4, color="0.4", ls=":", label="object's share of the image")
        labels = [f"G{j}{'*' if row['minority'] else ''}\n{textwrap.fill(row['name'], 12)}\nn = {row['n']}"
                  for j, row in groups.items()]
        ax.set_xticks(ticks, labels, fontsize=7)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
    axes[0].set(ylabel="% (mean, 95 % interval)", ylim=(0, None))
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    fig.suptitle(f"Focus of Grad-CAM on the object, test split, for {explained} (* minority)", fontsize=10)
    fig.savefig(path, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    with one_line_errors("nothing was written"):
        main()
