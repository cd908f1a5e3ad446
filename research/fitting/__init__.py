"""Rules whose parameters come from data: each fitted on the training split alone."""
