"""Names the adapters that a policy was recorded with, and carries them in parts to workers."""
