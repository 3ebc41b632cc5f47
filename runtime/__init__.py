"""What a run needs around the model: checkpoints, released folders, chat templates, devices, several processes."""
