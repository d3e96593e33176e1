"""In the launcher, the process that is started by hand: flags, recipes and checks; then OpenRLHF's own script."""
