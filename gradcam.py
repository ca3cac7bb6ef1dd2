"""Stage 5: where does the network look? Grad-CAM before and after fine-tuning, with numbers beside.

    python gradcam.py                                           # the runs of stages 1 and 4
    python gradcam.py --run runs/wb0 --masks CUB/segmentations
    python gradcam.py --run runs/wb0 --after runs/wb0/finetune*/best.pt

Paper: section 2.2.4, Figure 10. For some test images of the minority groups: the image and the maps
of the ERM network and of the fine-tuned one. Where masks of the object exist, for every group and
over all its test images: the share of a map's mass inside the object and the pointing game, beside
two controls: ERM's network with an untrained head, a centred Gaussian. Writes RUN/gradcam/:
args.json, focus.csv (with masks), results.json and fig10_gradcam.png.
"""

import copy
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for python -P
import common
from common import BadInput

FILES = ("args.json", "focus.csv", "results.json", "fig10_gradcam.png")
MEASURES = ("mass", "pointing")  # share of mass inside the object, pointing game


def parse_args(argv=None):
    p = common.make_parser(f"{__doc__}\nIn brackets: the default.")
    g = p.add_argument_group("networks")
    g.add_argument("--before", type=Path, help="first row of maps (RUN/erm/best.pt)")
    g.add_argument(
        "--after",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="rows below (RUN/finetune/best.pt)",
    )
    g.add_argument("--data", help="where the data are now, if they moved (as the checkpoint says)")
    g = p.add_argument_group("maps")
    g.add_argument(
        "--layer",
        help="module whose output is mapped, by dotted name (resnet50: layer4.2.conv3, as in the "
        "paper; a transformer with a class token: the first norm of its last block; else the "
        "network's last feature map)",
    )
    g.add_argument(
        "--target",
        default="label",
        help="class whose logit is explained: label, each image's own; predicted; or a class "
        "number. Paper: dimension 0, here landbird or non-blond; in its released code, whose "
        "encoding is reversed, waterbird or blond (label)",
    )
    g = p.add_argument_group("images")
    g.add_argument(
        "--n",
        type=common.between(int, 1, 100),
        default=8,
        help="images to draw from the minority groups, rounded up to equal shares (8)",
    )
    g.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder of object masks, PNGs of the same relative path and size as the test images; "
        "object is what exceeds half of a file's largest value (a folder `masks` beside the "
        "metadata, if there is one; else nothing is measured)",
    )
    g = p.add_argument_group("run")
    g.add_argument(
        "--seed",
        type=common.seed_int,
        default=0,
        help="draws the images, the control's new head and the bootstrap (0)",
    )
    g.add_argument(
        "--batch-size", type=common.positive_int, default=128, help="images in a forward pass (128)"
    )
    return p.parse_args(argv)


def main(args):
    # The networks, their data, what is explained and where
    args.before = args.before or args.run / "erm" / "best.pt"
    args.after = args.after or [args.run / "finetune" / "best.pt"]
    models, checkpoint, table = load_networks(args)
    before, *after = models
    classes = checkpoint["classes"]
    test = common.open_split(checkpoint, table, "test")
    args.masks = find_masks(args.masks, table, test)
    common.print_settings(args)
    explained = describe_target(args.target, classes)
    layer = choose_layer(args.layer, models[before], checkpoint["arch"])
    grid = map_size(models[before], layer, checkpoint["size"])
    place = layer or "the last feature map"
    heading = f"Grad-CAM of {place} ({grid[0]} x {grid[1]}), {explained}"
    print(heading)
    folder = args.run / "gradcam"
    common.open_folder(folder, FILES)

    # The picture: a seeded choice of images
    index = choose_images(test, table.groups, args.n, args.seed)
    x, y, *_ = next(iter(common.Batches(test, args.device, order=[index])))
    shapes = object_masks(test, index, args.masks) if args.masks else None
    shown = {}
    for name, model in models.items():
        shown[name] = explain(model, x, y, layer, args.target)
    images = []
    for i, at in enumerate(index):
        networks = {}
        for name, (maps, logits) in shown.items():
            confidence, predicted = logits[i].softmax(0).max(0)
            networks[name] = {
                "predicted": int(predicted),
                "confidence": round(float(confidence), 4),
                "empty": bool(is_empty(maps)[i]),
            }
        images.append(
            {
                "file": test.files[at],
                "caption": common.long(table.groups[test.g[at]]),
                "label": int(test.y[at]),
                "networks": networks,
            }
        )

    # The numbers: the whole test split, where the object's place is known
    rows = []
    without = 0
    if args.masks:
        measured = {**models, "random head": random_head(models[before], args.seed)}
        scores, area = measure(
            measured,
            test,
            common.Batches(test, args.device, args.batch_size, args.workers),
            layer,
            args,
        )
        without = int((area == 0).sum())
        if without == len(test):
            raise BadInput(f"{args.masks}: no mask of a test image shows an object")
        if without:
            common.warn(f"{without} of {len(test)} images have no mask, or an empty one")
        rows = focus_rows(scores, area, test.g, table.groups, before, after, args.seed)
    results = {
        "stage": "gradcam",
        "source": table.source,
        "labels": checkpoint["data"]["labels"],  # reopen has compared them
        "arch": checkpoint["arch"],
        "before": str(args.before),
        "after": dict(zip(after, map(str, args.after), strict=True)),
        "erm": checkpoint["erm"],
        "networks": {name: common.fingerprint_of(model) for name, model in models.items()},
        "layer": layer,
        "grid": grid,
        "target": args.target,
        "classes": classes,
        "images": images,
        "without_mask": without,
        "focus": rows,
    }
    files = {"args.json": common.run_record("gradcam", args), "results.json": results}
    if rows:
        files["focus.csv"] = rows
    common.write(folder, files, remove=["focus.csv", "fig10_gradcam.png"])
    if args.masks:
        common.print_rows("Focus on the object over test images, with 95 % intervals", rows)
    else:
        print("nothing measured: no object masks (--masks DIR)")

    figure = plot_images([test[i][0] for i in index], shown, images, shapes, classes, heading)
    common.write(folder, {"fig10_gradcam.png": figure})
    print(f"wrote {folder}/")


# ---- the method ----


def grad_cam(model, x, layer=None, target=None, channels_last=None):
    """Grad-CAM of the logit of class `target` (a number, or one per image (B,); default: the
    predicted class) for normalised images x (B, 3, H, W), at the output of module `layer` or, by
    default, of the last feature map, which timm's networks alone tell. channels_last: whether a map
    of that layer is (B, H, W, C); timm's networks tell. Returns maps (B, H, W), not negative, not
    scaled, and logits (B, C). In eval mode; leaves no hook, no .grad and all modes as they were."""
    activation, gradient, logits = activations(model, x, layer, target, channels_last)
    weights = gradient.mean((2, 3), keepdim=True)
    maps = (weights * activation).sum(1, keepdim=True).relu()
    maps = torch.nn.functional.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)
    return maps[:, 0], logits


def activations(model, x, layer=None, target=None, channels_last=None):
    """What `layer` gives and its gradient of the target's logit, both (B, C, h, w), and logits."""
    kept = []

    def cut(module, inputs, out):
        if not torch.is_tensor(out) or len(out) != len(x):
            raise ValueError(f"{layer or 'the last feature map'}: not a tensor with all images")
        kept[:] = [out.detach().requires_grad_()]
        return kept[0].clone()  # the rest of the network may overwrite it, as by an in-place ReLU

    x = x.clone()  # which a network may overwrite
    # The same weights without gradients, so that the graph starts at the layer
    frozen = {name: weight.detach() for name, weight in model.named_parameters()}
    with common.evaluating(model), torch.inference_mode(False), torch.enable_grad():
        if layer is None:
            with torch.no_grad():
                features = model.forward_features(x)
            logits = model.forward_head(cut(None, None, features))
        else:
            with model.get_submodule(layer).register_forward_hook(cut):  # removed at the end
                logits = torch.func.functional_call(model, frozen, (x,))
        if not kept:
            raise ValueError(f"{layer}: not run in the forward pass")
        classes = logits.argmax(1) if target is None else torch.as_tensor(target).to(x.device)
        logit = logits.gather(1, classes.expand(len(x))[:, None]).sum()
        (gradient,) = torch.autograd.grad(logit, kept)
    if channels_last is None:
        channels_last = gives_channels_last(model, layer)
    return (
        as_grid(model, kept[0].detach().float(), channels_last),
        as_grid(model, gradient.float(), channels_last),
        logits.detach().float(),
    )


def gives_channels_last(model, layer):
    """Whether a layer of one of timm's networks gives maps (B, H, W, C). A convolution never does,
    a linear layer always."""
    if layer is not None:
        module = model.get_submodule(layer)
        if isinstance(module, torch.nn.Conv2d):
            return False
        if isinstance(module, torch.nn.Linear):
            return True
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def as_grid(model, values, channels_last):
    """What a layer gives as (B, C, h, w): maps as they are, or with channels in front; tokens
    (B, T, C) in rows, without the class and register tokens that timm's networks tell of."""
    if values.dim() == 4:
        return values.permute(0, 3, 1, 2) if channels_last else values
    if values.dim() == 3:
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0):  # XCiT's blocks give none
            patches = values[:, prefix:]
            side = math.isqrt(patches.shape[1])
            if side > 0 and side**2 == patches.shape[1]:
                return patches.transpose(1, 2).unflatten(2, (side, side))
    raise ValueError(f"gives {tuple(values.shape[1:])} for an image, which is no map")


def is_empty(maps):
    """Which maps (B, H, W) are flat, and so show nothing: (B,). A map is flat where nothing speaks
    for the class, or where the layer has a single position."""
    low, high = maps.flatten(1).aminmax(dim=1)
    return ~(high - low > 1e-5 * high)  # not "<=": what is not a number is empty as well


def random_head(model, seed=0):
    """A copy of the model with an untrained head, a control: if its maps lie on objects as well,
    those of the trained network say nothing about what its head has learned."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in common.head_names(model):
            model.get_submodule(name).reset_parameters()
    return model


def gaussian(size):
    """A map (size, size) that knows no image: centred, standard deviation a quarter of the side."""
    line = torch.exp(-((torch.arange(size) + 0.5) / size - 0.5).square() / (2 * 0.25**2))
    return line[:, None] * line


def focus(maps, masks):
    """How far maps (B, H, W) lie on objects, masks bool (B, H, W): (B, 2) in [0, 1], the share of a
    map's mass inside the object, and whether its maximum is (the pointing game), where equal pixels
    share the hit (coarse maps have plateaus). NaN: the map is empty or the mask is."""
    values, inside = maps.flatten(1), masks.flatten(1)
    mass = (values * inside).sum(1) / values.sum(1)
    # Upsampled plateaus are equal up to rounding only
    steps = (values / values.amax(1, keepdim=True) * 2**16).round()
    highest = steps == steps.amax(1, keepdim=True)
    pointing = (highest & inside).sum(1) / highest.sum(1)
    nothing = is_empty(maps) | ~inside.any(1)
    return torch.stack([mass, pointing], 1).masked_fill(nothing[:, None], math.nan)


@torch.autocast("cpu", enabled=False)  # sums in full precision
def bootstrap(values, seed=0, resamples=1000):
    """Mean (K,) and 95 % interval (2, K) of values (n, K) over images drawn anew; NaN is left out
    of a column, and is the result where a column has nothing else."""
    n = len(values)
    known = ~values.isnan()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    times = torch.zeros(resamples, n).scatter_add_(1, drawn, torch.ones(resamples, n))
    means = (times @ values.nan_to_num()) / (times @ known.float())
    return values.nanmean(0), means.nanquantile(torch.tensor([0.025, 0.975]), 0)


def read_mask(path, image_path, size):
    """The object's mask as the network sees it, bool (size, size). Raises BadInput if it is
    unreadable, has more than 8 bits, transparent pixels or another size, or is the image itself."""
    advice = (
        "expected a mask of its image's size, with 8 bits and nothing transparent; replace it or "
        "take it away"
    )
    with common.reading(path, advice), Image.open(path) as mask, Image.open(image_path) as image:
        see_through = mask.convert("RGBA").getextrema()[3][0] < 255
        if (
            mask.size != image.size
            or mask.mode[0] in "IF"
            or see_through
            or path.samefile(image_path)
        ):
            raise BadInput(
                f"{path}: has {mask.size} pixels of mode {mask.mode}"
                f"{', some transparent' if see_through else ''}, its image {image_path} "
                f"{image.size}; {advice}"
            )
        grey = np.asarray(mask.convert("L"))
    # CUB's grey values count annotators: more than half of them, or what is on in a binary mask
    binary = Image.fromarray(np.where(grey > grey.max() / 2, 255, 0).astype(np.uint8))
    return common.make_transform(size)(binary)[0] > 127


def find_masks(folder, table, images):
    """The folder of masks: the one that was given, or the folder `masks` beside the metadata if it
    holds masks of these images; else None. Raises BadInput if what was given holds none."""
    source = Path(table.source)
    found = folder or source.parent / "masks"
    if folder is None and not (source.is_file() and found.is_dir()):
        return None
    if any(find_mask(found, file) for file in images.files):
        return found
    if folder:
        raise BadInput(f"--masks {folder}: holds no mask, DIR/NAME.png, of a test image")
    common.warn(f"{found} holds no mask of a test image; nothing is measured")
    return None


def find_mask(folder, file):
    """The path of an image's mask, or None."""
    return common.find_file(folder, str(Path(file).with_suffix(".png")))


def object_masks(images, index, folder):
    """Masks of the images `index`, bool (B, size, size), without a pixel where there is none."""
    masks = []
    for i in index:
        path = find_mask(folder, images.files[i])
        if path is None:
            masks.append(torch.zeros(images.size, images.size, dtype=torch.bool))
        else:
            masks.append(read_mask(path, images.paths[i], images.size))
    return torch.stack(masks)


def measure(models, test, batches, layer, args):
    """Focus of every model on the whole split, {name: (N, 2)}, and the object's share of each image
    (N,), 0 without a mask."""
    scores = {name: [] for name in (*models, "gaussian")}
    area = []
    blob = gaussian(test.size)
    for x, y, _, index in tqdm(batches, "maps", disable=None, leave=False):
        masks = object_masks(test, index.tolist(), args.masks)
        area.append(masks.float().mean((1, 2)))
        for name, model in models.items():
            maps, _ = explain(model, x, y, layer, args.target)
            scores[name].append(focus(maps, masks))
        scores["gaussian"].append(focus(blob.expand_as(masks), masks))
    return {name: torch.cat(parts) for name, parts in scores.items()}, torch.cat(area)


def explain(model, x, y, layer, target):
    """Maps (B, S, S) and logits (B, C), on the CPU, for --target."""
    if target == "label":
        wanted = y
    elif target == "predicted":
        wanted = None
    else:
        wanted = int(target)
    maps, logits = grad_cam(model, x, layer, wanted)
    return maps.cpu(), logits.cpu()


def focus_rows(scores, area, g, groups, before, after, seed):
    """Rows of focus.csv: for every group and model, then for what each later model differs by from
    the first (over the images where both maps show something), n images with a mask, empty maps,
    and means with 95 % intervals."""
    columns = dict(scores)
    for name in after:
        columns[f"{name} - {before}"] = scores[name] - scores[before]
    rows = []
    for group in groups:
        members = (g == group["group"]) & (area > 0)
        if not members.any():
            continue
        for name, values in columns.items():
            mean, (low, high) = bootstrap(values[members], seed)
            row = {
                "model": name,
                "group": group["group"],
                "name": group["name"],
                "minority": group["minority"],
                "n": int(members.sum()),
                "empty": int(values[members, 0].isnan().sum()),
                "area": round(float(area[members].mean()), 4),
            }
            for j, measure in enumerate(MEASURES):
                for end, numbers in (("", mean), ("_low", low), ("_high", high)):
                    number = float(numbers[j])
                    row[measure + end] = None if math.isnan(number) else round(number, 4)
            rows.append(row)
    return rows


# ---- what is asked for ----


def load_networks(args):
    """{name: model} with the earlier one first, its checkpoint and its data. A network is called by
    the folder of its checkpoint or, where folders do not tell them apart, by its path."""
    model, checkpoint, table = common.reopen(args.before, args.data, args.device)
    paths = [args.before, *args.after]
    names = [Path(os.path.abspath(path)).parent.name for path in paths]
    controls = {"random head", "gaussian"}
    if len(set(names)) < len(names) or controls & set(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise BadInput(f"--before and --after name one checkpoint twice: {', '.join(names)}")
    models = {names[0]: model}
    for name, path in zip(names[1:], args.after, strict=True):
        models[name], other = common.load_model(path, args.device)
        if any(other[key] != checkpoint[key] for key in ("arch", "size", "classes")):
            raise BadInput(f"{path} and {args.before} must be alike in arch, size and classes")
        if other["erm"]["id"] != checkpoint["erm"]["id"]:
            common.warn(
                f"{path} did not start from the training that {args.before} is of; was ERM run "
                "again since?"
            )
    return models, checkpoint, table


def choose_layer(layer, model, arch):
    """The layer asked for (the paper writes layer4.2.conv3.weight), or the default (None: the last
    feature map)."""
    if layer is not None:
        return layer.removesuffix(".weight")
    if arch == "resnet50":
        return "layer4.2.conv3"
    norms = [name for name, _ in model.named_modules() if re.fullmatch(r"blocks\.\d+\.norm1", name)]
    if norms and getattr(model, "num_prefix_tokens", 0) > 0:
        return norms[-1]
    return None


def map_size(model, layer, size):
    """Height and width [h, w] of the layer's map. Raises BadInput where it is no map, or where the
    logits do not depend on it."""
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()).device)
    likely = ", ".join(
        name.removesuffix(".weight") for name in list(common.prunable_weights(model))[-5:]
    )
    place = "the last feature map" if layer is None else f"--layer {layer}"
    advice = f"name another --layer; the last ones are {likely}"
    if layer is not None:
        with common.reading(place, advice):
            model.get_submodule(layer)
    try:
        _, gradient, _ = activations(model, noise, layer, 0)
    except ValueError as error:
        raise BadInput(f"{place}: {error}; {advice}") from error
    if not gradient.any():
        raise BadInput(f"{place}: the logits do not depend on the patches; {advice}")
    grid = list(gradient.shape[2:])
    if grid[0] != grid[1]:  # as where channels are taken for places
        raise BadInput(f"{place}: {grid[0]} x {grid[1]} is no map of a square image; {advice}")
    if hasattr(model, "reroll") and layer is not None:  # of Hiera, whose tokens lie in other orders
        raise BadInput(f"{place}: its tokens do not lie in rows; leave --layer out")
    if min(grid) < 4:
        common.warn(
            f"the map has {grid[0]} x {grid[1]} positions for {size} x {size} pixels and says "
            "little about where; an earlier --layer has more"
        )
    return grid


def describe_target(target, classes):
    """Which class is explained, in words. Raises BadInput."""
    known = {"label": "each image's own class", "predicted": "the class that each network predicts"}
    for number, name in enumerate(classes):
        known[str(number)] = f"class {number} ({name})"
    if target not in known:
        expected = "; ".join(f"{name}, {words}" for name, words in known.items())
        raise BadInput(f"--target {target}: expected {expected}")
    return f"logit of {known[target]}"


def choose_images(split, groups, n, seed):
    """Indices of n images, rounded up to equal shares of the first n minority groups or, where none
    is one, of all groups."""
    there = [group for group in groups if (split.g == group["group"]).any()]
    minority = [group for group in there if group["minority"]]
    chosen = (minority or there)[:n]
    parts = common.sample_groups(split.g, chosen, math.ceil(n / len(chosen)), seed=seed)
    return torch.cat(parts).tolist()


# ---- the figure ----


def plot_images(pictures, shown, images, shapes, classes, heading):
    """Figure 10: a column per image, the picture on top and a row of maps per network, the earlier
    network first. A map is scaled by its own maximum and laid over the picture in grey; white: the
    object's outline, where it is known."""
    n_rows = 1 + len(shown)
    fig = Figure(figsize=(max(4.5, 1 + 1.3 * len(images)), 0.6 + 1.5 * n_rows))
    axes = fig.subplots(n_rows, len(images), squeeze=False)
    heat = None
    for i, row in enumerate(images):
        picture = pictures[i].permute(1, 2, 0).numpy()
        axes[0][i].imshow(picture)
        axes[0][i].set_xlabel(textwrap.fill(row["caption"], 16))
        for ax, (name, (maps, _)) in zip(axes[1:, i], shown.items(), strict=True):
            says = row["networks"][name]
            ax.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=255)
            answer = f"{classes[says['predicted']]} {100 * says['confidence']:.0f} %"
            if says["predicted"] != row["label"]:
                answer += "\n(wrong)"
            if says["empty"]:
                answer += "\nmap is empty"
            else:
                heat = ax.imshow(
                    (maps[i] / maps[i].max()).numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.6
                )
            if shapes is not None and shapes[i].any():
                ax.contour(shapes[i].numpy(), levels=[0.5], colors="white", linewidths=0.8)
            ax.set_xlabel(answer)
    for ax, name in zip(axes[:, 0], ["image", *shown], strict=True):
        ax.set_ylabel(name)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    if heat:
        fig.colorbar(
            heat, ax=axes[1:], fraction=0.02, pad=0.01, label="Grad-CAM (1: the map's maximum)"
        )
    outline = "white: outline of the object; " if shapes is not None else ""
    fig.suptitle(f"{heading}\n{outline}* minority")
    return fig


if __name__ == "__main__":
    common.run_stage(parse_args, main)
