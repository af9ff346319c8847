"""The most that any setting may be, whatever it is a setting of."""

MOST = (1 << 31) - 1  # of what is counted in a message of ours
MOST_S = 7 * 86400.0  # of what is waited for (seconds): a week; clocks and timers overflow far beyond
