"""What would break the guarantee: refusals of a set-up, and the self-test of a step."""
