"""`deepspeed --num_gpus 2 train.py --ds_config configs/ds_zero3.json --config configs/quickstart.toml`."""

import sys

from scamo.training.launch import main

if __name__ == "__main__":
    sys.exit(main())
