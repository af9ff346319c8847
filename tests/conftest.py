"""What holds for all tests: none is judged by how long it takes on the machine at hand."""

import signal

from hypothesis import HealthCheck, settings

# How long an example takes, or takes to be drawn, is the machine's affair: one that is stopped for seconds
# fails no test.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# A shell's background job, such as `make test &`, ignores Ctrl-C, so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
