"""Shows the closed loop on one machine, step by step."""
