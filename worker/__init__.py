"""offramp.worker"""
