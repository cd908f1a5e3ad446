"""What clients talk to: the front, who keeps it, and the wire that brings it tokens."""
