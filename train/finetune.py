"""Fine-tune in several processes: the program for accelerate to launch.

    accelerate launch --multi_gpu --num_processes 4 train/finetune.py CONFIG [KEY=VALUE ...]

or, for several processes on CPUs:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/finetune.py CONFIG [...]

Arguments, output and exit codes are those of `actionclip train`. The batch size of the
configuration is that of all processes together, and so are its contrast and its result.
"""

from __future__ import annotations

import sys

from actionclip_deploy.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]], prog_name="finetune.py")
