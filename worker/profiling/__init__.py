"""How ``offramp profile`` times a decode step: rounds of real steps, a clock around their parts."""
