"""offramp.envs"""
