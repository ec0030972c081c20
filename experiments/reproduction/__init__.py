"""A paper's table as runs: what it is, which runs that takes, who trains them, what they say."""
