"""Workers, clients and measures of ``hot_swap.py``."""
