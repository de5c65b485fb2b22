"""Talk to a model about images: the same as `mllm chat`, without installing the command.

python scripts/chat.py [FOLDER] --image photo.jpg --question "What is this?"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm.cli import main

QUICKSTART = "outputs/quickstart/3_instruct"

if __name__ == "__main__":
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] != "--help"):
        given = [QUICKSTART, *given]
    sys.argv = ["mllm", "chat", *given]
    main()
