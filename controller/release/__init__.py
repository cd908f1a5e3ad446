"""Signs releases, keeps the ledger, moves a channel's head, and says what a worker may trust."""
