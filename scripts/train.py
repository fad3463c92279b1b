"""`prunetune train` for `accelerate launch`, which starts a script once per process:

accelerate launch --config_file configs/accelerate/ddp.yaml scripts/train.py my_run.yaml [key=value ...]
"""

import sys

from prunetune.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
