"""Other ways to make a pretrained ViT faster without training, for the comparison in ``bench_peers.py``."""
