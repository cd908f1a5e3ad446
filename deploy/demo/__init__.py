"""The closed loop on one machine, shown step by step."""
