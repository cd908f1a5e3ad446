"""Places every family of policies at the operating points that are compared, by replay."""
