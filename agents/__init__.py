"""offramp.agents"""
