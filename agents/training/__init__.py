"""``offramp train --config``: the staged method, with checkpoints, resuming and sweeps."""
