"""Retrains policies on live traffic, once it has drifted or grown enough, and begins a canary."""
