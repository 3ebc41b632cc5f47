"""What surrounds the model: checkpoints, released folders, chat templates, devices, distributed training."""
