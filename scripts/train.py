"""One rank of a recipe or of a folder of recipes, for the launchers:

deepspeed --num_gpus 8 scripts/train.py recipe.yaml
torchrun --nproc-per-node 8 scripts/train.py recipe.yaml
srun --ntasks-per-node 8 python scripts/train.py recipe.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm.training.worker import main

if __name__ == "__main__":
    sys.exit(main())
