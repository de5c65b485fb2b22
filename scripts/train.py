"""One rank of one stage, for the launcher: deepspeed --num_gpus 8 scripts/train.py recipe.yaml"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm.training.worker import main

if __name__ == "__main__":
    sys.exit(main())
