"""Where user code can break a private run, what it does there, and when: each cell a program."""
