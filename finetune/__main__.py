"""The same as `hallmark-train`, for launchers that start a module: `accelerate launch ... -m finetune train ...`."""

from finetune.cli import main

main()
