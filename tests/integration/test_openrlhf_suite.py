"""The host's own test suite, from its wheel, with the plugin installed and CPU mode on."""

import subprocess
import sys

import pytest


@pytest.mark.check
def test_the_hosts_own_tests_pass_in_cpu_mode():
    code = (
        "from sdpo_plugin.openrlhf_adapter.platform import cpu; cpu.enable()\n"
        "import pytest, sys, tests\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *tests.__path__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "221 passed" in done.stdout, done.stdout[-3000:]
