"""Learn exit policies: record, train, evaluate, choose, export. Import from its modules."""
