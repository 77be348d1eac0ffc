"""Speed and memory: ours beside the peers in one interleaved run, and each figure beside its floor."""
