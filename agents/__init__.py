"""Learns exit policies: records, trains, evaluates, chooses, exports. Import from its modules."""
