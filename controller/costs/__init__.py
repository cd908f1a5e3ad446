"""Says what the parts of a token cost: tables, prices, and readings of energy."""
