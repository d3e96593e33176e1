"""`python -m sdpo_plugin` is `openrlhf-sdpo`."""

from sdpo_plugin.openrlhf_adapter.launcher.cli import main

main()
