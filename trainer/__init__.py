"""The post-training loop: sample, score, select, SFT, DPO, merge, evaluate, in rounds."""
