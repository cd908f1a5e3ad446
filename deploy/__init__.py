"""offramp.deploy"""
