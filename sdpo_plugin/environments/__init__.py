"""Reward functions with feedback, one file each, for `--reward.remote_url`; plain OpenRLHF can use them, too."""
