"""The package's main job end to end, on a real pretrained model and real photographs."""
